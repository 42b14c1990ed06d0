"""Rows of a study (`benchmarks/study.py`), by method and seed, in its own folder or packed."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from study_claims import Claim
from study_methods import KEPT_VERSIONS, KINDS, OF_VERSION, TABLE, WORST, are_kept, versions_of, worst_case

from dmat_ray.data.sources import NAMED
from dmat_ray.errors import UserError
from dmat_ray.evaluation.intervals import Estimate
from dmat_ray.evaluation.metrics import Results
from dmat_ray.storage.files import read_json
from dmat_ray.validated import validate

KEPT = ["model", "source", "set", "attack", "id", "label", "prediction", "correct"]


class Study:
    """A study's rows, by method and seed."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "rows").is_dir():
            raise UserError(f"there are no rows in '{folder}'; run benchmarks/study.py")
        self.folder, self.notes = folder, read_json(folder / "study.json")
        self.config = validate(yaml.safe_load((folder / "settings.yaml").read_text()))
        self.results = self._read("rows", {})
        self.clean = self._read("clean", {"suites": [], "attacks": [{"threat": "clean", "name": "clean"}]})
        self.worst: Results | None = None
        if (folder / "worst").is_dir():
            self.worst = self._read("worst", {"suites": [], "attacks": worst_case(self.config.evaluation)})
        names = [name.rsplit("-", 1) for name in self.results.models if name in self.clean.models]
        self.seeds = {method: sorted(int(s) for m, s in names if m == method) for method, _ in names}
        looks = folder / "looks.yaml"
        self.looks: int = yaml.safe_load(looks.read_text())["looks"] if looks.is_file() else 1

    def _read(self, kind: str, settings: dict[str, Any]) -> Results:
        files = sorted((self.folder / kind).glob("*.parquet"))
        if not files:
            raise UserError(f"there are no rows in '{self.folder / kind}'; run benchmarks/study.py")
        evaluation = self.config.evaluation.model_dump(mode="json")
        evaluation |= {**({"summaries": [], "transfer": []} if settings else {}), **settings}
        config = validate({**self.config.to_json(), "evaluation": evaluation}).evaluation
        return Results(pa.concat_tables([pq.read_table(file) for file in files]), config)

    @cached_property
    def methods(self) -> list[str]:
        """Those of the main tables, in their order."""
        return [method for method in TABLE if method in self.seeds]

    def of_examples(self, method: str, seed: int, set_name: str, column: str) -> np.ndarray:
        """Right or not, of each example; `clean` of all test images."""
        return self._results(column).per_example(f"{method}-{seed}", set_name, column)

    def _results(self, column: str) -> Results:
        return self.clean if column == "clean" else self.results

    def cell(self, method: str, set_name: str, column: str, seeds: Sequence[int] | None = None) -> Estimate:
        """Of all models of a method, or of some. Raises UserError if they were evaluated on different images."""
        chosen = self.seeds[method] if seeds is None else seeds
        return self._results(column).over_trainings([f"{method}-{seed}" for seed in chosen], set_name, column)

    def columns(self, set_name: str) -> list[str]:
        """Those whose cells are means over examples."""
        return self.results.means(set_name)

    def shared(self, claim: Claim) -> list[int]:
        """Seeds that both methods of a claim have."""
        return sorted(set(self.seeds.get(claim.better, ())) & set(self.seeds.get(claim.than, ())))

    def difference(self, claim: Claim, set_name: str) -> Estimate | None:
        """Of two methods, on the seeds that both have; None if there are none. Raises UserError like `cell`."""
        both = self.shared(claim)
        better, than = ([f"{method}-{seed}" for seed in both] for method in (claim.better, claim.than))
        return self._results(claim.column).difference_over_trainings(better, than, set_name, claim.column) if both else None

    def worst_of_others(self, method: str, seed: int, set_name: str) -> np.ndarray:
        """What stands every attack, of the test images that `results` has not."""
        assert self.worst is not None
        model = f"{method}-{seed}"
        others = ~np.isin(self.worst.ids(model, set_name), self.results.ids(self.results.models[0], set_name))
        found: np.ndarray = self.worst.per_example(model, set_name, WORST)[others]
        return found


def pack(folder: Path, target: Path) -> None:
    """All rows of a kind in one file, the columns that numbers are made of; settings without paths; notes.

    What the target has of other models stays, if it is of the same settings, else UserError.
    """
    values = yaml.safe_load((folder / "settings.yaml").read_text())
    data = {"source": values["data"]["source"]} if values["data"]["source"] in NAMED else {}
    if seed := values["data"].get("seed"):  # all that tells a study from one that is done again
        data["seed"] = seed
    slim = {
        "evaluation": values["evaluation"],
        "data": data,
        "training": values["training"],
        "objective": values["objective"],
    }
    before = target / "settings.yaml"
    if before.is_file() and validate(yaml.safe_load(before.read_text())) != validate(slim):
        raise UserError(f"'{target}' holds rows of other settings; pack into another folder")
    for kind in KINDS:
        if files := sorted((folder / kind).glob("*.parquet")):
            (target / kind).mkdir(parents=True, exist_ok=True)
            rows = pa.concat_tables([pq.read_table(file).select(KEPT) for file in files])
            if any(not are_kept(file) for file in files):
                odd = frozenset().union(*map(versions_of, files)) - KEPT_VERSIONS
                told = f"of version {', '.join(map(str, sorted(odd)))}" if odd else "older"
                raise UserError(
                    f"some rows in '{folder / kind}' are {told}; run benchmarks/study.py again, which makes them anew"
                )
            held = list(files)
            if (packed := target / kind / "all.parquet").is_file():
                old = pq.read_table(packed)
                others = old.filter(pc.invert(pc.is_in(old["source"], value_set=pc.unique(rows["source"]))))
                rows = pa.concat_tables([others, rows])
                held += [packed] if others.num_rows else []
            # of many models, of which each file said its own
            said = [versions_of(file) for file in held]
            about = {OF_VERSION: ",".join(map(str, sorted(frozenset().union(*said))))} if all(said) else {}
            pq.write_table(rows.replace_schema_metadata(about), packed, compression="zstd")
    before.write_text(yaml.safe_dump(slim))
    notes = {name: note for name, note in read_json(folder / "study.json").items() if name != "generator"}
    old_notes = read_json(target / "study.json") if (target / "study.json").is_file() else {}
    (target / "study.json").write_text(json.dumps({**old_notes, **notes}, indent=1) + "\n")
