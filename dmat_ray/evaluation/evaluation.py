"""Evaluation: attacks on trained models, one row per (model, test set, attack, example).

Everything else (tables, intervals, worst cases, curves) derives from rows. The work is cut into units, each an attack on some
examples for one model; a row's numbers depend on the settings, the model and the example, never on who did which unit.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from dmat_ray import corruptions, threats
from dmat_ray.attack import attack, autoattack, in_eval_mode, losses_of, require_possible
from dmat_ray.config import ON_CURVE, AttackRow, AutoAttackRow, CleanRow, CorruptionRow, EvaluationConfig, Row
from dmat_ray.data.manifold_set import ManifoldSet
from dmat_ray.data.set_reader import lost_classes, named_classes
from dmat_ray.devices import tf32
from dmat_ray.errors import NotFiniteError, UserError, first_line
from dmat_ray.evaluation.row_order import in_order
from dmat_ray.evaluation.units import Unit, chosen, group_of, rounds, rows_to_run, still_standing, units
from dmat_ray.networks.attack_view import view_of
from dmat_ray.rng import Draws
from dmat_ray.types import Batch, Generator

if TYPE_CHECKING:
    from dmat_ray.networks.perceptual import Perceptual

SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("source", pa.string()),  # the model that was attacked: another than `model` where images are transferred
        ("set", pa.string()),
        ("attack", pa.string()),
        ("id", pa.string()),
        ("label", pa.int64()),
        ("clean_prediction", pa.int64()),
        ("prediction", pa.int64()),
        ("correct", pa.bool_()),
        ("loss", pa.float32()),
        ("margin", pa.float32()),
        ("distance", pa.float32()),
        ("linf", pa.float32()),
        ("l2", pa.float32()),
        ("lpips", pa.float32()),  # null without evaluation.lpips
        ("seed", pa.int64()),
        ("seconds", pa.float32()),  # the time of the batch, shared out over its examples
    ]
)


@dataclass(frozen=True)
class Seen:
    """What an attack made of a batch: its images, what the model says of them, and how far they are from the clean ones."""

    x_BCHW: Tensor
    logits_BK: Tensor
    distance_B: Tensor


class Evaluator:
    """Attacks models on the examples of a set. `load` gives a model by name."""

    def __init__(
        self,
        config: EvaluationConfig,
        data: ManifoldSet,
        generator: Generator,
        load: Callable[[str], nn.Module],
        models: Sequence[str],
        device: torch.device,
    ) -> None:
        self.config, self.data, self.generator, self.models, self.device = config, data, generator, tuple(models), device
        self.rows = rows_to_run(config)
        self._load = load
        self._networks: dict[str, nn.Module] = {}
        self._view: tuple[str, nn.Module] | None = None
        self._perceptual = None if config.lpips == "none" else _perceptual(config).to(device)

    def network(self, model: str) -> nn.Module:
        """A model, in eval mode. One is kept at a time, or all where images are transferred."""
        if model not in self._networks:
            if not self.config.transfer:
                self._networks.clear()
            self._networks[model] = in_eval_mode(self._load(model).to(self.device))
        return self._networks[model]

    def seen_by_attacks(self, model: str) -> nn.Module:
        """The copy of a model that attacks compute with."""
        if self._view is None or self._view[0] != model:
            dtype = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
            self._view = model, view_of(self.network(model), dtype)
        return self._view[1]

    def batch(self, positions: Sequence[int], set_name: str) -> Batch:
        """Examples by position, on the device."""
        return self.data.batch(np.array(positions), set_name).to(self.device)

    @tf32(False)
    def attacked(self, model: str, set_name: str, row: AttackRow, batch: Batch) -> Seen:
        """The images of an attack on a model. Raises UserError if what it puts out is not finite."""
        network = self.network(model)
        distance, x = torch.zeros(len(batch), device=self.device), batch.x_BCHW
        base = row.name.split(ON_CURVE)[0]  # a curve starts all its searches at the same places of their balls
        if isinstance(row, CorruptionRow):
            draws = Draws(self.config.seed, batch.id, f"evaluation/{row.kind}")
            x = corruptions.corrupt(x, row.kind, row.severity, draws)
        elif isinstance(row, AutoAttackRow):
            x, distance = autoattack.run(network, batch, row, self.config.seed)
        elif not isinstance(row, CleanRow):
            threat = threats.build(row, self.generator)
            purpose = f"evaluation/{set_name}/{base}"
            view = self.seen_by_attacks(model)
            found = attack(view, threat, batch, row, seed=self.config.seed, purpose=purpose, judge=network)
            x, distance = found.x_BCHW, threat.distance(batch, found.theta)
        return Seen(x, self.logits(model, x), distance)

    @tf32(False)
    def logits(self, model: str, x_BCHW: Tensor) -> Tensor:
        """What a model says of images, in float32. Raises UserError for what is no logit a class, or not finite."""
        network, count = self.network(model), len(self.data.class_names)
        with torch.no_grad():
            logits: Tensor = network(x_BCHW).float()
        if logits.shape != (len(x_BCHW), count):
            raise UserError(f"model '{model}' puts out {list(logits.shape)} for {len(x_BCHW)} images of {count} classes")
        if not bool(torch.isfinite(logits).all()):
            raise NotFiniteError(f"model '{model}' puts out values that are not finite")
        return logits

    @tf32(False)
    def table(self, unit: Unit) -> pa.Table:
        """The rows of a unit; of a row in `transfer` also what all other models say of its images."""
        began, row = time.monotonic(), self.rows[unit.attack]
        batch = self.batch(unit.positions, unit.set)
        seen = self.attacked(unit.model, unit.set, row, batch)
        lpips = None
        if self._perceptual is not None:
            with torch.no_grad():
                lpips = self._perceptual.distance(seen.x_BCHW, self._perceptual.features(batch.x_BCHW))
        shared = {"source": unit.model, "set": unit.set, "attack": unit.attack, "seed": self.config.seed}
        shared["seconds"] = (time.monotonic() - began) / len(batch)
        tables = []
        for judge in self.models if unit.attack in self.config.transfer else (unit.model,):
            logits = seen.logits_BK if judge == unit.model else self.logits(judge, seen.x_BCHW)
            clean = self.logits(judge, batch.x_BCHW).argmax(dim=1)
            tables.append(_table(batch, {"model": judge, **shared}, clean, logits, seen, lpips))
        return pa.concat_tables(tables)


def _table(
    batch: Batch, shared: dict[str, Any], clean_B: Tensor, logits_BK: Tensor, seen: Seen, lpips_B: Tensor | None
) -> pa.Table:
    prediction = logits_BK.argmax(dim=1)
    own = logits_BK.gather(1, batch.y_B[:, None]).squeeze(1)
    others = logits_BK.scatter(1, batch.y_B[:, None], -torch.inf).amax(dim=1)
    moved = (seen.x_BCHW - batch.x_BCHW).flatten(1)
    columns: dict[str, Any] = {
        **{name: [value] * len(batch) for name, value in shared.items()},
        "id": list(batch.id),
        "label": batch.y_B,
        "clean_prediction": clean_B,
        "prediction": prediction,
        "correct": prediction == batch.y_B,
        "loss": nn.functional.cross_entropy(logits_BK, batch.y_B, reduction="none"),
        "margin": own - others,
        "distance": seen.distance_B,
        "linf": moved.abs().amax(dim=1),
        "l2": moved.norm(dim=1),
        "lpips": [None] * len(batch) if lpips_B is None else lpips_B,
    }
    arrays = {k: v.detach().cpu().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()}
    return pa.table({name: arrays[name] for name in SCHEMA.names}, schema=SCHEMA)


def _perceptual(config: EvaluationConfig) -> "Perceptual":
    from dmat_ray.networks.perceptual import Perceptual  # lpips takes seconds to import, which most evaluations do without

    return Perceptual(config.lpips, config.lpips_weights, setting="evaluation.lpips_weights")


def require_fit(run: Mapping[str, Any], manifest: Mapping[str, Any], model: str, config: EvaluationConfig) -> None:
    """Raise UserError unless a model's classes and image shape are those of the set.

    And for a program that would be attacked in bfloat16: constants and types of its graph are those that it was exported with.
    """
    shape, classes = manifest["shapes"]["on_manifold"], manifest["class_names"]
    if run["class_names"] != classes:
        raise UserError(f"model '{model}' knows the classes {', '.join(run['class_names'])}, the set has {', '.join(classes)}")
    if [run["channels"], run["resolution"], run["resolution"]] != shape:
        raise UserError(
            f"model '{model}' takes {run['channels']}x{run['resolution']}x{run['resolution']} images, the set has {shape}"
        )
    if "program" in run and config.precision == "bf16" and any(isinstance(row, Row) for row in config.attacks):
        raise UserError(
            f"model '{model}' is a program ({run['program']}), which computes in the precision that it was exported in, and "
            "evaluation.precision is bf16; give --evaluation.precision float32"
        )


def left_out(manifest: dict[str, Any]) -> str:
    """What a table of a set does not show: how many test images it is not of, and which classes; '' for none."""
    every = manifest["splits"].get("test", 0)
    poor = every - manifest["usable"].get("test", 0)
    lost = lost_classes(manifest, "test")
    images = (
        f"{poor} of {every} test images were projected poorly (projection.poor_l1) and are left out, natural ones too: numbers "
        "are of images that the generator can make"
    )
    classes = f"no number says anything of {named_classes(lost)}, of which no test image is usable"
    return "; ".join([*([images] if poor else []), *([classes] if lost else [])])


def require_suite(config: EvaluationConfig, manifest: Mapping[str, Any]) -> None:
    """Raise UserError for a row that the set's classes or images do not allow, or whose weights are not there.

    And for a summary of what is no whole column, which the settings of older models may have.
    """
    _require_whole_columns(config)
    shape, count = manifest["shapes"]["on_manifold"], len(manifest["class_names"])
    one = Batch(["blank"], torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64))  # no row asks what is on the image
    size = " x ".join(map(str, shape))
    for row in config.attacks:
        try:
            _try(row, one, count, config.seed)
        except (UserError, RuntimeError) as error:
            raise UserError(f"attack '{row.name}' on {size} images of {count} classes: {first_line(error)}") from None
    if config.lpips != "none":
        from dmat_ray.networks.perceptual import SMALLEST

        if (side := one.x_BCHW.shape[2]) < SMALLEST:
            raise UserError(f"LPIPS needs images of {SMALLEST} pixels or more, the set's have {side}; set evaluation.lpips none")
        _perceptual(config).features(one.x_BCHW)


def _require_whole_columns(config: EvaluationConfig) -> None:
    grouped = {row.name: group for row in config.attacks if (group := group_of(row))}
    for summary in config.summaries:
        for name in (name for name in summary.of if name in grouped):
            told = f"'{name}', which meets only what its group leaves to it"
            raise UserError(f"evaluation.summaries: {summary.name} names {told}; name the group '{grouped[name]}'")


def _try(row: AttackRow, one: Batch, num_classes: int, seed: int) -> None:
    """The parts of an attack that may not fit, as far as they need neither a model nor the generator."""
    draws = Draws(seed, one.id, "evaluation/try")
    if isinstance(row, AutoAttackRow):
        autoattack.require_fit(row, num_classes)
    elif isinstance(row, CorruptionRow):
        corruptions.corrupt(one.x_BCHW, row.kind, row.severity, draws)
    elif isinstance(row, Row):
        logits = one.x_BCHW.new_zeros(1, num_classes)
        for loss in losses_of(lambda x: logits, one, row):  # type: ignore[arg-type]  # a network that says nothing
            loss(logits)
        require_possible(row, one, draws)


def evaluate_here(evaluator: Evaluator, positions: np.ndarray | None = None) -> pa.Table:
    """All rows of a suite, in this process, one unit after the other."""
    config, ids = evaluator.config, evaluator.data.id
    where = chosen(ids, config) if positions is None else positions
    rows = SCHEMA.empty_table()
    for names in rounds(config):
        work = units(evaluator.models, names, config, still_standing(rows, config, ids, where))
        rows = pa.concat_tables([rows, *(evaluator.table(unit) for unit in work)])
    return in_order(rows)
