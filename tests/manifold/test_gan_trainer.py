"""The loop of generator training: killed and resumed, collapsed, adapted, and in several precisions."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrun import run_two_workers

from dmat_ray import pace
from dmat_ray.config import GanConfig, StyleGAN2Config
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import diversity, gan, gan_trainer, quality
from dmat_ray.manifold.discriminator import Discriminator
from dmat_ray.manifold.gan_progress import read_progress, result_of
from dmat_ray.manifold.gan_step import GanTraining
from dmat_ray.manifold.gan_trainer import train_generator
from dmat_ray.models import steps
from dmat_ray.models.checkpoint import seal

pytestmark = pytest.mark.slow

SHAPE = {"resolution": 8, "z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 64, "channel_max": 8, "noise": True}


def settings(**values: Any) -> GanConfig:
    quality = {"network": "none", "samples": 60, **values.pop("quality", {})}
    short = {"batch_size": 8, "kimg": 0.4, "report_kimg": 0.04, "snapshot_kimg": 0.08}
    return GanConfig.model_validate({"architecture": {**SHAPE, "num_classes": 3}, **short, "quality": quality, **values})


def some_images() -> tuple[Tensor, Tensor]:
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


def train(config: GanConfig, folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    reports: list[dict[str, float]] = []
    state = train_generator(config, *some_images(), LocalContext(folder, lambda m: reports.append(dict(m)))).state_dict()
    return state, reports


def timeless(reports: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in report.items() if k != "images_per_second"} for report in reports]


def start(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    script = Path(__file__).parents[1].joinpath("gan_process.py")
    return subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True)


@pytest.mark.exhaustive
def test_a_killed_training_goes_on_with_the_very_numbers(tmp_path: Path) -> None:
    """SIGKILL in mid-training, with everything on that has a state: adaptive augmentation, path lengths, noise."""
    config = settings(ada_target=0.6, ada_kimg=0.5, path_length=2.0, r1_interval=3, style_mixing=0.7)
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    (tmp_path / "whole").mkdir()
    one, lines = train(config, tmp_path / "whole")
    assert [line["kimg"] for line in lines] == pytest.approx([0.04 * k for k in range(1, 11)])

    process = start(tmp_path / "killed")
    assert process.stdout is not None
    first = [json.loads(process.stdout.readline()) for _ in range(5)]
    process.kill()
    assert process.wait() == -9
    progress, _ = read_progress(tmp_path / "killed" / "checkpoint", config)
    step = progress["step"]
    assert 10 <= step < 50, "it was killed between the first snapshot and the last"
    again = start(tmp_path / "killed")
    rest = [json.loads(line) for line in again.communicate(timeout=300)[0].splitlines()]
    assert again.returncode == 0
    kept = [line for line in first if line["kimg"] <= step * 8 / 1000]
    assert timeless(kept + rest) == timeless(lines)
    two = torch.load(tmp_path / "killed" / "result0.pt", weights_only=True)
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(("fade", "kept"), [(0.0, 0.24), (0.3, 0.16), (0.8, None)])
def test_a_longer_training_goes_on_with_the_very_numbers_from_before_the_rates_fell(
    tmp_path: Path, fade: float, kept: float | None
) -> None:
    shared = {"ada_target": 0.6, "ada_kimg": 0.5, "path_length": 2.0, "r1_interval": 3, "fade": fade}
    short, long = settings(**shared, kimg=0.28), settings(**shared, kimg=0.56)
    trunk, reports = tmp_path / "trunk", []
    train_generator(short, *some_images(), LocalContext(tmp_path / "short", lambda _: None), trunk=trunk)
    if kept is None:
        assert not trunk.exists(), "no snapshot is from before the rates fell"
        return
    context = LocalContext(tmp_path / "on", lambda m: reports.append(dict(m)))
    longer = train_generator(long, *some_images(), context, shorter=trunk).state_dict()
    expected, whole = train(long, tmp_path / "whole")
    assert timeless(reports) == [report for report in timeless(whole) if report["kimg"] > kept + 1e-9]
    assert all(torch.equal(longer[key], expected[key]) for key in expected)
    for other in (short, settings(**shared, kimg=0.2), settings(**shared, kimg=0.56, seed=1)):
        with pytest.raises(UserError, match="was trained with other settings under gan"):
            train_generator(other, *some_images(), LocalContext(tmp_path / "other", lambda _: None), shorter=trunk)


def test_a_training_that_is_longer_by_less_than_a_step_has_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    short, long = settings(kimg=0.236, fade=0.0), settings(kimg=0.24, fade=0.0)
    train_generator(short, *some_images(), LocalContext(tmp_path / "short"), trunk=tmp_path / "trunk")
    context = LocalContext(tmp_path / "on", lambda _: pytest.fail("there is no step to report"))
    train_generator(long, *some_images(), context, shorter=tmp_path / "trunk", trunk=tmp_path / "again")
    found, kept = result_of(context.checkpoints()[0], long)
    expected, reports = train(long, tmp_path / "whole")
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    assert kept["kimg"] in [report["kimg"] for report in reports]
    assert steps.is_last(read_progress(tmp_path / "again", long)[0])


# between two reports, at a report, at a snapshot, and where every step is a report
@pytest.mark.parametrize(("report_kimg", "stop"), [(0.04, 13), (0.04, 15), (0.04, 20), (0.008, 13)])
def test_sigterm_leaves_a_checkpoint_after_the_very_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report_kimg: float, stop: int
) -> None:
    config = settings(ada_target=0.6, ada_kimg=0.5, path_length=2.0, kimg=0.24, report_kimg=report_kimg)
    expected, reports = train(config, tmp_path / "whole")
    before, step = signal.getsignal(signal.SIGTERM), GanTraining.step

    def signalled(self: GanTraining, i: int, *given: Any) -> None:
        step(self, i, *given)
        if i == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(GanTraining, "step", signalled)
    monkeypatch.setattr(pace, "LOOK_S", 0.0)
    told: list[dict[str, float]] = []
    context = LocalContext(tmp_path / "stopped", lambda m: told.append(dict(m)))
    with pytest.raises(SystemExit) as ended, context.heeding_sigterm():
        train_generator(config, *some_images(), context)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    progress, _ = read_progress(tmp_path / "stopped" / "checkpoint", config)
    assert progress["step"] == stop < progress["of"]
    with pytest.raises(UserError, match=rf"is of step {stop} of 30, which is no result yet; give the command again"):
        result_of(tmp_path / "stopped" / "checkpoint", config)
    monkeypatch.setattr(GanTraining, "step", step)
    state, rest = train(config, tmp_path / "stopped")
    assert timeless(told + rest) == timeless(reports)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    progress, _ = read_progress(tmp_path / "stopped" / "checkpoint", config)
    assert progress["step"] == progress["of"]


def test_a_training_that_goes_on_is_judged_by_the_network_that_judged_it_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(kimg=0.24, quality={"network": "classifier", "epochs": 1})
    _, reports = train(config, tmp_path / "whole")
    step = GanTraining.step

    def failing(self: GanTraining, i: int, *given: Any) -> None:
        if i == 15:
            raise ConnectionError
        step(self, i, *given)

    monkeypatch.setattr(GanTraining, "step", failing)
    with pytest.raises(ConnectionError):
        train(config, tmp_path / "stopped")
    monkeypatch.setattr(GanTraining, "step", step)
    monkeypatch.setattr(quality, "train_classifier", lambda *_: pytest.fail("it is trained anew, and its FIDs do not compare"))
    _, rest = train(config, tmp_path / "stopped")
    assert timeless(rest) == timeless(reports)[-len(rest) :]
    assert "fid" in rest[-1]


@pytest.mark.exhaustive
def test_a_long_interval_says_early_how_long_it_all_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, and before the first report."""
    monkeypatch.setattr(gan_trainer, "TELL_AFTER_S", 0.0)
    told: list[int] = []

    def reported(metrics: Any) -> None:
        told.append(capsys.readouterr().err.count(" to go"))

    train_generator(settings(), *some_images(), LocalContext(tmp_path, reported))
    assert told[0] == 1
    assert sum(told) == 1


def test_two_workers_on_different_parts_of_a_batch_stay_equal(tmp_path: Path) -> None:
    lengths = {"batch_size": 32, "kimg": 0.32, "report_kimg": 0.16, "snapshot_kimg": 0.32}
    config = settings(keep="last", ada_target=0.6, path_length=2.0, **lengths)
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    (tmp_path / "two").mkdir()
    run_two_workers("gan_process.py", str(tmp_path / "two"))
    one, two = (torch.load(tmp_path / "two" / f"result{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    untrained = GanTraining(config, LocalContext(tmp_path)).average.state_dict()
    assert not torch.equal(one["synth.const"], untrained["synth.const"])
    # at the last step, two after probabilities were adapted: the checkpoint is all workers'
    signs = [torch.load(tmp_path / "two" / f"signs{rank}.pt", weights_only=True)[-1] for rank in (0, 1)]
    assert signs[0][0] != signs[1][0]
    stored = read_progress(tmp_path / "two" / "checkpoint", config)[1]["signs"]
    torch.testing.assert_close(stored, (signs[0] + signs[1]) / 2)


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    state, _ = train(settings(), tmp_path)
    again, reports = train(settings(), tmp_path)
    assert reports == []
    assert all(torch.equal(state[key], again[key]) for key in state)
    generator, kept = result_of(tmp_path / "checkpoint", settings())
    assert all(torch.equal(value, state[key]) for key, value in generator.state_dict().items())
    assert kept["diversity"] > 0


def test_other_settings_do_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """One that the checkpoint does not know of came later, and was at its default."""
    train(settings(), tmp_path)
    written = tmp_path / "checkpoint" / "gan.json"
    progress = json.loads(written.read_text())
    del progress["config"]["quality"]["epochs"]
    written.write_text(json.dumps(progress))
    assert result_of(written.parent, settings())[1]["diversity"] > 0
    with pytest.raises(UserError, match=r"trained with other settings under gan\.\*"):
        train(settings(r1_gamma=5), tmp_path)
    for folder in tmp_path.glob("checkpoint*"):
        (folder / "gan.json").unlink()
    with pytest.raises(UserError, match=r"has no gan\.json, and there is none before it"):
        train(settings(), tmp_path)


@pytest.mark.parametrize("rare", [4, 12])
def test_a_rare_class_is_as_rare_among_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rare: int) -> None:
    """Among those that the discriminator sees; and with as many images of each class z is as it was drawn."""
    images, labels = torch.rand(24 + rare, 1, 8, 8), torch.arange(3).repeat_interleave(torch.tensor([12, rare, 12]))
    seen, turned = torch.zeros(3), []
    forward, of_classes = Discriminator.forward, gan.of_classes

    def looked(self: Discriminator, x: Tensor, y: Tensor) -> Tensor:
        seen.add_(torch.bincount(y, minlength=3))
        return forward(self, x, y)

    monkeypatch.setattr(Discriminator, "forward", looked)
    monkeypatch.setattr(gan, "of_classes", lambda *given: (turned.append(len(given[0])), of_classes(*given))[1])
    train_generator(settings(mode_seeking=0.0, path_length=2.0), images, labels, LocalContext(tmp_path))
    # of the step's 24 images a third are real; 50 steps, path lengths every fourth (r1 every sixteenth)
    assert turned == ([] if rare == 12 else [8] * (50 * 2 + 12))
    assert float(seen[1] / seen.sum()) == pytest.approx(rare / len(labels), abs=0.04)


def spoil(monkeypatch: pytest.MonkeyPatch, qualities: list[dict[str, float]]) -> None:
    """The judge finds these qualities, one a snapshot."""
    found = iter(qualities)
    monkeypatch.setattr(gan_trainer.Judge, "__call__", lambda self, generator: dict(next(found)))


@pytest.mark.parametrize(
    ("unnoted", "rare", "again"),
    [
        ([], 4, False),
        (["classes_as_images"], 4, True),
        (["classes_as_images"], 12, False),
        (["pairs_share_class_alone"], 12, True),
    ],
)
def test_the_best_of_a_training_from_before_is_judged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnoted: list[str], rare: int, again: bool
) -> None:
    """Where samples had all classes equally and have them as images do now, the two FIDs cannot be compared; where two of a class
    had more in common, their distances.
    """
    images, labels = torch.rand(24 + rare, 1, 8, 8), torch.arange(3).repeat_interleave(torch.tensor([12, rare, 12]))
    short, long = settings(kimg=0.28, fade=0.3), settings(kimg=0.56, fade=0.3)
    trunk, contexts = tmp_path / "trunk", [LocalContext(tmp_path / name, lambda _: None) for name in ("short", "long")]
    spoil(monkeypatch, [found(3, 1)] * 10)
    train_generator(short, images, labels, contexts[0], trunk=trunk)
    progress = json.loads((trunk / "gan.json").read_text())
    seal(trunk, "gan.json", {key: value for key, value in progress.items() if key not in unnoted})
    spoil(monkeypatch, [*([found(50, 1)] if again else []), *[found(20, 1)] * 10])
    train_generator(long, images, labels, contexts[1], shorter=trunk)
    (newest, *_) = contexts[1].checkpoints()
    best = json.loads((Path(newest) / "gan.json").read_text())["best"]
    assert (best["fid"], best["kimg"] > progress["best"]["kimg"]) == ((20, True) if again else (3, False))


def found(fid: float | None, lowest: float) -> dict[str, float]:
    return {"diversity": 1.0, "lowest_diversity": lowest} | ({} if fid is None else {"fid": fid})


@pytest.mark.parametrize(
    ("qualities", "keep", "best"),
    [
        ([found(9, 1), found(3, 1), found(5, 1)], "best", 1),
        ([found(9, 1), found(3, 1), found(5, 1)], "last", 2),
        # a collapsed generator can have a low FID: three good digits of each class
        ([found(9, 0.9), found(3, 0.1), found(20, 0.1)], "best", 0),
        ([found(9, 0.1), found(30, 0.9), found(40, 0.9)], "best", 1),
        ([found(None, 0.9), found(None, 0.9), found(None, 0.1)], "best", 1),
        ([found(None, 0.9), found(None, float("nan")), found(None, float("nan"))], "best", 0),
        ([found(9, 0.9), found(float("inf"), 0.9), found(float("inf"), 0.9)], "best", 0),
        # all collapsed: the first is the least trained
        ([found(90, 0.05), found(30, 0.2), found(5, 0.39)], "best", 2),
        ([found(90, 0.05), found(5, 0.2), found(30, 0.39)], "best", 1),
        ([found(None, 0.05), found(None, 0.3), found(None, 0.2)], "best", 1),
        ([found(None, 0.05), found(None, 0.2), found(None, float("nan"))], "best", 1),
        ([found(None, float("nan")), found(None, float("nan")), found(None, 0.1)], "best", 2),
    ],
)
def test_the_best_snapshot_is_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qualities: list[dict[str, float]], keep: str, best: int
) -> None:
    spoil(monkeypatch, qualities)
    config = settings(kimg=0.24, keep=keep)
    averages: list[dict[str, Tensor]] = []
    reports: list[Mapping[str, float]] = []
    result = train_generator(
        config, *some_images(), LocalContext(tmp_path, reports.append),
        lambda average, kimg, quality: averages.append({k: v.clone() for k, v in average.state_dict().items()}),
    ).state_dict()  # fmt: skip
    assert len(averages) == 3
    equal = [all(torch.equal(result[key], average[key]) for key in result) for average in averages]
    assert equal == [k == best for k in range(3)]
    collapsed = [float(not q["lowest_diversity"] >= 0.4) for q in qualities]
    assert [r["collapsed"] for r in reports if "collapsed" in r] == collapsed
    kept = result_of(tmp_path / "checkpoint", config)[1]
    assert kept["kimg"] == pytest.approx(0.08 * (best + 1))
    assert kept["collapsed"] == collapsed[best]
    assert bool(diversity.warning_of_collapse(kept, "")) == bool(collapsed[best])


def test_a_training_that_diverges_late_ends_with_its_best_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averages: list[dict[str, Tensor]] = []
    step = GanTraining.step

    def spoiled(self: GanTraining, i: int, images: Tensor, labels: Tensor) -> None:
        step(self, i, images, labels)
        if i == 25:
            self.generator.synth.const.data.fill_(float("nan"))

    monkeypatch.setattr(GanTraining, "step", spoiled)
    reports: list[Mapping[str, float]] = []
    generator = train_generator(
        settings(), *some_images(), LocalContext(tmp_path, reports.append),
        lambda average, kimg, quality: averages.append({k: v.clone() for k, v in average.state_dict().items()}),
    )  # fmt: skip
    assert [round(r["kimg"], 2) for r in reports] == [0.04, 0.08, 0.12, 0.16, 0.2, 0.24][: len(reports)]
    assert len(reports) == 6, "reported every 5 steps, ended at the first report that was no number"
    assert len(averages) == 2
    assert all(torch.equal(value, averages[-1][key]) for key, value in generator.state_dict().items())
    kept = result_of(tmp_path / "checkpoint", settings())[1]
    assert (kept["diverged"], kept["kimg"]) == (True, pytest.approx(0.16))
    assert train(settings(), tmp_path)[1] == [], "it is finished"


def test_a_training_that_diverges_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"diverged.*lower gan\.lr_generator"):
        train(settings(lr_generator=1e20, lr_discriminator=1e20, kimg=2), tmp_path)


def test_bf16_stays_close_to_float32_at_first(tmp_path: Path) -> None:
    """The first steps' losses; and a difference there must be, or the setting does nothing."""
    config = {"kimg": 0.04, "report_kimg": 0.008, "snapshot_kimg": 0.04}
    full, half = (train(settings(**config, precision=p), tmp_path / p)[1] for p in ("float32", "bf16"))
    for a, b in zip(full, half, strict=True):
        assert b["loss_d"] == pytest.approx(a["loss_d"], abs=0.05)
        assert b["loss_g"] == pytest.approx(a["loss_g"], abs=0.05)
    assert [a["loss_d"] for a in full] != [b["loss_d"] for b in half]


def test_adaptive_augmentation_moves_towards_its_target(tmp_path: Path) -> None:
    """A discriminator on 40 images is soon sure of all of them: mean sign near 1, above any target."""
    config = settings(augment=0.0, ada_target=0.05, ada_kimg=1.0, kimg=0.8, report_kimg=0.2, snapshot_kimg=0.8, r1_gamma=0.01)
    _, reports = train(config, tmp_path)
    probabilities = [r["augment"] for r in reports]
    # 4 steps of 8 images move it by 0.032
    assert all(p / 0.032 == pytest.approx(round(p / 0.032), abs=1e-6) for p in probabilities)
    signs = [r["real_sign"] for r in reports]
    assert any(s > 0.05 for s in signs)
    assert max(probabilities) > 0


def test_path_length_penalty_of_the_paper(tmp_path: Path) -> None:
    """(|J^T y| - a)^2 with a the running mean (decay 0.99), by the weight and the interval, on half of the batch."""
    training = GanTraining(settings(path_length=2.0, path_interval=4), LocalContext(tmp_path))
    means = []
    for step in (1, 2):
        given, draws = gan.StepDraws(0, step, 8), gan.StepDraws(0, step, 8)
        found = training._path_penalty(given)
        w, _ = gan.mixed_w(training.generator, 0.5, draws)
        noise = draws.own_normal(torch.empty(4, 1, 8, 8))
        assert torch.equal(draws.uniform(), given.uniform()), "no image of noise is drawn for the others of the batch"
        lengths = gan.path_lengths(training.generator.eval().synth, w[:4], noise).detach()
        means.append(0.99 * (means[-1] if means else 0.0) + 0.01 * float(lengths.mean()))
        assert float(training.path_mean) == pytest.approx(means[-1], rel=1e-5)
        assert found.item() == pytest.approx(8.0 * float(((lengths - means[-1]) ** 2).mean()), rel=1e-4)
    found.backward()
    gradients = [p.grad for p in training.generator.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in gradients) > 0


def test_unconditional_training_needs_no_labels(tmp_path: Path) -> None:
    config = settings(architecture=SHAPE, kimg=0.08, report_kimg=0.08)
    images, _ = some_images()
    generator = train_generator(config, images, torch.zeros(40, dtype=torch.int64), LocalContext(tmp_path))
    assert generator.class_of(torch.randn(3, 8)) is None
    assert generator.synthesis(generator.mapping(torch.randn(3, 8))).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"augmentations": ["flip", "flip"]}, "name one twice"),
        ({"augmentations": ["mirror"]}, "augmentations"),
        ({"augmentations": [], "ada_target": 0.6}, "there are none"),
        ({"architecture": {"conv_clamp": 256}}, "conv_clamp belongs to imported generators"),
        ({"augment": 0.9}, "less than or equal to 0.8"),
        ({"report_kimg": 10, "snapshot_kimg": 5}, "must be a multiple of report_kimg"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GanConfig.model_validate(values)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gan\.batch_size 9 must be a multiple of 2"):
        train(settings(batch_size=9), tmp_path)


def test_the_default_architecture_is_the_shipped_ones() -> None:
    assert GanConfig().architecture == StyleGAN2Config()
