"""The study's scripts at a small size."""

import argparse
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from dmat_ray import presets
from dmat_ray.config import Config
from dmat_ray.data import manifold_set
from dmat_ray.data.pixels import quantise, to_unit
from dmat_ray.errors import UserError
from dmat_ray.evaluation.intervals import Estimate, estimate
from dmat_ray.evaluation.metrics import Results
from dmat_ray.evaluation.units import VERSION
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.storage import at
from dmat_ray.storage.files import read_json
from dmat_ray.validated import validate

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import release  # noqa: E402
import sampled_set  # noqa: E402
import study as study_script  # noqa: E402
import study_claims  # noqa: E402
import study_methods  # noqa: E402
import study_report  # noqa: E402
import study_rows  # noqa: E402

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def run(*command: str) -> str:
    """What a script of benchmarks/ prints."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("value", "half", "bound", "told"),
    [(3, 2, 0, "confirmed"), (3, 4, 0, "open"), (-3, 2, 0, "not confirmed"), (-0.5, 1, -2, "confirmed"),
     (-3, 2, -2, "open"), (-5, 2, -2, "not confirmed")],
)  # fmt: skip
def test_a_claim_is_settled_only_by_the_whole_interval(value: float, half: float, bound: float, told: str) -> None:
    assert study_claims.verdict(Estimate(value / 100, half / 100, 3), bound / 100) == told


def test_p_values_of_claims_made_together() -> None:
    # what R's p.adjust(p, "holm") gives
    assert study_claims.holm([0.01, 0.04, 0.02, 0.03, 0.05]) == pytest.approx([0.05, 0.09, 0.08, 0.09, 0.09])
    assert study_claims.holm([0.7, 0.0001, 0.6]) == pytest.approx([1.0, 0.0003, 1.0])
    # of claims none of which is true one in twenty families has one that seems so
    rng = np.random.default_rng(0)
    seems = [min(study_claims.holm(list(rng.random(15)))) < 0.05 for _ in range(4000)]
    assert 0.04 < np.mean(seems) < 0.06


@pytest.mark.parametrize(("spread", "low", "high"), [(0.02, 0.0, 0.05), (0.1, 0.08, 0.2)])
def test_how_often_a_family_of_true_nothings_has_one_that_seems_so(spread: float, low: float, high: float) -> None:
    """24 claims of three pairs of models on 100 images; in every other one seeds differ by `spread`."""
    rng = np.random.default_rng(0)

    def seems() -> bool:
        found = []
        for k in range(24):
            pairs = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=(3, 100))
            found.append(estimate(list(pairs + rng.normal(0, spread if k % 2 else 0.01, (3, 1)))))
        return min(study_claims.holm([one.chance(0.0) for one in found])) < 0.05

    assert low <= np.mean([seems() for _ in range(300)]) <= high


def without_a_later_setting(text: str) -> str:
    """Settings as they were before images were flipped."""
    assert "  flip: false\n" in text
    return text.replace("  flip: false\n", "")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, []),
        ({"output": "elsewhere", "generator": {"path": "pretrained", "precision": "fast"}}, ["generator.precision"]),
        ({"training": {"epochs": 3}, "evaluation": {"limit": 3}}, ["training.epochs", "evaluation.limit"]),
    ],
)
def test_other_settings_of_a_study_are_named(changed: dict[str, Any], named: list[str]) -> None:
    now = Config().to_json()
    before = yaml.safe_load(without_a_later_setting(yaml.safe_dump(now)))
    assert study_script._differences(before, presets.merge(now, changed)) == named


def test_a_term_that_is_gone_is_another_setting_of_a_study() -> None:
    now = Config().to_json()
    before = presets.merge(now, {"objective": {"more": {"extra": {"threat": "fog", "weight": 0.5}}}})
    told = study_script._differences(before, now)
    assert "objective.more.extra.weight" in told
    assert all(name.startswith("objective.more.extra.") for name in told)


@pytest.mark.exhaustive
def test_the_study_runs_goes_on_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "study"
    command = [
        "benchmarks/study.py", "--preset", "demo", "--output", str(output), "--data.train_limit", "60", "--data.test_limit", "20",
        "--projection.steps", "3", "--projection.lpips", "0", "--projection.poor_l1", "1", "--projection.candidates", "100",
        "--training.epochs", "1", "--training.lr_epochs", "0,1", "--training.lr_values", "0.05,0.01",
        "--training.val_examples", "0", "--evaluation.limit", "10", "--evaluation.check_examples", "0",
        "--processes", "2", "--seeds", "1", "--trained",
    ]  # fmt: skip
    run(*command, "standard")
    first = (output / "models" / "standard-0" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "more.yaml").write_text("at: {include: [at], objective: {image: {eps: 0.05}}}")
    (output / "settings.yaml").write_text(without_a_later_setting((output / "settings.yaml").read_text()))
    said = run(*command, "standard", "om_at_fgsm", "at", "--more-methods", str(tmp_path / "more.yaml"), "--worst-case")
    assert "om_at_fgsm-0: trained" in said
    assert checkpoint.read_run(at(output / "models" / "at-0"))["config"]["objective"]["image"]["eps"] == 0.05
    assert "standard-0: trained" not in said
    assert (output / "models" / "standard-0" / "model.safetensors").stat().st_mtime_ns == first
    step = checkpoint.read_run(at(output / "models" / "om_at_fgsm-0"))["config"]["objective"]["latent"]
    assert (step["steps"], step["step_size"]) == (1, pytest.approx(1.2 * 0.06))
    # all 20 test images, on the manifold and natural
    assert pq.read_table(output / "clean" / "standard-0.parquet").num_rows == 40

    packed_at = tmp_path / "packed" / "study"  # a folder says by its name which study it is
    study_rows.pack(output, packed_at)
    assert pq.read_schema(packed_at / "rows" / "all.parquet").metadata.keys() == {b"rows_version"}
    here, packed = study_rows.Study(output), study_rows.Study(packed_at)
    assert study_report.page(packed) == study_report.page(here)
    assert packed.worst is not None
    for model, set_name in (("at-0", "on_manifold"), ("at-0", "natural"), ("standard-0", "natural")):
        both = np.isin(packed.worst.ids(model, set_name), packed.results.ids(model, set_name))
        assert (both.sum(), len(both)) == (10, 20)
        worst = packed.worst.per_example(model, set_name, "worst")
        np.testing.assert_array_equal(worst[both], packed.results.per_example(model, set_name, "worst"))
        assert packed.worst_of_others(model.removesuffix("-0"), 0, set_name).tolist() == worst[~both].tolist()
    rows = pq.read_table(output / "rows" / "om_at_fgsm-0.parquet").to_pylist()
    right = [row["correct"] for row in rows if (row["set"], row["attack"]) == ("on_manifold", "PGD-20")]
    assert len(right) == 10
    assert packed.cell("om_at_fgsm", "on_manifold", "PGD-20").value == pytest.approx(np.mean(right))
    assert str(tmp_path) not in (packed_at / "settings.yaml").read_text()
    # models that are gone stay packed beside new ones
    for kind in ("rows", "clean"):
        (output / kind / "standard-0.parquet").unlink()
    study_rows.pack(output, packed_at)
    assert study_report.page(study_rows.Study(packed_at)) == study_report.page(packed)
    # as one that was packed before there was a setting
    (packed_at / "settings.yaml").write_text(without_a_later_setting((packed_at / "settings.yaml").read_text()))
    study_rows.pack(output, packed_at)
    (output / "settings.yaml").write_text((output / "settings.yaml").read_text().replace("limit: 10", "limit: 9"))
    with pytest.raises(UserError, match="rows of other settings"):
        study_rows.pack(output, packed_at)

    monkeypatch.setattr(sys, "argv", ["release.py", str(output), str(tmp_path / "released" / "study"), "om_at_fgsm"])
    release.main()
    listed = (tmp_path / "released" / "study" / "README.md").read_text()
    (line,) = [line for line in listed.splitlines() if line.startswith("| [om_at_fgsm](om_at_fgsm) | on-manifold")]
    every = pq.read_table(output / "clean" / "om_at_fgsm-0.parquet").to_pylist()
    clean = [row["correct"] for row in every if row["set"] == "on_manifold"]
    assert len(clean) == 20
    assert float(line.split("|")[3]) == pytest.approx(100 * np.mean(clean))
    assert (tmp_path / "released" / "study" / "om_at_fgsm" / "config.json").is_file()
    monkeypatch.setattr(sys, "argv", ["release.py", str(output), str(tmp_path / "released" / "study"), "dmat"])
    with pytest.raises(UserError, match="has no model dmat-0 with rows"):
        release.main()

    sampled = tmp_path / "sampled"
    argv = [
        "sampled_set.py",
        str(output / "on_manifold_set"),
        str(output / "models" / "standard-0"),
        str(sampled),
        "--count",
        "30",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    sampled_set.main()
    data = manifold_set.open_set(at(sampled), "train")
    mine = np.array([str(id).startswith("sample-") for id in data.id])
    assert (mine.sum(), (~mine).sum()) == (30, 60)
    classifier = checkpoint.load_classifier(at(output / "models" / "standard-0"), CPU)[0].eval()
    with torch.no_grad():
        images = quantise(generators.load_generator("mnist32").synthesis(torch.from_numpy(np.array(data.w[mine]))))
        assert classifier(to_unit(images)).argmax(1).tolist() == data.label[mine].tolist()
    assert np.abs(images.astype(int) - np.array(data.on_manifold[mine]).astype(int)).max() <= 1


def test_what_is_told_of_rows_made_anew_takes_the_place_of_what_was_told_before(tmp_path: Path) -> None:
    one = object.__new__(study_script._Study)
    one.folder, one.lock, one.device = tmp_path, threading.Lock(), CPU
    one.note("at-0 training", {})
    one.note("at-0 rows+clean+worst", {"rows_version": 6}, ["rows", "clean", "worst"])
    one.note("at-1 rows+clean", {"rows_version": 6}, ["rows", "clean"])
    one.note("at-0 rows+clean", {"rows_version": 7}, ["rows", "clean"])
    assert read_json(tmp_path / "study.json").keys() == {"at-0 training", "at-1 rows+clean", "at-0 rows+clean"}


def write_rows(path: Path, **about: str) -> None:
    """A file of rows that says this of itself."""
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(about), path)


def test_rows_of_an_older_version_are_made_anew(tmp_path: Path) -> None:
    config, given = validate({"output": str(tmp_path)}), argparse.Namespace(worst_case=False, autoattack=None)
    for kind, version in (("rows", min(study_methods.KEPT_VERSIONS) - 1), ("clean", VERSION)):
        write_rows(tmp_path / kind / "at-0.parquet", rows_version=str(version))
    assert list(study_script.evaluations(config, given, "at-0")) == ["rows"]
    write_rows(tmp_path / "clean" / "at-0.parquet")  # of no version
    assert list(study_script.evaluations(config, given, "at-0")) == ["rows", "clean"]


def test_what_is_packed_names_the_versions_of_all_its_rows(tmp_path: Path) -> None:
    """Also of those that were packed before, as long as there are any."""
    studied, target = tmp_path / "study", tmp_path / "packed"

    def pack(seed: int = 0, **versions: str) -> frozenset[int]:
        shutil.rmtree(studied, ignore_errors=True)
        studied.mkdir()
        (studied / "settings.yaml").write_text(yaml.safe_dump(validate({"data": {"seed": seed}}).to_json()))
        (studied / "study.json").write_text("{}")
        for model, version in versions.items():
            of_model = {name: [model if name in ("model", "source") else "x"] for name in study_rows.KEPT}
            (studied / "rows").mkdir(exist_ok=True)
            rows = pa.table(of_model).replace_schema_metadata({"rows_version": version} if version else {})
            pq.write_table(rows, studied / "rows" / f"{model}.parquet")
        study_rows.pack(studied, target)
        return study_methods.versions_of(target / "rows" / "all.parquet")

    assert pack(at="7", dmat="8") == {7, 8}
    assert study_methods.are_kept(target / "rows" / "all.parquet")
    assert pack(dmat="8") == {7, 8}
    assert pack(at="8", dmat="8") == {8}
    assert pack(om_at="7") == {7, 8}
    for odd, told in (("6", "of version 6"), ("", "older")):
        with pytest.raises(UserError, match=f"are {told}; run"):
            pack(at=odd, dmat="8")
    with pytest.raises(UserError, match="rows of other settings"):
        pack(seed=1, at="8")  # of another draw of images
    assert yaml.safe_load((target / "settings.yaml").read_text())["data"] == {"source": "mnist5k"}
    assert pq.read_table(target / "rows" / "all.parquet")["model"].to_pylist() == ["at", "dmat", "om_at"]
    for kind in ("rows", "clean"):  # what was packed before there was a second version
        assert study_methods.versions_of(ROOT / "benchmarks" / "results" / "mnist" / kind / "all.parquet") == {7}


def test_models_of_other_images_are_not_counted_together() -> None:
    study = study_rows.Study(ROOT / "benchmarks" / "results" / "mnist")
    rows = study.results.rows
    one = rows["id"][pc.index(rows["model"], "at-1").as_py()]
    odd = pc.and_(pc.equal(rows["source"], "at-1"), pc.equal(rows["id"], one))
    ids = pc.if_else(odd, "another", rows["id"])
    study.results = Results(rows.set_column(rows.schema.get_field_index("id"), "id", ids), study.results.config)
    claim = study_claims.Claim("", "dmat", "at", "PGD-50")
    assert study.cell("at", "natural", "PGD-50", [0, 2]).trainings == 2
    for counted in (lambda: study.cell("at", "natural", "PGD-50"), lambda: study.difference(claim, "natural")):
        with pytest.raises(UserError, match="'at-1' were evaluated on different images of 'natural'"):
            counted()


@pytest.mark.parametrize("first", [0, 5])
def test_autoattack_is_of_the_first_seed_also_in_the_process_that_runs_it(tmp_path: Path, first: int) -> None:
    one, commands = object.__new__(study_script._Study), list[list[str]]()
    parser = argparse.ArgumentParser()
    study_script._arguments(parser)
    asked = ["--first-seed", str(first), "--seeds", "2", "--trained", "at", "--autoattack", "digits_autoattack"]
    one.folder, one.lock, one.device, one.own_methods = tmp_path, threading.Lock(), CPU, {}
    one.given, one.config = parser.parse_args(asked), validate({"output": str(tmp_path)})
    one.settings = tmp_path / "settings.yaml"
    one._run = lambda command, log: commands.append(command) or 1.0  # type: ignore[method-assign, func-returns-value]
    one.models()
    found = {}
    for command in commands:
        given, _ = parser.parse_known_args(command)
        if given.evaluate:
            found[given.evaluate] = list(study_script.evaluations(one.config, given, given.evaluate))
    assert found == {f"at-{first}": ["rows", "clean", "autoattack"], f"at-{first + 1}": ["rows", "clean"]}


def test_rows_of_another_model_or_set_are_made_anew(tmp_path: Path, set_folder: Path, make_config: Callable[..., Config]) -> None:
    given = argparse.Namespace(worst_case=False, autoattack=None)
    suite = {"attacks": [{"threat": "clean"}], "sets": ["natural"], "limit": 3}
    config = make_config(output=str(tmp_path), manifold_set=str(set_folder), evaluation=suite)

    def train(seed: int) -> None:
        torch.manual_seed(seed)
        network = classifiers.build(config.classifier, 1, 3)
        run = checkpoint.describe_run(config, ("a", "b", "c"), 1, 8, "f" * 64, "e" * 64)
        checkpoint.save(tmp_path / "models" / "at-0", network, {**run, "finished": True})

    train(0)
    for kind, settings in study_script.evaluations(config, given, "at-0").items():
        study_script._evaluate(config, kind, settings, "at-0", CPU)
    assert study_script.evaluations(config, given, "at-0") == {}
    release._require_kept(tmp_path / "rows" / "at-0.parquet", tmp_path / "models" / "at-0")
    other = shutil.copytree(set_folder, tmp_path / "other")
    manifest = read_json(other / "manifest.json")
    (other / "manifest.json").write_text(json.dumps({**manifest, "means": {"l1": 0.5}}))
    elsewhere = config.model_copy(update={"manifold_set": str(other)})
    assert list(study_script.evaluations(elsewhere, given, "at-0")) == ["rows", "clean"]
    train(1)
    assert list(study_script.evaluations(config, given, "at-0")) == ["rows", "clean"]
    with pytest.raises(UserError, match=r"at-0\.parquet' is of another model than .*; run benchmarks/study.py again"):
        release._require_kept(tmp_path / "rows" / "at-0.parquet", tmp_path / "models" / "at-0")


def test_a_method_with_other_settings_names_every_folder_that_it_is_in(tmp_path: Path) -> None:
    one = object.__new__(study_script._Study)
    one.folder, one.own_methods, one.given = tmp_path, {"mine": {"a": 2}}, argparse.Namespace(autoattack=None)
    files = ("methods/mine.yaml", "models/mine-0/run.json", "clean/mine-0.parquet", "worst/mine-1.parquet", "rows/at-0.parquet")
    for path in files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("a: 1\n")
    with pytest.raises(UserError, match=r"'mine' .* with other settings; remove mine-\* from its folders models, clean, worst$"):
        one.models()


def test_the_page_says_of_which_versions_rows_are() -> None:
    told = {"a-0 training": {}, "a-0 rows+clean": {"rows_version": 7}, "b-0 rows+clean": {"rows_version": 7}}
    assert study_report.rows_versions(told).startswith("Rows are of version 7 (")
    assert study_report.rows_versions({**told, "c-0 rows": {"seconds": 1.0}}).startswith(
        "Rows are of version 7, some older than version 7 ("
    )
    assert study_report.rows_versions({"c-0 rows": {}}).startswith(f"Rows are older than version {study_report.VERSION} (")


def test_rows_of_before_are_cleared_from_a_folder_that_need_not_be_there(tmp_path: Path) -> None:
    """What benchmarks/results.sh does before it packs, hours after it has begun."""
    for kept in ("rows/all.parquet", "notes.md", "looks.yaml"):
        (tmp_path / "there" / kept).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / kept).write_text("x")
    script = (ROOT / "benchmarks" / "results.sh").read_text()
    function = script[script.index("older() {") : script.index("\n}\n") + 3]
    command = f'set -euo pipefail\n{function}older "$1/there"\nolder "$1/not there"\necho done'
    said = subprocess.run(["bash", "-c", command, "bash", str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert said == "done\n"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["looks.yaml", "notes.md"]
