"""A training of an encoder that is killed, stopped or shared by two workers has the very numbers of an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import SHA, settings
from torch import Tensor
from torchrun import run_two_workers

from dmat_ray import pace
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import encoder_trainer, generators
from dmat_ray.manifold.encoder_trainer import result_of, sample_w, train_encoder
from dmat_ray.manifold.stylegan2 import StyleGAN2

pytestmark = pytest.mark.slow


def start(folder: Path, generator_folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    script = Path(__file__).parents[1].joinpath("encoder_process.py")
    command = [sys.executable, str(script), str(folder), str(generator_folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def timeless(reports: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in report.items() if k != "images_per_second"} for report in reports]


@pytest.mark.exhaustive
def test_a_killed_training_goes_on_with_the_very_numbers(tmp_path: Path, generator_folder: Path) -> None:
    """SIGKILL in mid-training; losses and weights are then those of one that nothing disturbed."""
    config = settings(kimg=4.8)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    lines: list[dict[str, float]] = []
    context = LocalContext(tmp_path / "whole", lambda m: lines.append(dict(m)))
    whole = train_encoder(config, generators.load_generator(str(generator_folder)), SHA, context).state_dict()
    process = start(tmp_path / "killed", generator_folder)
    assert process.stdout is not None
    first = [json.loads(process.stdout.readline()) for _ in range(3)]
    process.kill()
    assert process.wait() == -9
    step = json.loads((tmp_path / "killed" / "checkpoint" / "encoder_progress.json").read_text())["step"]
    assert 30 <= step < 300, "it was killed between the third report and the last"
    again = start(tmp_path / "killed", generator_folder)
    rest = [json.loads(line) for line in again.communicate(timeout=300)[0].splitlines()]
    assert again.returncode == 0
    kept = [line for line in first if line["kimg"] <= step * 16 / 1000]
    assert timeless(rest) == timeless(lines[-len(rest) :])
    assert timeless(kept) == timeless(lines[: len(kept)])
    assert len(rest) == 30 - step // 10
    killed = torch.load(tmp_path / "killed" / "result0.pt", weights_only=True)["encoder"]
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


# between two reports, at a report, and where every step is a report
@pytest.mark.parametrize(("report_kimg", "stop"), [(0.16, 14), (0.16, 20), (0.016, 14)])
def test_sigterm_leaves_a_checkpoint_after_the_very_step(
    generator: StyleGAN2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report_kimg: float, stop: int
) -> None:
    config = settings(kimg=0.48, report_kimg=report_kimg)
    reports: list[dict[str, float]] = []
    expected = train_encoder(
        config, generator, SHA, LocalContext(tmp_path / "whole", lambda m: reports.append(dict(m)))
    ).state_dict()
    before, step = signal.getsignal(signal.SIGTERM), encoder_trainer._Training.step

    def signalled(self: Any, i: int) -> None:
        step(self, i)
        if i == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(encoder_trainer._Training, "step", signalled)
    monkeypatch.setattr(pace, "LOOK_S", 0.0)
    told: list[dict[str, float]] = []
    context = LocalContext(tmp_path / "stopped", lambda m: told.append(dict(m)))
    with pytest.raises(SystemExit) as ended, context.heeding_sigterm():
        train_encoder(config, generator, SHA, context)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert json.loads((tmp_path / "stopped" / "checkpoint" / "encoder_progress.json").read_text())["step"] == stop
    with pytest.raises(UserError, match=rf"is of step {stop} of 30, which is no result yet; give the command again"):
        result_of(tmp_path / "stopped" / "checkpoint", config, generator, SHA)
    monkeypatch.setattr(encoder_trainer._Training, "step", step)
    context = LocalContext(tmp_path / "stopped", lambda m: told.append(dict(m)))
    state = train_encoder(config, generator, SHA, context).state_dict()
    assert timeless(told) == timeless(reports)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.exhaustive
def test_two_workers_train_on_the_samples_of_one(
    tmp_path: Path, generator: StyleGAN2, generator_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(kimg=0.16, report_kimg=0.08)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "two").mkdir()
    run_two_workers("encoder_process.py", str(tmp_path / "two"), str(generator_folder))
    one, two = (torch.load(tmp_path / "two" / f"result{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one["encoder"][key], two["encoder"][key]) for key in one["encoder"])
    samples: list[Tensor] = []
    monkeypatch.setattr(encoder_trainer, "sample_w", lambda *a: (samples.append(sample_w(*a)), samples[-1])[1])
    losses: list[float] = []
    context = LocalContext(tmp_path / "alone", lambda m: losses.append(m["loss"]))
    alone = train_encoder(config, generator, SHA, context).state_dict()
    whole = torch.stack(samples)
    together = torch.cat([one["samples"], two["samples"]], dim=1)
    assert one["losses"] == pytest.approx(losses, rel=1e-4)
    assert together.shape == (10, 16, generator.num_ws, 8)
    torch.testing.assert_close(together, whole, rtol=1e-5, atol=1e-6)
    assert len({row.sum().item() for row in whole.flatten(0, 1)}) == 160, "no sample comes twice"
    for key, value in alone.items():
        torch.testing.assert_close(one["encoder"][key], value, rtol=1e-3, atol=1e-4)
