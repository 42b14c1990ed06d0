"""The encoder: its codes, its training against a plain one and killed, its folder, and the shipped one on real digits."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchrun import run_two_workers

from dmat_ray import pace, weights
from dmat_ray.config import DataConfig, EncoderConfig
from dmat_ray.data.sources import list_examples, read_pixels
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import encoder_trainer, generators
from dmat_ray.manifold.encoder import (
    Encoder,
    fingerprint_encoder,
    load_encoder,
    locate_encoder,
    save_encoder,
    untrained,
)
from dmat_ray.manifold.encoder_trainer import fresh_errors, result_of, sample_w, train_encoder
from dmat_ray.manifold.gan import StepDraws
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.rng import derive

pytestmark = pytest.mark.slow

SHA = "ab" * 32


def settings(**values: Any) -> EncoderConfig:
    short = {"width": 8, "width_max": 16, "kimg": 1.6, "batch_size": 16, "report_kimg": 0.16, "w_weight": 0.5}
    return EncoderConfig.model_validate({**short, **values})


def random_encoder(generator: StyleGAN2, seed: int = 0) -> Encoder:
    """One whose codes differ from image to image."""
    torch.manual_seed(seed)
    encoder = untrained(settings(), generator)
    with torch.no_grad():
        encoder.head.weight.normal_(std=0.3)
        encoder.head.bias.normal_(std=0.3)
    return encoder.eval().requires_grad_(False)


def images(count: int, seed: int = 0, size: int = 8, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def trained(generator: StyleGAN2, tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, list[dict[str, float]], Path]:
    """An encoder of `generator` after a second of training, its reports, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    reports: list[dict[str, float]] = []
    context = LocalContext(folder, lambda m: reports.append(dict(m)))
    return train_encoder(settings(kimg=8, report_kimg=0.8), generator, SHA, context), reports, folder / "checkpoint"


@pytest.mark.parametrize(("resolution", "channels", "num_ws"), [(8, 1, 1), (28, 3, 5), (30, 1, 2), (2, 1, 3), (64, 3, 10)])
def test_any_size_of_image_and_code(resolution: int, channels: int, num_ws: int) -> None:
    encoder = Encoder(resolution, channels, num_ws, w_dim=6, width=8, width_max=16)
    encoder.w_mean.copy_(torch.arange(6.0))
    encoder.w_std.fill_(2.0)
    x = images(3, size=resolution, channels=channels)
    assert torch.equal(encoder(x), torch.arange(6.0).expand(3, num_ws, 6)), "untrained, it says w_mean"
    with torch.no_grad():
        encoder.head.bias.fill_(0.5)
    assert torch.equal(encoder(x), (torch.arange(6.0) + 1.0).expand(3, num_ws, 6)), "offsets are in units of w_std"
    assert encoder(x).dtype == torch.float32


def test_a_code_does_not_depend_on_the_neighbours(generator: StyleGAN2) -> None:
    encoder = random_encoder(generator)
    batch, others = images(6), images(6, seed=1)
    others[2] = batch[2]
    codes, mixed = encoder(batch), encoder(others)
    assert torch.equal(codes[2], mixed[2])
    assert not torch.equal(codes[3], mixed[3])
    torch.testing.assert_close(encoder(batch[2:3])[0], codes[2], rtol=1e-5, atol=1e-6)
    assert codes.std(dim=0).max() > 0.01


def test_a_step_is_the_plain_one(make_generator: Any, tmp_path: Path) -> None:
    """Twenty steps of Adam by torch's own, with the loss and the samples written out."""
    generator = make_generator()
    for layer in generator.synth.images:
        layer.conv.weight *= 5  # many pixels outside [0, 1], where samples are clamped and what is compared is not
    config = settings(batch_size=6, kimg=0.12, w_weight=0.3, l1_weight=2.0, l2_weight=5.0, spread=0.4, style_mixing=0.6)
    torch.manual_seed(derive(config.seed, "encoder weights") % 2**31)
    plain = untrained(config, generator)
    optimizer = torch.optim.Adam(plain.parameters(), lr=config.lr)
    expected = []
    for i in range(1, 21):  # the rate grows over the first tenth of them
        optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * (i - 1) / 20)) / 2 * (0.5 if i == 1 else 1)
        draws = StepDraws(derive(config.seed, "encoder"), i, 6)
        one, two = generator.map(draws.normal(8)), generator.map(draws.normal(8))
        cut, coin = draws.integers(1, generator.num_ws).tolist(), draws.uniform().tolist()
        noise = draws.normal(generator.num_ws, 8)
        rows = []
        for k in range(6):
            layers = [two[k] if coin[k] < 0.6 and layer >= cut[k] else one[k] for layer in range(generator.num_ws)]
            rows.append(torch.stack(layers) + 0.4 * generator.w_std * noise[k])
        w = torch.stack(rows)
        x = ((generator.synth(w) + 1) / 2).clamp(0, 1)
        code = plain(x)
        y = (generator.synth(code) + 1) / 2
        parts = F.mse_loss((code - generator.w_mean) / generator.w_std, (w - generator.w_mean) / generator.w_std), F.l1_loss(y, x)
        loss = 0.3 * parts[0] + 2.0 * parts[1] + 5.0 * F.mse_loss(y, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    reports: list[dict[str, float]] = []
    context = LocalContext(tmp_path, lambda m: reports.append(dict(m)))
    encoder = train_encoder(config.model_copy(update={"report_kimg": 0.006}), generator, SHA, context)
    assert [r["loss"] for r in reports] == pytest.approx(expected, rel=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_samples_keep_their_class_and_cover_every_layer(make_generator: Any) -> None:
    generator = make_generator()
    w = sample_w(generator, settings(spread=0, style_mixing=0), StepDraws(1, 1, 500))
    assert torch.equal(w, w[:, :1].expand_as(w)), "one z, all layers"
    mixed = sample_w(generator, settings(spread=0, style_mixing=1), StepDraws(1, 1, 500))
    assert torch.equal(mixed[:, 0], w[:, 0])
    assert not (mixed[:, -1] == w[:, 0]).all(dim=1).any()
    spread = sample_w(generator, settings(spread=0.5, style_mixing=0), StepDraws(1, 1, 500))
    noise = (spread - w) / generator.w_std
    assert noise.std(dim=(0, 2)).tolist() == pytest.approx([0.5] * generator.num_ws, rel=0.05)
    assert (noise[:, 0] * noise[:, 1]).mean().item() == pytest.approx(0, abs=0.02), "every layer's is its own"


def test_a_generator_of_one_layer_has_nothing_to_mix(make_generator: Any) -> None:
    generator = make_generator()
    generator.num_ws = 1
    w = sample_w(generator, settings(spread=0, style_mixing=1), StepDraws(1, 1, 5))
    assert torch.equal(w, generator.mapping(StepDraws(1, 1, 5).normal(8)))


def test_a_conditional_generator_mixes_within_a_class(make_generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make_generator()
    generator.num_classes = 3
    seen: list[Tensor] = []
    monkeypatch.setattr(generator, "mapping", lambda z: (seen.append(z), StyleGAN2.mapping(generator, z))[1])
    sample_w(generator, settings(), StepDraws(1, 1, 100))
    assert torch.equal(seen[0][:, :3], seen[1][:, :3])
    assert not torch.equal(seen[0][:, 3:], seen[1][:, 3:])


def test_a_short_training_learns(generator: StyleGAN2, trained: Any) -> None:
    encoder, reports, checkpoint = trained
    assert [r["kimg"] for r in reports] == pytest.approx([0.8 * k for k in range(1, 11)])
    assert reports[-1]["loss"] < 0.7 * reports[0]["loss"]
    errors = fresh_errors(encoder, generator, settings(), samples=256)
    assert errors["l1"] < 0.6 * errors["l1_of_mean"]
    assert errors["l1_of_w"] < 0.6 * errors["l1_of_mean"]
    assert errors["samples"] == 256
    # against numbers computed here, on samples drawn here
    w = generator.mapping(torch.randn(400, 8, generator=torch.Generator().manual_seed(9)))
    x = generator.synthesis(w)
    l1 = (generator.synthesis(encoder(x)) - x).abs().mean().item()
    assert l1 == pytest.approx(errors["l1_of_w"], rel=0.2)
    result = result_of(checkpoint, settings(kimg=8, report_kimg=0.8), generator, SHA)
    half = encoder.head.weight.half().float()
    assert torch.equal(result.head.weight, half)


def test_bf16_learns_about_the_same(generator: StyleGAN2, tmp_path: Path) -> None:
    reports: dict[str, list[dict[str, float]]] = {"float32": [], "bf16": []}
    for precision, found in reports.items():
        context = LocalContext(tmp_path / precision, lambda m, found=found: found.append(dict(m)))
        train_encoder(settings(precision=precision), generator, SHA, context)
    full, lowered = reports["float32"][-1], reports["bf16"][-1]
    assert lowered["loss"] == pytest.approx(full["loss"], rel=0.05)
    assert lowered["loss"] != full["loss"]


def start(folder: Path, generator_folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("encoder_process.py")
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
    try:
        context = LocalContext(tmp_path / "stopped", lambda m: told.append(dict(m)), heed_sigterm=True)
        with pytest.raises(SystemExit) as ended:
            train_encoder(config, generator, SHA, context)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert json.loads((tmp_path / "stopped" / "checkpoint" / "encoder_progress.json").read_text())["step"] == stop
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


def test_a_finished_training_is_not_trained_again(generator: StyleGAN2, trained: Any) -> None:
    encoder, _, checkpoint = trained
    reports: list[Any] = []
    config = settings(kimg=8, report_kimg=0.8)
    again = train_encoder(config, generator, SHA, LocalContext(checkpoint.parent, reports.append))
    assert reports == []
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in encoder.state_dict().items())


def test_a_checkpoint_of_another_training_is_refused(generator: StyleGAN2, trained: Any, tmp_path: Path) -> None:
    shutil.copytree(trained[2], tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"trained with other settings under encoder\.\*"):
        train_encoder(settings(), generator, SHA, LocalContext(tmp_path))
    config = settings(kimg=8, report_kimg=0.8)
    with pytest.raises(UserError, match="trained for another generator"):
        train_encoder(config, generator, "cd" * 32, LocalContext(tmp_path))
    (tmp_path / "checkpoint" / "encoder_progress.json").unlink()
    with pytest.raises(UserError, match=r"has no encoder_progress\.json, and there is none before it"):
        train_encoder(config, generator, SHA, LocalContext(tmp_path))


def test_a_training_that_diverges_says_so(generator: StyleGAN2, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"diverged.*lower encoder\.lr \(now 1e\+20\)"):
        train_encoder(settings(lr=1e20), generator, SHA, LocalContext(tmp_path))
    assert not (tmp_path / "checkpoint").exists()


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"encoder\.batch_size 9 must be a multiple of 2.*cluster\.train_workers"):
        encoder_trainer.check_workers(settings(batch_size=9), 2)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="all 0: there is nothing to minimise"):
        settings(w_weight=0, l1_weight=0, l2_weight=0)


@pytest.fixture
def saved(generator: StyleGAN2, tmp_path: Path) -> Path:
    save_encoder(tmp_path / "encoder", random_encoder(generator), {"generator_sha256": SHA, "note": "a test"})
    return tmp_path / "encoder"


def test_what_is_saved_is_loaded(generator: StyleGAN2, saved: Path) -> None:
    encoder, loaded = random_encoder(generator), load_encoder(saved, SHA)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    x = images(5)
    torch.testing.assert_close(loaded(x), encoder(x), rtol=0, atol=0.01)
    stored = load_file(saved / "encoder.safetensors")
    assert torch.equal(stored["w_std"], generator.w_std)
    for name, value in encoder.state_dict().items():
        np.testing.assert_allclose(stored[name].float().numpy(), value.numpy(), rtol=1e-3, atol=1e-6)
    card = json.loads((saved / "encoder.json").read_text())
    assert (card["version"], card["generator_sha256"], card["note"]) == (1, SHA, "a test")
    assert card["architecture"] == {
        "resolution": 8, "channels": 1, "num_ws": generator.num_ws, "w_dim": 8, "width": 8, "width_max": 16,
    }  # fmt: skip
    assert sorted(p.name for p in saved.iterdir()) == ["encoder.json", "encoder.safetensors"]
    digest = subprocess.run(["sha256sum", saved / "encoder.safetensors"], capture_output=True, text=True, check=True).stdout
    assert fingerprint_encoder(saved) == digest.split()[0] == card["weights_sha256"]


def test_a_write_that_fails_leaves_no_half_encoder(generator: StyleGAN2, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every file operation in turn: what is there afterwards is the old one, or says that it is none."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    replace, calls = Path.replace, []

    def fail(path: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == stop:
            raise OSError("disk full")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    for stop in (1, 2):  # noqa: B007
        calls.clear()
        for name, content in before.items():
            (saved / name).write_bytes(content)
        with pytest.raises(OSError, match="disk full"):
            save_encoder(saved, random_encoder(generator, seed=5), {"generator_sha256": SHA})
        with pytest.raises(UserError, match=r"unfinished one \(no encoder\.json\)"):
            load_encoder(saved, SHA)
        assert not list(saved.glob(f".{'encoder.safetensors'}*"))


def edit(folder: Path, **values: Any) -> None:
    card = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps({**card, **values}))


def rewrite(folder: Path, change: Any) -> None:
    """Other weights, with a card that vouches for them."""
    state = load_file(folder / "encoder.safetensors")
    change(state)
    save_file(state, folder / "encoder.safetensors")
    edit(folder, weights_sha256=fingerprint_encoder(folder))


def sizes(**values: Any) -> dict[str, Any]:
    old = {"resolution": 8, "channels": 1, "num_ws": 4, "w_dim": 8, "width": 8, "width_max": 16}
    return {"architecture": {**old, **values}}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"there is no encoder at '.*'; train one with jobs/train_encoder\.py"),
        (
            lambda f: (f / "encoder.json").unlink(),
            r"an unfinished one \(no encoder\.json\); train one with jobs/train_encoder\.py",
        ),
        (lambda f: (f / "encoder.safetensors").unlink(), r"has no encoder\.safetensors; train one"),
        (lambda f: truncate(f / "encoder.safetensors"), r"encoder\.safetensors' is damaged .* its sha256 begins with"),
        (lambda f: truncate(f / "encoder.json"), r"encoder\.json' is damaged"),
        (lambda f: (f / "encoder.json").write_text("[1]"), "is damaged: a list, not a JSON object"),
        (lambda f: (f / "encoder.json").write_text("[" * 100_000), "is damaged"),
        (lambda f: edit(f, version=2), "has format version 2, this program reads 1"),
        (
            lambda f: edit(f, generator_sha256="cd" * 32),
            "was trained for generator cdcdcdcdcdcd, but the one given is abababababab",
        ),
        (lambda f: edit(f, generator_sha256=None), "was trained for generator None"),
        (lambda f: edit(f, architecture=None), "architecture must give resolution, channels"),
        (lambda f: edit(f, **sizes(resolution="8")), r"architecture\.resolution is 8"),
        (lambda f: edit(f, **sizes(resolution=0)), r"architecture\.resolution is 0"),
        (lambda f: edit(f, **sizes(width_max=10**12)), r"architecture\.width_max is 1000000000000"),
        (lambda f: edit(f, **sizes(width_max=10**6)), r"hidden\.weight is \(16, \d+\), not \(1000000, \d+\)"),
        (lambda f: edit(f, **sizes(num_ws=7)), r"head\.weight is \(\d+, 16\), not \(56, 16\)"),
        (lambda f: edit(f, **sizes(resolution=16)), "do not fit its card: .*blocks"),
        (lambda f: edit(f, **sizes(channels=3)), r"do not fit its card: .*stem\.weight"),
        (lambda f: edit(f, **sizes(channels=1 << 20)), r"do not fit its card: .*stem\.weight"),
        (lambda f: rewrite(f, lambda s: s.pop("stem.bias")), r"do not fit its card: .*stem\.bias"),
        (lambda f: rewrite(f, lambda s: s.pop("head.bias")), r"head\.bias is not there"),
        (lambda f: rewrite(f, lambda s: s.update(more=torch.zeros(1))), "do not fit its card: .*more"),
        (lambda f: rewrite(f, lambda s: s["head.bias"].fill_(math.nan)), r"are not finite: head\.bias"),
    ],
)
def test_what_is_wrong_with_an_encoder_is_said_in_a_line(saved: Path, damage: Any, message: str) -> None:
    load_encoder(saved, SHA)
    damage(saved)
    with pytest.raises(UserError, match=message) as error:
        load_encoder(saved, SHA)
    assert "\n" not in str(error.value)


def test_damaged_weights_that_the_card_vouches_for(saved: Path) -> None:
    truncate(saved / "encoder.safetensors")
    edit(saved, weights_sha256=fingerprint_encoder(saved))
    with pytest.raises(UserError, match="do not fit its card"):
        load_encoder(saved, SHA)


def test_where_an_encoder_is_looked_for(generator_folder: Path, saved: Path, tmp_path: Path) -> None:
    shipped = Path(weights.generator_folder("mnist32"))
    other = tmp_path / "elsewhere"
    assert locate_encoder(str(other), tmp_path, "mnist32").local == other, "the setting first, there or not"
    assert locate_encoder(None, tmp_path, "mnist32").local == saved
    assert locate_encoder(None, other, "mnist32").local == shipped
    with pytest.raises(UserError, match=r"jobs/train_encoder\.py.*--projection\.start nearest"):
        locate_encoder(None, other, str(generator_folder))
    with pytest.raises(UserError, match=r"has no encoder\.safetensors"):
        fingerprint_encoder(other)


def digits(count: int) -> Tensor:
    """Test digits of MNIST-5k at 32x32, in [0, 1]."""
    config = DataConfig(source="mnist5k", resolution=32, channels=1, test_limit=count)
    pixels = read_pixels(list_examples(config).rows("test"), config)
    return torch.from_numpy(np.stack(pixels)).float() / 255


def test_the_shipped_encoder_is_for_the_shipped_generator_and_small() -> None:
    folder = Path(weights.generator_folder("mnist32"))
    card = json.loads((folder / "encoder.json").read_text())
    assert card["generator_sha256"] == generators.fingerprint("mnist32")
    assert card["training"] == EncoderConfig().model_dump(mode="json"), "the defaults are the recipe"
    assert card["command"] == "python jobs/train_encoder.py"
    assert sum((folder / name).stat().st_size for name in ("encoder.safetensors", "encoder.json")) < 1_000_000


def test_the_shipped_encoder_beats_the_nearest_of_2000_samples_on_real_digits() -> None:
    generator = generators.load_generator("mnist32")
    encoder = load_encoder(weights.generator_folder("mnist32"), generators.fingerprint("mnist32"))
    x = digits(200)
    z = torch.randn(2000, generator.z_dim, generator=torch.Generator().manual_seed(0))
    samples = torch.cat([generator.synthesis(generator.mapping(part)) for part in z.split(250)])
    nearest = samples[torch.cdist(x.flatten(1), samples.flatten(1)).argmin(dim=1)]
    found = generator.synthesis(encoder(x))
    assert (found - x).abs().mean() < 0.75 * (nearest - x).abs().mean()
    assert (found - x).square().mean() < 0.5 * (nearest - x).square().mean()
