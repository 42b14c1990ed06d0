"""Settings of a search over settings."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dmat_ray.config.base import NAME, Section

# a weight, and the column that it weighs; names may hold nearly anything
_PART = re.compile(r"^\s*(?:(?P<weight>[-+]?[\d.]+(?:e-?\d+)?)\s*\*\s*)?(?P<name>[^*]*[^*\s])\s*$")


def parse_objective(text: str) -> dict[str, float]:
    """'0.3*clean + 0.7*worst' -> {'clean': 0.3, 'worst': 0.7}; a name alone weighs 1. Raises ValueError for anything else."""
    parts: dict[str, float] = {}
    for piece in text.split(" + "):
        found = _PART.match(piece)
        weight = (
            float(found["weight"] or 1)
            if found and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e-?\d+)?|", found["weight"] or "")
            else None
        )
        if found is None or weight is None:
            raise ValueError(f"'{text}' is no objective; write a column, or a sum such as '0.3*clean + 0.7*worst'")
        if found["name"] in parts:
            raise ValueError(f"'{text}' names '{found['name']}' twice")
        if weight <= 0:
            raise ValueError(f"'{text}': every column is to be raised, so weights are above 0")
        parts[found["name"]] = weight
    return parts


class TuneConfig(Section):
    """Search over any settings with Ray Tune: what is drawn, how, and what is best."""

    space: str = Field(
        "tune_spaces/mixing_ratio.py",
        min_length=1,
        description="Python file with SPACE: dotted setting -> domain; see tune_spaces/",
    )
    name: str = Field(
        "",
        pattern=NAME,
        description="name of the search, whose folder is OUTPUT/tune/NAME; empty = the space's",
    )
    searcher: Literal["random", "grid", "tpe", "nsga2"] = Field(
        "tpe",
        description="random; grid: every combination, of continuous domains grid_points values each; tpe: Optuna's tree of "
        "Parzen estimators; nsga2: Optuna's genetic search for several objectives",
    )
    grid_points: int = Field(4, ge=2, description="grid: values of a continuous domain, and along an edge of a simplex")
    scheduler: Literal["none", "asha", "median", "pbt"] = Field(
        "asha",
        description="what ends trials early: none; asha (arXiv 1810.05934); median: worse than the median of the others; pbt "
        "(arXiv 1711.09846): the worst go on from the weights of the best, with settings that are changed a little",
    )
    objective: tuple[str, ...] = Field(
        ("worst",),
        min_length=1,
        description="what is raised: a column of `suites`, or a sum such as '0.3*clean + 0.7*worst'; several give a Pareto front",
    )
    suites: tuple[str, ...] = Field(
        ("search",),
        min_length=1,
        description="suites that every trial is judged by, on training.val_examples held-out images, after every epoch: the same "
        "for all trials, whatever they train on",
    )
    num_samples: int | None = Field(
        None, ge=1, description="trials; with searcher grid how often the grid is run; null = 16, of a grid once"
    )
    epochs: int = Field(8, ge=1, description="epochs of a trial that is not ended early, into which its schedule is squeezed")
    grace_epochs: int = Field(1, ge=1, description="epochs that every trial gets; pbt: epochs between changes")
    reduction: int = Field(2, ge=2, description="asha: one of so many trials goes on, each time to so many times the epochs")
    max_concurrent: int | None = Field(
        None, ge=1, description="trials at a time, at most; null = as many as the cluster has room for"
    )
    retries: int = Field(
        2, ge=0, description="how often a trial that failed goes on from its last checkpoint before it is given up"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of what is drawn")
    max_gpu_hours: float | None = Field(
        None, gt=0, description="GPU-hours of trials after which the search ends with what it has; null = never"
    )
    max_wall_minutes: float | None = Field(
        None, gt=0, description="minutes after which the search ends with what it has; null = never"
    )
    evaluate: bool = Field(True, description="run `evaluation` on the test images for the best trial and its Pareto neighbours")
    confirm_seeds: int = Field(
        0,
        ge=0,
        description="train the best settings, and those that the search began from, anew with so many seeds for training.epochs "
        "each, and evaluate both: what is best of many on few images may be luck",
    )

    @property
    def samples(self) -> int:
        """How often the space is drawn from, or the grid is run."""
        return self.num_samples or (1 if self.searcher == "grid" else 16)

    def used_up(self, *, gpu_hours: float, minutes: float) -> str:
        """Which budget is, as it is set; empty for none."""
        if self.max_wall_minutes is not None and minutes > self.max_wall_minutes:
            return f"tune.max_wall_minutes {self.max_wall_minutes:g}"
        if self.max_gpu_hours is not None and gpu_hours > self.max_gpu_hours:
            return f"tune.max_gpu_hours {self.max_gpu_hours:g}"
        return ""

    @field_validator("objective")
    @classmethod
    def _is_objective(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_objective(text)
        if len(set(value)) < len(value):
            raise ValueError(f"objective names '{next(v for v in value if value.count(v) > 1)}' twice")
        return value

    @model_validator(mode="after")
    def _check(self) -> "TuneConfig":
        if len(self.objective) > 1 and self.scheduler != "none":
            raise ValueError(f"scheduler {self.scheduler} compares trials by one number; with several objectives it must be none")
        if self.scheduler == "pbt" and self.searcher != "random":
            raise ValueError(f"scheduler pbt changes settings itself, so searcher must be random, not {self.searcher}")
        if self.scheduler == "pbt" and self.samples < 2:
            raise ValueError("scheduler pbt needs a population: num_samples 2 or more")
        if self.grace_epochs > self.epochs:
            raise ValueError(f"grace_epochs {self.grace_epochs} is more than epochs {self.epochs}")
        return self
