"""Encoder training on a real Ray: its folder, its errors in MLflow with a killed worker, and what a user is told."""

import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from small import train_workers

from dmat_ray import cli
from dmat_ray.cluster import encoder as stage
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.manifold.encoder import Encoder, load_encoder, locate_encoder
from dmat_ray.manifold.encoder_trainer import train_encoder
from dmat_ray.storage.lease import sole

pytestmark = [pytest.mark.cluster, pytest.mark.exhaustive, pytest.mark.usefixtures("ray_session")]
ROOT = Path(__file__).parents[2]
OPTIONS = [
    *("--encoder.kimg", "6.4", "--encoder.report_kimg", "0.64", "--encoder.batch_size", "16", "--encoder.width_max", "16"),
    *("--encoder.width", "8", "--cluster.train_workers", "1"),  # several differ by rounding
]


def arguments(output: Path, generator: Path, *options: str) -> list[str]:
    return ["--preset", "demo", "--output", str(output), "--generator.path", str(generator), *OPTIONS, *options]


def settings(*given: object) -> Config:
    return cli.parse("test", arguments(*given))[0]  # type: ignore[arg-type]


def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("job", ROOT / "jobs" / "train_encoder.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_job(monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train_encoder.py", *given])
    cli.run(job().main)


@pytest.fixture(scope="module")
def output(ray_session: None, tmp_path_factory: pytest.TempPathFactory, generator_folder: Path) -> Path:
    """The output folder of the job, whose worker is killed when the first checkpoint is kept and the second is there."""
    output = tmp_path_factory.mktemp("output")
    killed = threading.Event()

    def kill_in_mid_training() -> None:
        while len(list(output.glob("train/encoder-*/checkpoint_*"))) < 2:
            time.sleep(0.01)
        os.kill(train_workers()[0].pid, signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill_in_mid_training, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        run_job(patch, *arguments(output, generator_folder))
    assert killed.is_set()
    return output


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, generator_folder: Path) -> tuple[list[dict[str, float]], Encoder]:
    """What the loop reports and makes without Ray, undisturbed."""
    reports: list[dict[str, float]] = []
    folder = tmp_path_factory.mktemp("calm")
    context = LocalContext(folder, lambda m: reports.append(dict(m)))
    generator, sha = generators.load_generator(str(generator_folder)), generators.fingerprint(str(generator_folder))
    return reports, train_encoder(settings(folder, generator_folder).encoder, generator, sha, context)


def test_the_job_makes_an_encoder_that_projection_finds(output: Path, generator_folder: Path) -> None:
    folder = locate_encoder(None, output, str(generator_folder)).local
    assert folder == output / "encoder"
    sha = generators.fingerprint(str(generator_folder))
    encoder, generator = load_encoder(folder, sha), generators.load_generator(str(generator_folder))
    card = json.loads((folder / "encoder.json").read_text())
    assert card["command"].startswith("python jobs/train_encoder.py --preset demo --output")
    assert card["generator_sha256"] == sha
    assert card["training"] == settings(output, generator_folder).encoder.model_dump(mode="json")
    assert {"dmat_ray", "torch"} <= set(card["versions"])
    # what the card says of new samples, measured here on others
    x = generator.synthesis(generator.mapping(torch.randn(300, 8, generator=torch.Generator().manual_seed(3))))
    l1 = (generator.synthesis(encoder(x)) - x).abs().mean().item()
    assert l1 == pytest.approx(card["fresh_samples"]["l1_of_w"], rel=0.2)
    assert card["fresh_samples"]["l1"] < 0.7 * card["fresh_samples"]["l1_of_mean"]
    assert not list((output / "train").glob("*")), "checkpoints are gone"


def logged(output: Path) -> dict[str, dict[int, float]]:
    """Metric -> step -> value of the one training that MLflow knows of, where no step is logged twice."""
    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    (run,) = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    assert run.info.status == "FINISHED"
    found = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics if name != "images_per_second"}
    assert all(len({m.step for m in metrics}) == len(metrics) for metrics in found.values())
    return {name: {m.step: m.value for m in metrics} for name, metrics in found.items()}


def test_errors_are_in_mlflow(output: Path) -> None:
    metrics = logged(output)
    for name in ("loss", "w_error", "l1", "l2"):
        assert sorted(metrics[name]) == [640 * k for k in range(1, 11)]
    assert metrics["loss"][6400] < metrics["loss"][640]
    card = json.loads((output / "encoder" / "encoder.json").read_text())
    assert metrics["fresh_l1"] == {6400: card["fresh_samples"]["l1"]}
    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    (run,) = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    assert {a.path for a in client.list_artifacts(run.info.run_id, "encoder")} == {
        "encoder/encoder.json", "encoder/encoder.safetensors",
    }  # fmt: skip


def test_a_killed_worker_is_replaced_and_the_numbers_are_those_of_a_plain_process(
    output: Path, calm: tuple[list[dict[str, float]], Encoder]
) -> None:
    metrics, (reports, encoder) = logged(output), calm
    for name in ("loss", "w_error", "l1", "l2"):
        assert metrics[name] == {round(r["kimg"] * 1000): r[name] for r in reports}
    for name, value in load_file(output / "encoder" / "encoder.safetensors").items():
        assert torch.equal(value, encoder.state_dict()[name].to(value.dtype))


def test_an_encoder_that_is_there_is_trained_once_and_not_replaced_unasked(
    output: Path, generator_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = output / "train" / f"{stage._label(settings(output, generator_folder))}2"
    another = output / "train" / "encoder-0123456789ab-1"
    for place in (left, another):
        (place / "checkpoint_0").mkdir(parents=True)
    with sole(output / "encoder"):
        run_job(monkeypatch, *arguments(output, generator_folder))
        assert left.is_dir(), "another job is at work there"
    run_job(monkeypatch, *arguments(output, generator_folder))
    assert capsys.readouterr().out.count("is trained already and unchanged, nothing to do") == 2
    assert list((output / "train").iterdir()) == [another], "what a kill after the last moment but one had left is gone"
    shutil.rmtree(another)
    with pytest.raises(SystemExit) as stopped:
        run_job(monkeypatch, *arguments(output, generator_folder, "--encoder.seed", "5"))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: '{output / 'encoder'}' holds an encoder of another generator, or of other settings")
    assert line.endswith("--overwrite")
    truncated = (output / "encoder" / "encoder.safetensors").read_bytes()
    (output / "encoder" / "encoder.safetensors").write_bytes(truncated[:-9])
    try:
        with pytest.raises(UserError, match="is damaged"):
            stage.is_trained(settings(output, generator_folder), output / "encoder")
    finally:
        (output / "encoder" / "encoder.safetensors").write_bytes(truncated)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cluster.train_workers", "2", "--encoder.batch_size", "9"), "encoder.batch_size 9 must be a multiple of 2"),
        (("--encoder.lr", "0"), "encoder.lr: must be more than 0 (found '0')"),
        (("--encoder.precision", "fp8"), "encoder.precision: must be 'float32' or 'bf16' (found 'fp8')"),
        (("--generator.path", "nowhere"), "generator.path 'nowhere' is no folder that exists"),
    ],
)
def test_wrong_settings_end_in_one_line(
    tmp_path: Path, generator_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        run_job(monkeypatch, *arguments(tmp_path, generator_folder, *options))
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "encoder").exists()
