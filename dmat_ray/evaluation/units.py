"""What an evaluation consists of: rows of a suite, in rounds, cut into units of work that are named by all they depend on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmat_ray.config import ON_CURVE, ON_MANIFOLD, AttackRow, CleanRow, EvaluationConfig
from dmat_ray.rng import derive
from dmat_ray.storage import at
from dmat_ray.storage.files import sha256, text_digest
from dmat_ray.storage.folders import fetched

VERSION = 8  # of rows and measurements; another makes all files of units anew
CLEAN = "clean"


@dataclass(frozen=True)
class Unit:
    """A unit of work: one row of the suite against one model, for the examples at `positions` of one test set.

    With `checks`, what `probes.probe` measures of the row, or without an attack of the model itself; with `gallery`, what
    `gallery.draw` draws of it.
    """

    model: str
    set: str
    attack: str
    positions: tuple[int, ...]
    checks: bool = False
    gallery: bool = False

    @property
    def is_json(self) -> bool:
        """Whether it gives plain values, and no rows."""
        return self.checks or self.gallery

    def to_json(self) -> str:
        """For another process; `Unit.from_json` is the inverse."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Unit":
        values = json.loads(text)
        return Unit(**{**values, "positions": tuple(values["positions"])})


def group_of(row: AttackRow) -> str:
    """The group that a row belongs to, or nothing."""
    return str(getattr(row, "group", ""))


def curve_name(name: str, eps: float) -> str:
    """What a row is called at another eps of its curve."""
    return f"{name}{ON_CURVE}{eps:.4g}"


def is_on_curve(name: str) -> bool:
    """Whether `curve_name` made this name."""
    return ON_CURVE in name


def rows_to_run(config: EvaluationConfig) -> dict[str, AttackRow]:
    """All rows by name: the suite's, those of its curves, and the clean one that everything is compared with."""
    rows: dict[str, AttackRow] = {}
    if not any(isinstance(row, CleanRow) for row in config.attacks):
        rows[CLEAN] = CleanRow(name=CLEAN)
    for row in config.attacks:
        rows[row.name] = row
        for eps in dict.fromkeys(getattr(row, "curve", ())):
            if eps == row.eps:  # type: ignore[union-attr]  # only rows with eps have curves
                continue
            share = eps / row.eps if row.eps else 1.0  # type: ignore[union-attr]  # only rows with eps have curves
            step = getattr(row, "step_size", None)
            changes = {"name": curve_name(row.name, eps), "eps": eps, "curve": ()}
            # a step in the threat's own units is as long at any eps
            changes |= {} if step is None or not row.step_in_eps else {"step_size": step * share}  # type: ignore[union-attr]
            rows[changes["name"]] = row.model_copy(update=changes)
    return rows


def rounds(config: EvaluationConfig) -> list[list[str]]:
    """Names of rows in the order in which they can run: rows of a group one after the other, and after all that have none."""
    rows = rows_to_run(config)
    alone = [name for name, row in rows.items() if not group_of(row)]
    groups: dict[str, list[str]] = {}
    for name, row in rows.items():
        if group := group_of(row):
            groups.setdefault(group, []).append(name)
    deepest = max((len(names) for names in groups.values()), default=0)
    return [alone, *([names[k] for names in groups.values() if k < len(names)] for k in range(deepest))]


def chosen(ids: Sequence[str], config: EvaluationConfig) -> np.ndarray:
    """Positions of the examples to evaluate: all, or `limit` of them, drawn by the seed and each one's id."""
    if config.limit is None or config.limit >= len(ids):
        return np.arange(len(ids))
    lots = np.array([derive(config.seed, "evaluation/limit", id) for id in ids])
    return np.sort(np.argsort(lots)[: config.limit])


def applies(row: AttackRow, set_name: str) -> bool:
    """Whether a row can be run on a test set: natural images have no w."""
    return set_name == "on_manifold" or not isinstance(row, ON_MANIFOLD)


def units(
    models: Sequence[str], names: Sequence[str], config: EvaluationConfig, standing: Callable[[str, str, str], np.ndarray]
) -> list[Unit]:
    """The units of a round. `standing(model, set, attack)` gives the positions that the attack meets."""
    rows, work = rows_to_run(config), []
    of, parts = np.array([], dtype=int), list[tuple[int, ...]]()
    for model in models:
        for set_name in config.sets:
            for name in names:
                if applies(rows[name], set_name):
                    positions = standing(model, set_name, name)
                    if positions is not of:  # rows of no group meet the same ones, of which there may be millions
                        of, numbers = positions, positions.tolist()
                        parts = [tuple(numbers[i : i + config.batch_size]) for i in range(0, len(numbers), config.batch_size)]
                    work += [Unit(model, set_name, name, part) for part in parts]
    return work


def still_standing(rows: pa.Table, config: EvaluationConfig, ids: Sequence[str], positions: np.ndarray) -> Any:
    """For `units`: all of `positions` for a row of no group, else those right on clean images and under its group so far."""
    suite = rows_to_run(config)
    clean = next(name for name, row in suite.items() if isinstance(row, CleanRow))
    counted = pa.array([name for name, row in suite.items() if name == clean or group_of(row)], pa.string())
    broken = pc.and_(pc.invert(rows["correct"]), pc.equal(rows["model"], rows["source"]))
    rows = rows.filter(pc.and_(broken, pc.is_in(rows["attack"], value_set=counted)))
    columns = (rows[name].to_pylist() for name in ("model", "set", "attack", "id"))
    fallen: dict[tuple[str, str, str], set[str]] = {}
    for model, set_name, name, id in zip(*columns, strict=True):
        fallen.setdefault((model, set_name, CLEAN if name == clean else group_of(suite[name])), set()).add(id)

    def standing(model: str, set_name: str, name: str) -> np.ndarray:
        if not (group := group_of(suite[name])):
            return positions
        out = fallen.get((model, set_name, CLEAN), set()) | fallen.get((model, set_name, group), set())
        return np.array([p for p in positions if ids[p] not in out], dtype=int)

    return standing


def weights_of(config: EvaluationConfig) -> dict[str, str]:
    """Digests of the files of weights that the settings name, here or in an object store; one that is not there has none."""
    rows = rows_to_run(config).values()
    named = {path for path in (config.lpips_weights, *(getattr(row, "weights", "") for row in rows)) if path}
    return {path: sha256(fetched(path)) for path in sorted(named - {"pretrained", "random"}) if at(path).is_file()}


def key_of(unit: Unit, config: EvaluationConfig, facts: dict[str, Any]) -> str:
    """Names what a unit gives: changes with all that it depends on. `facts` say what the set, models and `weights_of` are."""
    settings = rows_to_run(config)[unit.attack].model_dump(mode="json", exclude={"curve"}) if unit.attack else None
    crossed = unit.attack in config.transfer and not unit.is_json
    models = facts["models"] if crossed else {unit.model: facts["models"][unit.model]}
    about = {name: value for name, value in asdict(unit).items() if name != "gallery" or value}  # as before there were any
    seen = {"version": VERSION, "unit": about, "row": settings, "models": models, "seed": config.seed}
    seen |= {"precision": config.precision, "lpips": [config.lpips, config.lpips_weights]}
    used = {config.lpips_weights, (settings or {}).get("weights")}
    seen["weights"] = {path: digest for path, digest in facts.get("weights", {}).items() if path in used}
    others = {k: v for k, v in facts.items() if k not in ("models", "weights")}
    return text_digest(json.dumps({**seen, **others}, sort_keys=True))
