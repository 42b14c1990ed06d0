"""Every setting of dmat_ray as frozen pydantic models. Imports neither torch nor ray.

A `Config` comes from presets (YAML, layered left to right), then command-line overrides by dotted name; it travels
between processes, into checkpoints and into MLflow as one JSON dict. Images are in [0, 1], so every image budget is
in [0, 1] units and may be written as a fraction ("8/255"); latent budgets are in raw W units unless `scale` says std.
"""

from typing import Any

from pydantic import Field, model_validator

from dmat_ray.config.attacks import (
    LPA_ROUNDS,
    TERMS,
    AdversarialTerm,
    AttackConfig,
    CleanTerm,
    FogTerm,
    ImageTerm,
    LatentTerm,
    ObjectiveConfig,
    Term,
    require_reach,
)
from dmat_ray.config.base import NAME, Fraction, Section
from dmat_ray.config.data import DataConfig
from dmat_ray.config.evaluation import (
    ON_CURVE,
    ROWS,
    AttackRow,
    AutoAttackRow,
    CleanRow,
    CorruptionRow,
    EvaluationConfig,
    FogRow,
    ImageRow,
    LatentRow,
    Row,
    Summary,
)
from dmat_ray.config.generators import GanConfig, GeneratorConfig, QualityConfig, StyleGAN1Config, StyleGAN2Config, StyleGANConfig
from dmat_ray.config.projection import EncoderConfig, ProjectionConfig
from dmat_ray.config.threats import (
    ON_MANIFOLD,
    THREATS,
    ElasticThreat,
    FilterThreat,
    FogThreat,
    GaborThreat,
    GlitchThreat,
    ImageThreat,
    JointThreat,
    JpegThreat,
    KaleidoscopeThreat,
    LatentThreat,
    PerceptualThreat,
    PixelThreat,
    RecolorThreat,
    SnowThreat,
    StAdvThreat,
    ThreatSettings,
    WoodThreat,
)
from dmat_ray.config.training import ClassifierConfig, ClusterConfig, TrackingConfig, TrainingConfig
from dmat_ray.config.tuning import TuneConfig

# also those that are made in a loop: JointTerm, JpegRow, ...
globals().update({kind.__name__: kind for kind in (*TERMS.values(), *ROWS.values())})


class Config(Section):
    """All settings of dmat_ray."""

    output: str = Field("runs/default", min_length=1, description="folder or s3:// or gs:// URL that everything is written under")
    manifold_set: str | None = Field(
        None, min_length=1, description="the on-manifold set, a folder or an s3:// or gs:// URL; null = OUTPUT/on_manifold_set"
    )
    name: str = Field(
        "",
        pattern=NAME,
        description="name of the trained model (letters, digits, _ . -); empty = the presets' names",
    )
    methods: tuple[str, ...] = Field(
        ("standard", "at", "om_at", "dmat"), min_length=1, description="presets that pipeline.py trains, in this order"
    )
    data: DataConfig = DataConfig()
    generator: GeneratorConfig = GeneratorConfig()
    gan: GanConfig = GanConfig()
    encoder: EncoderConfig = EncoderConfig()
    projection: ProjectionConfig = ProjectionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tune: TuneConfig = TuneConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _validation_reaches(self) -> "Config":
        """Held-out images are attacked by both, whatever their weight: see `dmat_ray.training.validation.terms`."""
        if self.training.val_examples == 0:
            return self
        for name in ("image", "latent") if self.training.images == "on_manifold" else ("image",):
            try:
                require_reach(term := self.objective.adversarial[name], term)
            except ValueError as error:
                raise ValueError(f"objective.{name}, by which held-out images are attacked: {error}") from None
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `Config.model_validate` of it gives an equal Config."""
        return self.model_dump(mode="json")


__all__ = [
    "LPA_ROUNDS",
    "ON_CURVE",
    "ON_MANIFOLD",
    "THREATS",
    "AdversarialTerm",
    "AttackConfig",
    "AttackRow",
    "AutoAttackRow",
    "ClassifierConfig",
    "CleanRow",
    "CleanTerm",
    "ClusterConfig",
    "Config",
    "CorruptionRow",
    "DataConfig",
    "ElasticThreat",
    "EncoderConfig",
    "EvaluationConfig",
    "FilterThreat",
    "FogRow",
    "FogTerm",
    "FogThreat",
    "Fraction",
    "GaborThreat",
    "GanConfig",
    "GeneratorConfig",
    "GlitchThreat",
    "ImageRow",
    "ImageTerm",
    "ImageThreat",
    "JointThreat",
    "JpegThreat",
    "KaleidoscopeThreat",
    "LatentRow",
    "LatentTerm",
    "LatentThreat",
    "ObjectiveConfig",
    "PerceptualThreat",
    "PixelThreat",
    "ProjectionConfig",
    "QualityConfig",
    "RecolorThreat",
    "Row",
    "Section",
    "SnowThreat",
    "StAdvThreat",
    "StyleGAN1Config",
    "StyleGAN2Config",
    "StyleGANConfig",
    "Summary",
    "Term",
    "ThreatSettings",
    "TrackingConfig",
    "TrainingConfig",
    "TuneConfig",
    "WoodThreat",
]
