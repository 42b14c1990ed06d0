"""Evaluation on Ray Data actor pools: units of work out, their rows into files, and the whole from those files.

A unit's file is named by all that its rows depend on, and appears whole or not at all. That is the whole of resume: what is there
is not done again, whatever was killed, and an attack that is added to a suite is the only one that runs.
"""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch

from dmat_ray.cluster import gauges, pools, session
from dmat_ray.cluster.forecast import progress
from dmat_ray.config import AutoAttackRow, Config
from dmat_ray.data import manifold_set, set_reader
from dmat_ray.errors import UserError
from dmat_ray.estimate import AUTOATTACK
from dmat_ray.evaluation import checks, evaluation, probes, units
from dmat_ray.evaluation.checks import Finding
from dmat_ray.evaluation.evaluated import CHECKS, DONE, LEFT_OUT, ROWS, read_parquet
from dmat_ray.evaluation.evaluation import Evaluator
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.row_order import PIECE, in_order, pieces
from dmat_ray.evaluation.units import Unit
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint
from dmat_ray.reports import gallery
from dmat_ray.storage import READERS, Location, Place, at
from dmat_ray.storage.files import T, awaited
from dmat_ray.storage.lease import Lease

UNITS = "units"


class UnitEvaluator:
    """An actor: attacks one model on some examples. Models and the examples of the set are read once, from their folders.

    Files are named by what these held when the work was begun (`facts`), so what was replaced since is an error, before it has
    written any.
    """

    @pools.patient_start
    def __init__(
        self, config: dict[str, Any], set_path: str, models: dict[str, str], folder: str, facts: Mapping[str, Any]
    ) -> None:
        settings = Config.model_validate(config)
        torch.set_num_threads(settings.cluster.threads_per_worker)
        self.folder, device = at(folder), session.device_of_actor()

        def load(name: str) -> torch.nn.Module:
            network = checkpoint.load_classifier(models[name], device)[0]
            if checkpoint.digest(models[name]) != facts["models"][name]:
                raise UserError(
                    f"model '{name}' is another on {platform.node()} than when the evaluation began: it was replaced meanwhile "
                    "(run the same again), or the package of its network is another there than the driver's"
                )
            return network

        ids = manifold_set.usable(set_path, "test")["id"].to_pylist()
        self.positions = units.chosen(ids, settings.evaluation)
        sets = settings.evaluation.sets
        data = manifold_set.open_set(
            set_path, "test", only=[ids[i] for i in self.positions], images=sets[0] if len(sets) == 1 else None
        )
        _require_same(set_reader.digest(set_reader.read_manifest(set_path)), facts["set"])
        generator = generators.load_configured(settings.generator, device)
        self.evaluator = Evaluator(settings.evaluation, data, generator, load, list(models), device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, text in zip(batch["name"], batch["unit"], strict=True):
            unit = Unit.from_json(text)
            # in the split's order, of which only those that are evaluated are here
            unit = replace(unit, positions=tuple(np.searchsorted(self.positions, unit.positions).tolist()))
            if unit.checks:
                (self.folder / name).write_json(probes.probe(self.evaluator, unit))
            elif unit.gallery:
                (self.folder / name).write_json(gallery.draw(self.evaluator, unit))
            else:
                (self.folder / name).write_bytes(_as_parquet(self.evaluator.table(unit)))
        return {"name": batch["name"]}


def _require_same(now: Any, then: Any) -> None:
    if now != then:
        raise UserError("the set or a model was replaced while it was evaluated; run the same again")


def _as_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())


def fingerprint(config: Config, set_path: Location, models: Mapping[str, Place]) -> dict[str, Any]:
    """What the rows depend on."""
    return {
        "version": units.VERSION,
        "evaluation": config.evaluation.model_dump(mode="json"),
        "generator_precision": config.generator.precision,
        "weights": units.weights_of(config.evaluation),
        "set": set_reader.digest(set_reader.read_manifest(set_path)),
        "models": {name: checkpoint.digest(path) for name, path in models.items()},
    }


def check(config: Config, set_path: Location, models: Mapping[str, Place]) -> None:
    """Raise UserError for a set, generator or model that is missing or does not fit the others. Needs no Ray."""
    manifest = set_reader.read_manifest(set_path)
    set_reader.require_usable(manifest, set_path, "test")
    set_reader.require_generator(manifest, generators.fingerprint(config.generator.path), f"the set '{set_path}'")
    evaluation.require_suite(config.evaluation, manifest)
    for name, path in models.items():
        _, run = checkpoint.load_classifier(path)
        evaluation.require_fit(run, manifest, name, config.evaluation)


class Work:
    """The units of an evaluation and their files, in `folder`; `made_for` is its `fingerprint`, if that is known.

    It lists the test split and knows the models by what is in their files, which takes a while: one serves all that is done.
    """

    def __init__(
        self,
        config: Config,
        set_path: Location,
        models: Mapping[str, Place],
        folder: Location,
        made_for: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.set_path, self.models, self.folder, self.files = config, set_path, models, folder, folder / UNITS
        self.listed = manifold_set.usable(set_path, "test")
        self.ids = self.listed["id"].to_pylist()
        self.positions = units.chosen(self.ids, config.evaluation)
        self.rows = units.rows_to_run(config.evaluation)
        self.made_for = fingerprint(config, set_path, models) if made_for is None else made_for
        self.facts = {k: v for k, v in self.made_for.items() if k != "evaluation"}

    def name(self, unit: Unit) -> str:
        """A unit's file."""
        return f"{units.key_of(unit, self.config.evaluation, self.facts)}.{'json' if unit.is_json else 'parquet'}"

    def cost(self, unit: Unit) -> float:
        """About what a unit takes, in passes through the model: examples times the steps of its row."""
        row = self.rows.get(unit.attack)
        if isinstance(row, AutoAttackRow):
            return len(unit.positions) * sum(AUTOATTACK[row.part])
        searches = getattr(row, "restarts", 1) * max(1, getattr(row, "targets", 0))
        return len(unit.positions) * (1.0 + searches * getattr(row, "steps", 0))

    def pictures(self) -> list[Unit]:
        """The units of the report's gallery."""
        return gallery.units(list(self.models), self.config.evaluation, self.listed["label"].to_numpy(), self.positions)

    def left(self, all_units: Sequence[Unit]) -> list[Unit]:
        """Those of some units that are still to be done."""
        with ThreadPoolExecutor(READERS) as pool:
            return [unit for unit, done in zip(all_units, pool.map(self.is_done, all_units), strict=True) if not done]

    def table(self, unit: Unit) -> pa.Table | None:
        """A unit's rows, if they are there and whole."""
        try:
            return read_parquet(self.files / self.name(unit)).cast(evaluation.SCHEMA)
        except (FileNotFoundError, pa.ArrowException, OSError):
            return None

    def values(self, unit: Unit) -> dict[str, Any] | None:
        """What a unit gave that is no rows, if it is there and whole."""
        try:
            found: dict[str, Any] = (self.files / self.name(unit)).read_json()
        except (FileNotFoundError, UserError):
            return None
        return found

    def is_done(self, unit: Unit) -> bool:
        """Whether a unit's file is there and can be read."""
        return (self.values(unit) if unit.is_json else self.table(unit)) is not None

    def all_of(self, done: Sequence[Unit], read: Callable[[Unit], T | None]) -> list[T]:
        """What units that are done gave. Raises UserError for files that do not show here in `files.VISIBLE_S`."""
        found: dict[Unit, T] = {}

        def look() -> bool | None:
            missing = [unit for unit in done if unit not in found]
            with ThreadPoolExecutor(READERS) as pool:
                read_now = zip(missing, pool.map(read, missing), strict=True)
                found.update({unit: one for unit, one in read_now if one is not None})
            return len(found) == len(set(done)) or None

        if awaited(look) is None:
            raise UserError(
                f"{len(set(done)) - len(found)} files that were written cannot be seen in '{self.files}': output must be a "
                "folder that all nodes share"
            )
        return [found[unit] for unit in done]

    def tables(self, done: Sequence[Unit]) -> Iterator[pa.Table]:
        """The rows of units that are done, as `all_of`, of which few are held at a time."""
        for begin in range(0, len(done), PIECE):
            yield from self.all_of(done[begin : begin + PIECE], self.table)

    def run(self, todo: Sequence[Unit]) -> Iterator[Unit]:
        """Units as they are done, in no order."""
        cluster = self.config.cluster
        actors = min(cluster.evaluation_actors, len(todo))
        by_name = {self.name(unit): unit for unit in todo}
        items = [{"name": name, "unit": unit.to_json()} for name, unit in by_name.items()]
        with pools.patient():
            results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                UnitEvaluator,
                fn_constructor_kwargs={
                    "config": self.config.to_json(),
                    "set_path": str(self.set_path),
                    "models": {k: str(v) for k, v in self.models.items()},
                    "folder": str(self.files),
                    "facts": self.facts,
                },
                batch_size=1,
                num_cpus=cluster.threads_per_worker,
                num_gpus=cluster.gpus_per_worker or None,
                compute=ray.data.ActorPoolStrategy(min_size=actors, max_size=actors, initial_size=actors),
            )
        for row in results.iter_rows():
            yield by_name[row["name"]]


def evaluate(
    work: Work,
    say: Callable[[str], None],
    lease: Lease | None = None,
    *,
    pictures: bool = False,
    of_rows: Sequence[Location] = (),
) -> tuple[pa.Table, list[Finding]]:
    """Rows of every model, test set and attack, and what the checks found, after `check`; also written to the work's folder.

    What an earlier evaluation left there stays until all rows are known; then the files of `of_rows`, which must not pass for
    those of others, go with it. With `pictures` also what `read_pictures` needs, along with the rest.
    Ray must be connected. Raises UserError if another run has taken over the folder's `lease`.
    """
    settings, models = work.config.evaluation, list(work.models)
    if left_out := evaluation.left_out(set_reader.read_manifest(work.set_path)):
        say(left_out)
    rows, looks = evaluation.SCHEMA.empty_table(), probes.units(models, settings, work.positions)
    rounds, first = units.rounds(settings), [*looks, *(work.pictures() if pictures else [])]
    for set_name in settings.sets:
        if without := [row.name for row in settings.attacks if not units.applies(row, set_name)]:
            say(f"on {set_name} images, which have no w, there is no {', '.join(without)}")
    for number, names in enumerate(rounds):
        standing = units.still_standing(rows, settings, work.ids, work.positions)
        attacks = units.units(models, names, settings, standing)
        both = [*attacks, *(first if number == 0 else [])]
        todo = work.left(both)
        what = f"round {number + 1} of {len(rounds)}: " if len(rounds) > 1 else ""
        if len(todo) < len(both):
            say(f"{what}{len(both) - len(todo)} of {len(both)} batches are there")
        if todo:
            _run_all(work, todo, what, say)
        rows = pa.concat_tables([rows, *pieces(work.tables(attacks))])
        work.all_of(first if number == 0 else [], work.values)
    rows = in_order(rows)
    measurements = probes.joined(zip(looks, work.all_of(looks, work.values), strict=True))
    findings = checks.judge(Results(rows, settings), measurements)
    _require_same(fingerprint(work.config, work.set_path, work.models), work.made_for)
    if lease is not None:
        lease.check()
    for file in (*of_rows, work.folder / DONE):
        file.unlink()
    (work.folder / ROWS).write_bytes(_as_parquet(rows))
    (work.folder / CHECKS).write_json({"measurements": measurements, "findings": [f.to_json() for f in findings]})
    (work.folder / DONE).write_json({**work.made_for, LEFT_OUT: left_out})
    return rows, findings


def lacks_pictures(work: Work) -> bool:
    """Whether some of the gallery of an evaluation that is there is still to be made."""
    return bool(work.left(work.pictures()))


def read_pictures(work: Work, say: Callable[[str], None]) -> dict[str, Any]:
    """The report's gallery, of which what `lacks_pictures` is made first, for which Ray must be connected."""
    if todo := work.left(work.pictures()):
        _run_all(work, todo, "images of the report: ", say)
    shown = work.pictures()
    drawn = zip(shown, work.all_of(shown, work.values), strict=True)
    return gallery.joined(drawn, work.config.evaluation, work.listed, set_reader.read_manifest(work.set_path))


def _run_all(work: Work, todo: Sequence[Unit], what: str, say: Callable[[str], None]) -> None:
    """Do these units, and say how far it is."""
    session.await_machines(work.config.cluster, say)
    actors = min(work.config.cluster.evaluation_actors, len(todo))
    say(f"{what}{len(todo)} batches for {actors} actors")
    with progress(sum(map(work.cost, todo)), actors, "batch", say) as far:
        for number, unit in enumerate(work.run(todo), 1):
            gauges.evaluated(unit.model)
            if far.done(work.cost(unit)):
                reached = f"{number}/{len(todo)} batches, {far.seconds:.0f} s{far.to_go()}"
                say(f"{what}{reached}; last {_told(unit)} on {unit.model}")


def _told(unit: Unit) -> str:
    return unit.attack or ("images" if unit.gallery else "checks")
