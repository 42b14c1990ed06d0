"""Generator training on a real Ray: killed and resumed, its samples and quality in MLflow, and its result in use."""

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file
from small import train_workers

from dmat_ray import cli
from dmat_ray.cluster import gan
from dmat_ray.config import Config
from dmat_ray.manifold import generators

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]
ROOT = Path(__file__).parents[2]
OPTIONS = [
    *("--cluster.train_workers", "1"),  # several differ by rounding
    *("--data.train_limit", "200", "--gan.kimg", "0.8", "--gan.report_kimg", "0.08", "--gan.snapshot_kimg", "0.16"),
    *("--gan.batch_size", "8", "--gan.quality.samples", "100", "--gan.quality.epochs", "2", "--gan.ada_target", "0.6"),
    *("--gan.architecture.channel_base", "128", "--gan.architecture.noise", "true"),
]


def settings(output: Path) -> Config:
    config, _ = cli.parse("test", ["--output", str(output), *OPTIONS], preset=["mnist32_generator"])
    return config


@pytest.fixture(scope="module")
def calm(ray_session, tmp_path_factory) -> Path:
    """The output folder of a training that nothing disturbed."""
    output = tmp_path_factory.mktemp("calm")
    gan.train(settings(output), output / "generator", "calm", print)
    return output


def logged(output: Path) -> dict[str, dict[int, float]]:
    """Metric -> step -> value of the one training that MLflow knows of; the last value where a step was logged twice."""
    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    (run,) = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    assert run.info.status == "FINISHED"
    names = [name for name in run.data.metrics if name != "images_per_second"]
    return {name: {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)} for name in names}


def test_samples_and_quality_are_in_mlflow(calm):
    metrics = logged(calm)
    for name in ("loss_g", "loss_d", "augment"):
        assert sorted(metrics[name]) == [80 * k for k in range(1, 11)]
    for name in ("fid", "precision", "recall", "diversity"):
        assert sorted(metrics[name]) == [160 * k for k in range(1, 6)]
    client = MlflowClient(f"sqlite:///{calm}/mlflow.db")
    (run,) = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    grids = [a.path for a in client.list_artifacts(run.info.run_id, "samples")]
    assert len(grids) >= 1
    with Image.open(client.download_artifacts(run.info.run_id, grids[-1])) as grid:
        assert grid.size == (10 * 34 + 2, 8 * 34 + 2)
    assert {a.path for a in client.list_artifacts(run.info.run_id, "generator")} == {
        f"generator/{name}" for name in ("card.json", "generator.safetensors", "samples.png")
    }


def test_the_card_tells_the_quality_of_the_kept_snapshot(calm):
    card = json.loads((calm / "generator" / "card.json").read_text())
    fids = logged(calm)["fid"]
    assert card["quality"]["fid"] == pytest.approx(min(fids.values()))
    assert fids[round(card["quality"]["kimg"] * 1000)] == card["quality"]["fid"]
    generator = generators.load_generator(str(calm / "generator"))
    assert (generator.resolution, generator.num_classes) == (32, 10)
    assert not list((calm / "train").iterdir()), "decoded images and checkpoints are gone"


def test_a_killed_worker_is_replaced_and_goes_on_with_the_very_numbers(tmp_path, calm, monkeypatch, capsys):
    """Bit for bit: the losses of every interval, and the weights."""
    lines: list[str] = []
    killed = threading.Event()

    def kill_after_a_snapshot() -> None:
        while not any("fid" in line for line in lines):
            time.sleep(0.02)
        os.kill(train_workers()[0].pid, signal.SIGKILL)
        killed.set()

    threading.Thread(target=kill_after_a_snapshot, daemon=True).start()
    gan.train(settings(tmp_path), tmp_path / "generator", "killed", lines.append)
    assert killed.is_set()
    assert logged(tmp_path) == logged(calm)
    one, two = (load_file(o / "generator" / "generator.safetensors") for o in (tmp_path, calm))
    assert all((one[key] == two[key]).all() for key in two)

    # the same command again
    spec = importlib.util.spec_from_file_location("job", ROOT / "jobs" / "train_generator.py")
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    monkeypatch.setattr(sys, "argv", ["train_generator.py", "--output", str(tmp_path), *OPTIONS])
    job.main()
    assert "is trained already and unchanged, nothing to do" in capsys.readouterr().out
