"""Models and what is made of them in a real S3 store: whole or not there, and the same as in a folder."""

import json
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3
import torch
from disk_order import noted
from galleries import gallery_here
from tiny_page import EVALUATION, save_models

from dmat_ray import cli
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.evaluation.evaluation import Evaluator, evaluate_here
from dmat_ray.exchange import model_export
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers, weights
from dmat_ray.reports import report
from dmat_ray.storage import at, folders
from dmat_ray.storage.folders import fetched, put, replace_folder
from dmat_ray.storage.location import Location
from dmat_ray.training import trained_models

ROOT = "s3://folders/run"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as server:
        server.put("folders", {})
        yield server


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine keeps copies, empty at first."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder / f"dmat_ray_{os.getuid()}"


@pytest.fixture
def place(server: s3.Server, request: pytest.FixtureRequest) -> Location:
    return at(f"{ROOT}/{request.node.name}")


def filled(folder: Path, **files: str) -> Path:
    """A folder with these texts; their names end in .bin, but for `run`."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / (f"{name}.json" if name == "run" else f"{name}.bin")).write_text(text)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def keys(server: s3.Server, prefix: Location) -> list[str]:
    found = server.client().list_objects_v2(Bucket="folders", Prefix=prefix.key.split("/", 1)[1] + "/")
    return [one["Key"].rsplit("/", 1)[1] for one in found.get("Contents", []) if one["Size"]]


def test_what_makes_a_folder_whole_goes_last_and_is_removed_first(server: s3.Server, place: Location, tmp_path: Path) -> None:
    put(filled(tmp_path / "a", zeta="1", run="1", alpha="1"), place)
    before = len(server.requests())
    replace_folder(place, lambda fresh: shutil.copytree(filled(tmp_path / "b", run="22", beta="22"), fresh))
    changes = [r.split()[0] + " " + r.rsplit("/", 1)[1] for r in server.requests()[before:] if r.split()[0] in ("PUT", "DELETE")]
    changes = [change for change in changes if change != "PUT "]  # the name of the folder, which pyarrow keeps
    assert changes == ["DELETE run.json", "DELETE alpha.bin", "DELETE zeta.bin", "PUT beta.bin", "PUT run.json"]
    assert content(fetched(place)) == {"run.json": "22", "beta.bin": "22"}


@pytest.mark.slow
def test_a_version_is_downloaded_once(server: s3.Server, place: Location, tmp_path: Path, copies: Path) -> None:
    put(filled(tmp_path / "a", model="one", run="{}"), place)
    found = fetched(place)
    assert found.name == place.name
    assert content(found) == {"model.bin": "one", "run.json": "{}"}
    assert copies.stat().st_mode & 0o777 == 0o700

    def downloads(count: int) -> int:
        return sum(r.startswith("GET") and "list-type" not in r for r in server.requests()[count:])

    before = len(server.requests())
    assert fetched(str(place)) == found
    assert downloads(before) == 0
    (place / "model.bin").write_bytes(b"two")  # within the second that the store's times have, and as long
    assert content(fetched(place))["model.bin"] == "two"
    (fetched(place) / "model.bin").unlink()  # as what cleans temporary folders may
    assert content(fetched(place))["model.bin"] == "two"
    assert fetched(place / "model.bin").read_text() == "two", "a file alone"
    assert fetched(tmp_path / "a") == tmp_path / "a", "what is here is not copied"
    for other in copies.iterdir():
        os.utime(other, (0, 0))
    (place / "model.bin").write_bytes(b"three")
    fetched(place)
    assert len([path for path in copies.iterdir() if path.is_dir()]) == 1, "copies that nobody asks for go"


def test_processes_that_want_the_same_download_it_once(server: s3.Server, place: Location, tmp_path: Path) -> None:
    put(filled(tmp_path / "a", model="x" * 1000), place)
    before = len(server.requests())
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetched(place))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len([r for r in server.requests()[before:] if r.startswith("GET /folders/run")]) == 1


def test_a_folder_that_is_replaced_meanwhile_is_read_anew(
    server: s3.Server, place: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(filled(tmp_path / "a", model="old", run="old"), place)
    put(filled(tmp_path / "b", model="new", run="new"), place.parent / "other")
    download, replaced = Location.download, []

    def slow(self: Location, path: Path) -> None:
        download(self, path)
        if not replaced:
            replaced.append(True)
            put(tmp_path / "b", place)

    monkeypatch.setattr(Location, "download", slow)
    assert content(fetched(place)) == {"model.bin": "new", "run.json": "new"}


def test_what_is_not_there_and_what_is_not_ours(server: s3.Server, place: Location, copies: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="s3://folders/run/"):
        fetched(place)
    place.remove()
    put(filled(tmp_path / "a", model="1"), place)
    fetched(place)
    copies.chmod(0o777)
    with pytest.raises(UserError, match="is not a folder of this user alone"):
        fetched(place)
    place.remove()
    assert keys(server, place) == []
    with pytest.raises(UserError, match="holds credentials") as told:
        at("s3://KEY:SECRET@bucket/run")
    with pytest.raises(UserError, match="holds credentials"):
        at("s3://KEY:SEC/RET@bucket/run")
    assert "SECRET" not in str(told.value)


@pytest.fixture
def trained(make_config: Callable[..., Config], tmp_path: Path) -> tuple[Path, torch.nn.Module, Config]:
    """A checkpoint of a training, as it lies here."""
    config = make_config(name="mine", evaluation=EVALUATION)
    torch.manual_seed(0)
    network = classifiers.build(config.classifier, 1, 3)
    run = checkpoint.describe_run(config, ("dark", "light", "<b>bright & white</b>"), 1, 8, "f" * 64, "e" * 64)
    run |= {"epoch": 1, "finished": True, "history": []}
    checkpoint.save(tmp_path / "checkpoint", network, run, {"step": {"momentum": torch.ones(2)}})
    return tmp_path / "checkpoint", network.eval(), config


def test_a_checkpoint_is_published_and_loaded_by_url(trained: Any, place: Location, server: s3.Server) -> None:
    folder, network, _ = trained
    put(folder, place / "checkpoint")
    assert checkpoint.require_whole(place / "checkpoint", checkpoint.RUN)["epoch"] == 1
    assert checkpoint.load_state(place / "checkpoint")["step"]["momentum"].tolist() == [1, 1]
    published = place / "models" / "mine"
    trained_models.publish(place / "checkpoint", published)
    assert keys(server, published) == [checkpoint.MODEL, checkpoint.RUN], "the optimiser's state stays behind"
    loaded, run = checkpoint.load_classifier(str(published))
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))
    assert run["epoch"] == 1
    trained_models.publish(folder, at(folder.parent / "here"))
    assert checkpoint.digest(published) == checkpoint.digest(folder.parent / "here")


@pytest.mark.parametrize("damage", [checkpoint.RUN, checkpoint.MODEL, checkpoint.STATE])
def test_a_checkpoint_that_is_not_whole_is_not_taken(trained: Any, place: Location, damage: str) -> None:
    put(trained[0], place)
    (place / damage).unlink()
    with pytest.raises(UserError, match=f"'{ROOT}/.*' has no {damage}"):
        checkpoint.require_whole(place, checkpoint.RUN)
    put(trained[0], place)
    if damage != checkpoint.RUN:
        (place / damage).write_bytes(b"something else")
        with pytest.raises(UserError, match=f"is damaged: its {damage} is not what was written"):
            checkpoint.require_whole(place, checkpoint.RUN)


def test_models_are_named_as_in_a_folder(trained: Any, place: Location) -> None:
    folder, _, config = trained
    config = config.model_copy(update={"output": str(place)})
    assert not trained_models.is_trained(config)
    with pytest.raises(UserError, match=rf"there is no trained model at '{place}/models/yours'; train one"):
        trained_models.named_folders(config, ["yours"])
    trained_models.publish(folder, trained_models.model_folder(config))
    assert trained_models.named_folders(config, ["mine"]) == {"mine": place / "models" / "mine"}
    assert trained_models.named_folders(config, [f"{place}/models/mine", str(folder)]) == {
        "mine": place / "models" / "mine",
        "checkpoint": at(folder),
    }
    with pytest.raises(UserError, match="those of this output are mine"):
        trained_models.named_folders(config, ["yours"])


@pytest.mark.slow
def test_a_generator_is_loaded_by_url(generator_folder: Path, server: s3.Server, place: Location) -> None:
    put(generator_folder, place)
    assert generators.fingerprint(str(place)) == generators.fingerprint(str(generator_folder))
    z = torch.randn(2, 8)
    here, there = (generators.load_generator(path) for path in (str(generator_folder), str(place)))
    assert torch.equal(here.synthesis(here.mapping(z)), there.synthesis(there.mapping(z)))
    with pytest.raises(UserError, match=rf"generator\.path '{place}x' is no folder that exists"):
        generators.load_generator(f"{place}x")

    def requested(do: Callable[[], object]) -> int:
        before = len(server.requests())
        do()
        return len(server.requests()) - before

    once = requested(lambda: fetched(place))
    for do in (generators.load_generator, generators.fingerprint):
        assert requested(lambda do=do: do(str(place))) == once > 0, "its folder is looked at once"


def test_a_file_of_weights_may_be_a_url(place: Location) -> None:
    place.write_bytes(b"weights")
    assert weights.locate("lpips_alex", str(place), "projection.lpips_weights").read_bytes() == b"weights"
    with pytest.raises(UserError, match=rf"projection\.lpips_weights '{place}x' is no file"):
        weights.locate("lpips_alex", f"{place}x", "projection.lpips_weights")
    options = ["--evaluation.lpips_weights", str(place), "--projection.lpips_weights", str(place)]
    config, _ = cli.parse("test", ["--preset", "demo", *options])
    assert config.evaluation.lpips_weights == config.projection.lpips_weights == str(place)


@pytest.mark.slow
def test_a_report_and_an_export_by_url(
    make_config: Callable[..., Config], set_folder: Path, generator_folder: Path, place: Location, tmp_path: Path
) -> None:
    """Set, generator, models and evaluation lie there; what comes of them is what comes of folders, byte for byte."""
    names = ["plain"]
    config = make_config(evaluation=EVALUATION)
    here = save_models(tmp_path / "made", config, set_folder, names, history=True)
    put(set_folder / "shards", place / "set" / "shards")
    (place / "set" / "manifest.json").write_bytes((set_folder / "manifest.json").read_bytes())
    put(generator_folder, place / "generator")
    for name in names:
        put(here[name], place / "models" / name)
        put(here[name], tmp_path / "models" / name)
    written = {}
    for root, where in ((at(tmp_path), set_folder), (place, place / "set")):
        by_url = config.generator.model_copy(update={"path": str(place / "generator")})
        settings = config.model_copy(update={"generator": by_url})
        folders_of = {name: root / "models" / name for name in names}
        from dmat_ray.data.manifold_set import open_set
        from dmat_ray.evaluation.metrics import Results

        evaluator = Evaluator(
            config.evaluation,
            open_set(where, "test"),
            generators.load_configured(settings.generator),
            lambda name, models=folders_of: checkpoint.load_classifier(models[name])[0],
            names,
            torch.device("cpu"),
        )
        rows = evaluate_here(evaluator).drop_columns(["seconds"])
        results = Results(rows.append_column("seconds", [[0.0] * rows.num_rows]), config.evaluation)
        shown = gallery_here(settings, where, folders_of)
        report.write(settings, where, folders_of, results, ([], []), root / "report.html", shown)
        files = [root / "report.html", *report.siblings(root / "report.html")]
        model_export.require_ours(root / "exported")
        replace_folder(
            root / "exported",
            lambda fresh, m=folders_of["plain"], e=root / "evaluation": model_export.export(m, "plain", e, fresh),
        )
        files += (root / "exported").files()
        written[root] = {file.name: file.read_bytes() for file in files}
    assert written[place] == written[at(tmp_path)]
    assert {"report.html", "report.md", "report.csv", "config.json", checkpoint.MODEL} <= written[place].keys()
    assert json.loads(written[place]["config.json"])["format"] == "dmat_ray classifier"
    (place / "exported" / "config.json").unlink()
    with pytest.raises(UserError, match="is there and is no exported model"):
        model_export.require_ours(place / "exported")
    assert folders.holds_anything(place / "exported")


@pytest.mark.parametrize("card", [{}, {"note": "long" * 100_000}], ids=["weights", "card"])
def test_a_generator_for_which_there_is_no_space_leaves_the_older_one_and_nothing_else(
    generator_folder: Path, tmp_path: Path, card: dict[str, Any]
) -> None:
    """The kernel refuses what goes beyond a file's largest size, as it does when the disk is full."""
    size = (generator_folder / "generator.safetensors").stat().st_size + (1000 if card else -1000)
    generator, older = generators.load_generator(str(generator_folder)), filled(tmp_path / "generator", card="older")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(.*File too large.*\): is the disk full\?"):
            replace_folder(older, lambda fresh: generators.save_generator(fresh, generator, card))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(older) == {"card.bin": "older"}
    assert not list(tmp_path.glob(".generator*")), "no space is taken by what is of no use"


def test_a_folder_has_its_name_once_the_disk_holds_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a machine that goes down leaves a model of empty files, whose checkpoints have been removed."""

    def write(fresh: Path) -> None:
        fresh.mkdir()
        for name in ("model.safetensors", "run.json"):
            (fresh / name).write_text(name)

    events = noted(monkeypatch)
    replace_folder(tmp_path / "model", write)
    put(tmp_path / "model", tmp_path / "copy")
    for name in ("model", "copy"):
        files = [("synced", file) for file in ("model.safetensors", "run.json", f".{name}.partial")]
        assert events[:5] == [*files, ("renamed", name), ("synced", tmp_path.name)]
        del events[:5]


@pytest.mark.slow
def test_a_folder_is_replaced_after_a_kill_in_the_middle(tmp_path: Path) -> None:
    """What it left is no hindrance, and the older one is not lost."""
    above = tmp_path / "above"
    folder = above / "model"
    for left, name in ((".model.partial", "half"), (".model.old", "older")):
        (above / left).mkdir(parents=True)
        (above / left / name).write_text("x")

    def fails(fresh: Path) -> None:
        fresh.mkdir()
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        replace_folder(folder, fails)
    assert [path.name for path in above.rglob("*")] == ["model", "older"]
    (above / ".model.partial").mkdir()

    def writes(fresh: Path) -> None:
        fresh.mkdir()
        (fresh / "newer").write_text("x")

    replace_folder(folder, writes)
    assert [path.name for path in above.rglob("*")] == ["model", "newer"]
