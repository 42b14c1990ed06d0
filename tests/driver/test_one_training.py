"""The driver of a generator's or an encoder's training, with workers of this process in place of Ray's."""

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoders import settings
from kills import killed_when_removed
from safetensors.torch import load_file

from dmat_ray import pace
from dmat_ray.cluster import encoder, one_training, session, workers
from dmat_ray.cluster.events import Asked
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import encoder_trainer, generators
from dmat_ray.storage import Place, files
from dmat_ray.storage.lease import FILE

pytestmark = pytest.mark.slow
During = Callable[[Path], None]


class Here:
    """Ray, its workers and MLflow, as far as a driver sees them. `during` is called when the workers begin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder = folder
        self.during: During = lambda place: None
        self.asked, self.up, self.logged = Asked(), 0, []
        self.run = SimpleNamespace(done=False, artifact=self._artifact, metrics=lambda values, step: self.logged.append(step))
        self.artifacts: list[str] = []
        monkeypatch.setattr(session, "connected", self._connected)
        monkeypatch.setattr(session, "await_machines", lambda *_: None)
        monkeypatch.setattr(one_training.tracking, "tracked", lambda *_: contextlib.nullcontext(self.run))
        monkeypatch.setattr(one_training, "heed_stop", self._heed_stop)
        monkeypatch.setattr(one_training, "listen", self._listen)
        monkeypatch.setattr(workers, "fit", self._fit)

    def _artifact(self, place: Place, folder: str) -> None:
        self.artifacts.append(folder)

    @contextlib.contextmanager
    def _connected(self, *_: object) -> Any:
        self.up += 1
        yield

    @contextlib.contextmanager
    def _heed_stop(self) -> Any:
        yield self.asked
        if self.asked.is_set():
            raise SystemExit(128 + signal.SIGTERM)

    def _listen(self, handle: Callable[[dict[str, Any]], None], asked: Asked) -> Any:
        self._handle = handle
        return contextlib.nullcontext("mailbox")

    def _fit(self, worker: object, given: dict[str, Any], cluster: object, place: Place, *_: object, keep: int) -> Any:
        config, folder = Config.model_validate(given["config"]), Path(str(place))
        self.during(folder)
        context = LocalContext(self._folder, lambda metrics: self._handle({"run": "encoder", "metrics": metrics}))
        context._told_to_stop = self.asked.is_set()
        generator, errors = generators.load_configured(config.generator), None
        with contextlib.suppress(SystemExit):
            sha = generators.fingerprint(config.generator.path)
            made = encoder_trainer.train_encoder(config.encoder, generator, sha, context)
            errors = encoder_trainer.fresh_errors(made, generator, config.encoder, samples=64)
        shutil.copytree(self._folder / "checkpoint", folder / "checkpoint_1")
        return SimpleNamespace(return_value=errors)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Here:
    return Here(monkeypatch, tmp_path / "worker")


def of(output: Path, generator: Path, **values: Any) -> Config:
    given = settings(kimg=0.32, report_kimg=0.16, **values).model_dump(mode="json")
    cluster = {"train_workers": 1}
    generator_settings = {"path": str(generator)}
    return Config.model_validate({"output": str(output), "generator": generator_settings, "encoder": given, "cluster": cluster})


def seed_of(output: Path) -> int:
    return int(json.loads((output / "encoder" / "encoder.json").read_text())["training"]["seed"])


def test_while_an_encoder_is_trained_another_of_the_same_output_is_refused(
    here: Here, tmp_path: Path, generator_folder: Path
) -> None:
    """Whatever its settings: the one that ends last would replace the other's result."""
    output, lines = tmp_path / "runs", []
    refused: list[str] = []

    def begin_another(place: Path) -> None:
        if not refused:
            with pytest.raises(UserError) as told:
                encoder.train_encoder(of(output, generator_folder, seed=5), True, "second", print)
            refused.append(str(told.value))

    here.during = begin_another
    encoder.train_encoder(of(output, generator_folder), True, "first", lines.append)
    assert "encoder.lease' is being written by process" in refused[0]
    assert here.up == 1, "the second is refused before Ray starts"
    assert seed_of(output) == 0
    assert here.artifacts == ["encoder"]
    assert here.run.done
    assert here.logged == [160, 320, 320]
    assert [line.split(",")[0] for line in lines[:2]] == ["0.16 of 0.32 thousand samples", "0.32 of 0.32 thousand samples"]
    stored = load_file(output / "encoder" / "encoder.safetensors")
    trained = torch.load(tmp_path / "worker" / "checkpoint" / "state.pt", weights_only=True)["encoder"]
    assert all(torch.equal(value, trained[key].to(value.dtype)) for key, value in stored.items())
    assert sorted(path.name for path in output.iterdir()) == ["encoder", "train"], "no lease is left"
    assert not list((output / "train").iterdir()), "nor a checkpoint"
    shutil.rmtree(tmp_path / "worker")
    encoder.train_encoder(of(output, generator_folder, seed=5), True, "second", lines.append)
    assert seed_of(output) == 5


def test_one_whose_driver_is_killed_while_its_checkpoint_is_removed_leaves_no_part_of_it(
    here: Here, tmp_path: Path, generator_folder: Path
) -> None:
    """Of which the next training of the same settings would be unable to go on."""

    def leave(place: Path) -> None:
        (place / "checkpoint_0").mkdir(parents=True)
        for name in ("one.txt", "other.txt"):
            (place / "checkpoint_0" / name).touch()

    here.during, config = leave, of(tmp_path, generator_folder)
    with killed_when_removed(1, "one.txt", "other.txt"):
        encoder.train_encoder(config, False, "killed", print)
    assert seed_of(tmp_path) == 0
    assert not list((tmp_path / "train").glob("[!.]*"))
    encoder.train_encoder(config, False, "again", print)
    assert not list((tmp_path / "train").iterdir())


def test_one_that_is_asked_to_stop_keeps_its_checkpoint_and_gives_nothing(
    here: Here, tmp_path: Path, generator_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    other = tmp_path / "train" / "encoder-0123456789ab-1"
    other.mkdir(parents=True)

    monkeypatch.setattr(pace, "LOOK_S", 0.0)
    here.during = lambda place: here.asked.set()
    with pytest.raises(SystemExit) as ended:
        encoder.train_encoder(of(tmp_path, generator_folder), False, "stopped", lines.append)
    assert ended.value.code == 143
    assert lines[-1] == "stopped; the same command goes on from the checkpoint"
    assert lines[0].endswith(f"inputs or workers, which this one leaves: {other.name}")
    assert not (tmp_path / "encoder").exists()
    assert len(list((tmp_path / "train").glob("encoder-*/checkpoint_*"))) == 1
    assert not here.run.done


def test_an_earlier_checkpoint_does_not_pass_for_the_result(
    here: Here, tmp_path: Path, generator_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last one is damaged, or a shared disk shows it late."""
    monkeypatch.setattr(files, "VISIBLE_S", 5.0)
    fit, shown = workers.fit, iter((False, True))

    def lacking(*arguments: Any, **how: Any) -> Any:
        result, (progress,) = fit(*arguments, **how), (tmp_path / "train").glob("*/checkpoint_1/encoder_progress.json")
        whole = json.loads(progress.read_text())
        progress.write_text(json.dumps({**whole, "step": whole["step"] - 1}))
        if next(shown):
            threading.Timer(1.5, progress.write_text, [json.dumps(whole)]).start()
        return result

    monkeypatch.setattr(workers, "fit", lacking)
    config = of(tmp_path, generator_folder)
    with pytest.raises(UserError, match=r"its last checkpoint in '.*' is damaged or cannot be seen from here, and nothing"):
        encoder.train_encoder(config, False, "damaged", print)
    assert not (tmp_path / "encoder").exists()
    (kept,) = (tmp_path / "train").glob("encoder-*/checkpoint_1")
    shutil.rmtree(kept)
    encoder.train_encoder(config, False, "late", print)
    assert seed_of(tmp_path) == 0


def test_one_whose_output_another_has_taken_over_leaves_that_as_it_is(
    here: Here, tmp_path: Path, generator_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmat_ray.storage.lease.INTERVAL_S", 0.05)

    def lose(place: Path) -> None:
        (file,) = tmp_path.glob(f".encoder.lease/{FILE}")
        anothers = json.dumps({**json.loads(file.read_text()), "owner": "another"})
        for _ in range(100):
            file.write_text(anothers)  # which a beat may just be writing
            if here.asked.wait(0.3):
                return
        pytest.fail("workers are not stopped")

    here.during = lose
    with pytest.raises(UserError, match="another run has taken over"):
        encoder.train_encoder(of(tmp_path, generator_folder), False, "lost", print)
    assert not (tmp_path / "encoder").exists()
