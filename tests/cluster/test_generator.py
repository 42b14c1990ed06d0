"""Generator training on a real Ray: killed and resumed, its samples and quality in MLflow, and its result in use."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file
from small import train_workers

from dmat_ray import cli
from dmat_ray.cluster import gan
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.manifold import gan_folder, gan_images, generators

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session")]
ROOT = Path(__file__).parents[2]
OPTIONS = [
    *("--cluster.train_workers", "1"),  # several differ by rounding
    *("--data.train_limit", "200", "--gan.kimg", "0.48", "--gan.report_kimg", "0.08", "--gan.snapshot_kimg", "0.16"),
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
    left_by_a_killed_one = output / "train" / ".images-0123456789abcdef.1.partial"
    left_by_a_killed_one.mkdir(parents=True)
    other, _ = cli.parse("test", ["--output", str(output), *OPTIONS, "--gan.seed", "5"], preset=["mnist32_generator"])
    refused, lines = [], []

    def say(line: str) -> None:
        """While it trains another is refused, though its settings are not the same: it would remove the decoded images."""
        lines.append(line)
        if not refused:
            with pytest.raises(UserError) as told:
                gan.train(other, output / "generator", "second", print)
            refused.append(str(told.value))

    gan.train(settings(output), output / "generator", "calm", say)
    assert re.search(r"generator\.lease' is being written by process \d+ .*wait until it ends", *refused)
    reports = [line for line in lines if "images_per_second" in line]
    assert [bool(re.search(r", about \d+ (s|minutes) to go$", line)) for line in reports] == [True] * 5 + [False]
    card = json.loads((output / "generator" / "card.json").read_text())
    kept = (
        f"keeping the snapshot of {card['quality']['kimg']:.3g} thousand images (gan.keep best), FID {card['quality']['fid']:.3g}"
    )
    assert kept in lines
    assert lines[lines.index(kept) + 1].startswith("note: it is judged by the ")
    return output


def logged(output: Path) -> dict[str, dict[int, float]]:
    """Metric -> step -> value of the one training that MLflow knows of, where no step is logged twice."""
    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    (run,) = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    assert run.info.status == "FINISHED"
    found = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics if name != "images_per_second"}
    assert all(len({m.step for m in metrics}) == len(metrics) for metrics in found.values())
    return {name: {m.step: m.value for m in metrics} for name, metrics in found.items()}


def test_samples_and_quality_are_in_mlflow(calm):
    metrics = logged(calm)
    for name in ("loss_g", "loss_d", "augment"):
        assert sorted(metrics[name]) == [80 * k for k in range(1, 7)]
    for name in ("fid", "precision", "recall", "diversity", "lowest_diversity", "collapsed"):
        assert sorted(metrics[name]) == [160 * k for k in range(1, 4)]
    client = MlflowClient(f"sqlite:///{calm}/mlflow.db")
    (run,) = [r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])]
    grids = [a.path for a in client.list_artifacts(run.info.run_id, "samples")]
    assert len(grids) == 3
    with Image.open(client.download_artifacts(run.info.run_id, grids[-1])) as grid:
        assert grid.size == (10 * 34 + 2, 8 * 34 + 2)
    assert {a.path for a in client.list_artifacts(run.info.run_id, "generator")} == {
        f"generator/{name}" for name in ("card.json", "generator.safetensors", "images.parquet", "samples.png")
    }


def test_the_card_tells_the_quality_of_the_kept_snapshot(calm):
    card = json.loads((calm / "generator" / "card.json").read_text())
    fids = logged(calm)["fid"]
    assert card["quality"]["fid"] == pytest.approx(min(fids.values()))
    assert fids[round(card["quality"]["kimg"] * 1000)] == card["quality"]["fid"]
    generator = generators.load_generator(str(calm / "generator"))
    assert (generator.resolution, generator.num_classes) == (32, 10)
    assert not list((calm / "train").iterdir()), "decoded images and checkpoints are gone"


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
def test_sigterm_has_a_checkpoint_written_and_the_same_command_goes_on(tmp_path):
    options = [*OPTIONS, "--gan.kimg", "6", "--gan.report_kimg", "2", "--gan.snapshot_kimg", "2"]
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, str(ROOT / "jobs" / "train_generator.py"), "--output", str(tmp_path), *options]
    command += ["--cluster.address", address]

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    process = start()
    assert process.stdout is not None
    said = []
    while not (said and "2 of 6 thousand" in said[-1]):
        said.append(process.stdout.readline())
        assert said[-1], "".join(said)
    process.send_signal(signal.SIGTERM)
    said.append(process.communicate(timeout=300)[0])
    assert process.returncode == 143, "".join(said)
    assert "writing a checkpoint first" in said[-1]
    assert "stopped; the same command goes on" in said[-1]
    steps = [json.loads(p.read_text())["step"] for p in (tmp_path / "train").glob("generator-*/checkpoint_*/gan.json")]
    assert max(steps) % 250, "within an interval"
    again = start()
    rest = again.communicate(timeout=300)[0]
    assert again.returncode == 0, rest
    assert "2 of 6 thousand" not in rest
    assert "6 of 6 thousand" in rest
    generators.load_generator(str(tmp_path / "generator"))


@pytest.mark.exhaustive
def test_what_only_a_user_can_mend_is_not_tried_again(tmp_path):
    """The worker fails once; the next attempt sees why and does nothing."""
    config, _ = cli.parse(
        "test",
        ["--output", str(tmp_path), *OPTIONS, "--gan.lr_generator", "1e30", "--gan.lr_discriminator", "1e30"],
        preset=["mnist32_generator"],
    )
    seen: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            seen.update(process.pid for process in train_workers())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(UserError, match=r"^generator training diverged: .*lower gan\.lr_generator"):
            gan.train(config, tmp_path / "generator", "diverges", print)
    finally:
        done.set()
        watcher.join()
    assert config.cluster.max_failures > 1
    assert config.cluster.train_workers <= len(seen) <= 2 * config.cluster.train_workers
    assert not (tmp_path / "generator").exists()


def test_a_generator_that_is_there_is_not_replaced_unasked(calm, tmp_path):
    assert gan_folder.is_trained(settings(calm), calm / "generator")
    assert not gan_folder.is_trained(settings(tmp_path), tmp_path / "generator")
    other, _ = cli.parse("test", ["--output", str(calm), *OPTIONS, "--gan.seed", "5"], preset=["mnist32_generator"])
    with pytest.raises(UserError, match=r"holds another generator \(gan.seed was 0, now it is 5\); .*--overwrite"):
        gan_folder.is_trained(other, calm / "generator")


def test_a_generator_is_trained_for_longer_from_where_its_rates_had_not_fallen(calm, tmp_path, monkeypatch):
    shutil.copytree(calm / "generator", tmp_path / "generator")
    longer, _ = cli.parse("test", ["--output", str(tmp_path), *OPTIONS, "--gan.kimg", "0.64"], preset=["mnist32_generator"])
    with pytest.raises(UserError, match=r"holds another generator \(gan.kimg was 0.48, now it is 0.64\)"):
        gan_folder.is_trained(longer, tmp_path / "generator")
    shutil.copytree(calm / "generator_training", tmp_path / "generator_training")
    for option in ("--gan.seed", "--data.seed"):
        other, _ = cli.parse(
            "test", ["--output", str(tmp_path), *OPTIONS, "--gan.kimg", "0.64", option, "5"], preset=["mnist32_generator"]
        )
        with pytest.raises(UserError, match=r"holds another generator"):
            gan_folder.is_trained(other, tmp_path / "generator")
    assert not gan_folder.is_trained(longer, tmp_path / "generator")
    lines: list[str] = []
    resumable: list[bool] = []

    def save(fresh: Path, *given: Any) -> None:
        """The last moment before the longer one is there: who is killed now, or finds the disk full, gives the command again."""
        resumable.append(gan_folder.extends(longer, tmp_path / "generator"))
        generators.save_generator(fresh, *given)

    monkeypatch.setattr(gan, "save_generator", save)
    gan.train(longer, tmp_path / "generator", "longer", lines.append)
    assert resumable == [True]
    assert any("with its first 0.32 thousand images" in line for line in lines)
    before, after = logged(calm)["loss_g"], logged(tmp_path)["loss_g"]
    assert sorted(after) == [400, 480, 560, 640]
    assert after[400] != before[400], "the shorter one's rates were falling there"
    card = json.loads((tmp_path / "generator" / "card.json").read_text())
    assert card["training"]["kimg"] == 0.64
    assert json.loads((tmp_path / "generator_training" / "gan.json").read_text())["step"] == 40
    assert not list((tmp_path / "train").iterdir())
    killed_in_its_last_moment = tmp_path / "train" / gan_images.training_name(longer, card["images_sha256"])
    killed_in_its_last_moment.mkdir()
    (tmp_path / "generator_training").rename(killed_in_its_last_moment / "trunk")
    gan_folder.settle(longer, tmp_path / "generator", tmp_path / "train")
    assert (tmp_path / "generator_training" / "gan.json").is_file()
    assert not list((tmp_path / "train").iterdir())
    assert gan_folder.is_trained(longer, tmp_path / "generator")
