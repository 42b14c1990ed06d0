"""Decoders that come as a program: the same images and gradients as the module they were made of, and nothing but arithmetic."""

import contextlib
import functools
import hashlib
import io
import json
import pickle
import re
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_files import odd_directory
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.config import AttackConfig, GeneratorConfig, LatentThreat, ProjectionConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold import generators
from dmat_ray.manifold.formats import exported
from dmat_ray.manifold.formats.programs import load_program
from dmat_ray.manifold.formats.sources import check_source
from dmat_ray.manifold.formats.stored import RefusedError
from dmat_ray.manifold.projection import Projector
from dmat_ray.types import Batch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]
CPU = torch.device("cpu")
W_DIM = 5
FORMATS = ["script", "trace", "export"]


class Decoder(nn.Module):
    """w (B, 5) -> (B, 1, 8, 8) in [0, 1], with what VAEs have: batch norm, dropout, upsampling, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(W_DIM, 8 * 4)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.last = nn.Conv2d(6, 1, 3, padding=1)

    def features(self, w: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(w).view(w.shape[0], 8, 2, 2)))
        x = F.gelu(self.up(x), approximate="tanh") * torch.tensor([1.5])
        return self.last(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def forward(self, w: Tensor) -> Tensor:
        return self.features(w).sigmoid()


class LayeredDecoder(Decoder):
    """w (B, 3, 5) -> (B, 3, 8, 8) in [-1, 1], each layer used in another place."""

    def __init__(self) -> None:
        super().__init__()
        self.style = nn.Linear(W_DIM, 1)
        self.colour = nn.Linear(W_DIM, 3)

    def forward(self, w: Tensor) -> Tensor:
        x = self.features(w[:, 0]) * (1 + self.style(w[:, 1]))[:, :, None, None]
        return (x + self.colour(w[:, 2])[:, :, None, None]).tanh()


CARDS: dict[type[nn.Module], dict[str, Any]] = {
    Decoder: {"w_dim": W_DIM, "resolution": 8, "channels": 1},
    LayeredDecoder: {"w_dim": W_DIM, "num_ws": 3, "resolution": 8, "channels": 3, "output_range": [-1, 1]},
}


def module(kind: type[nn.Module]) -> Any:
    """A seeded decoder in eval mode whose batch-norm statistics are not the initial ones, and whose images vary."""
    torch.manual_seed(1)
    decoder = kind()
    with torch.no_grad():
        decoder.last.weight.mul_(20)  # type: ignore[union-attr, operator]
        shape = (64, W_DIM) if kind is Decoder else (64, CARDS[kind].get("num_ws", 1), W_DIM)
        decoder(torch.randn(shape))
    return decoder.eval()


def save(program: nn.Module, path: Path, how: str, w: Tensor, *, dynamic: bool = True) -> Path:
    """Export as the guide says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "script":
        torch.jit.script(program).save(str(path))
    elif how == "trace":
        torch.jit.trace(program, w, check_trace=False).save(str(path))
    else:
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        torch.export.save(torch.export.export(program, (w,), dynamic_shapes=shapes), path.with_suffix(".pt2"))
        return path.with_suffix(".pt2")
    return path


def example(kind: type[nn.Module] = Decoder, count: int = 2) -> Tensor:
    layers = CARDS[kind].get("num_ws", 1)
    w = torch.randn(count, layers, W_DIM, generator=torch.Generator().manual_seed(count))
    return w[:, 0] if kind is Decoder else w


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made(kind, how): a program's file, exported once."""
    root = tmp_path_factory.mktemp("programs")

    @functools.cache
    def make(kind: type[nn.Module], how: str) -> Path:
        return save(module(kind), root / f"{kind.__name__}_{how}.pt", how, example(kind))

    return make


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., exported.ExportedDecoder]:
    """load(program, **card): imported, and loaded as everything else loads a generator."""

    def make(path: Path, **card: Any) -> exported.ExportedDecoder:
        (tmp_path / "mine.json").write_text(json.dumps({**CARDS[Decoder], **card}))
        exported.import_program(path, tmp_path / "mine.json", tmp_path / "generator")
        generator = generators.load_generator(str(tmp_path / "generator"))
        assert isinstance(generator, exported.ExportedDecoder)
        return generator

    return make


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("kind", [Decoder, LayeredDecoder])
def test_images_and_gradients_are_the_modules(made: Any, load: Any, kind: type[nn.Module], how: str) -> None:
    generator, original = load(made(kind, how), **CARDS[kind]), module(kind)
    w = torch.randn(7, generator.num_ws, W_DIM, generator=torch.Generator().manual_seed(3), requires_grad=True)
    expected = original(w[:, 0] if kind is Decoder else w)
    if kind is LayeredDecoder:
        expected = (expected + 1) / 2
    assert 0.1 < expected.std() < 0.5
    x = generator.synthesis(w, clamp=False)
    torch.testing.assert_close(x, expected, atol=1e-6, rtol=0)
    weights = torch.randn(x.shape)
    (found,), (wanted,) = (torch.autograd.grad((y * weights).sum(), w) for y in (x, expected))
    assert (wanted.abs().amax(dim=(0, 2)) > 1e-2).all(), "each layer matters"
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in generator.parameters())
    assert torch.equal(generator.synthesis(w), x.clamp(0, 1))
    assert not generator.synthesis(w.detach()).requires_grad


@pytest.mark.parametrize("how", FORMATS)
def test_the_folder_is_a_generator(made: Any, load: Any, tmp_path: Path, how: str) -> None:
    generator, path = load(made(Decoder, how), name="mine"), str(tmp_path / "generator")
    card = generators.read_card(path)
    assert card["kind"] == ("torch_export" if how == "export" else "torchscript")
    assert card["sha256"] == hashlib.sha256((tmp_path / "generator" / exported.FILES[card["kind"]]).read_bytes()).hexdigest()
    assert (card["source"], card["name"]) == (made(Decoder, how).name, "mine")
    assert card["versions"]["torch"] == torch.__version__
    generators.require_images(generator, path, 1, 8)
    with pytest.raises(UserError, match="8x8 images with 1 channel"):
        generators.require_images(generator, path, 3, 8)
    with pytest.raises(UserError, match=r"generator\.precision must be reference"):
        generators.load_generator(path, precision="bf16")
    # a card written by an import may be edited, and imported again with the same program
    exported.import_program(made(Decoder, how), tmp_path / "generator" / "card.json", tmp_path / "again")
    assert generators.fingerprint(str(tmp_path / "again")) == generators.fingerprint(path)


def test_the_fingerprint_covers_what_the_card_says_of_w_and_x(made: Any, load: Any, tmp_path: Path) -> None:
    load(made(Decoder, "script"), name="mine")
    path, card = str(tmp_path / "generator"), tmp_path / "generator" / "card.json"
    before, values = generators.fingerprint(path), json.loads(card.read_text())
    found = []
    for change in ({"name": "yours"}, {"w_std": 2.0}, {"w_mean": 0.5}, {"output_range": [-1, 1]}):
        card.write_text(json.dumps(values | change))
        found.append(generators.fingerprint(path))
    assert found[0] == before
    assert len({before, *found[1:]}) == 4


def test_the_mapping_is_the_prior(made: Any, load: Any) -> None:
    mean, std = [0.1, -0.2, 0.3, 0.0, 1.0], [1.0, 0.5, 2.0, 0.1, 1.0]
    generator = load(made(LayeredDecoder, "script"), **CARDS[LayeredDecoder], w_mean=mean, w_std=std)
    assert (generator.z_dim, generator.w_dim, generator.num_ws) == (W_DIM, W_DIM, 3)
    assert generator.w_mean.tolist() == pytest.approx(mean)
    assert generator.w_std.tolist() == pytest.approx(std)
    z = torch.randn(4, W_DIM)
    expected = (torch.tensor(mean) + torch.tensor(std) * z)[:, None].expand(4, 3, W_DIM)
    torch.testing.assert_close(generator.mapping(z), expected)
    torch.testing.assert_close(generator.mapping(z, 0.0), torch.tensor(mean).expand(4, 3, W_DIM))
    torch.testing.assert_close(generator.mapping(z, 0.7), torch.lerp(torch.tensor(mean).expand(4, 3, W_DIM), expected, 0.7))


def test_one_number_stands_for_all_dimensions(made: Any, load: Any) -> None:
    generator = load(made(Decoder, "trace"), w_mean=0.5, w_std=0.25)
    assert generator.w_mean.tolist() == [0.5] * W_DIM
    assert generator.w_std.tolist() == [0.25] * W_DIM


def test_layers_may_come_flattened(load: Any, tmp_path: Path) -> None:
    class Flat(LayeredDecoder):
        def forward(self, w: Tensor) -> Tensor:
            w = w.view(w.shape[0], 3, 5)
            x = self.features(w[:, 0]) * (1 + self.style(w[:, 1]))[:, :, None, None]
            return (x + self.colour(w[:, 2])[:, :, None, None]).tanh()

    flat = Flat().eval()
    path = save(flat, tmp_path / "flat.pt", "export", torch.randn(2, 3 * W_DIM))
    generator = load(path, **CARDS[LayeredDecoder], input="BD")
    w = torch.randn(4, 3, W_DIM)
    torch.testing.assert_close(generator.synthesis(w), (flat(w.flatten(1)) + 1) / 2)


@pytest.mark.parametrize("how", ["script", "export"])
def test_it_stays_in_eval_mode(made: Any, load: Any, how: str) -> None:
    generator, w = load(made(Decoder, how)), torch.randn(3, 1, W_DIM)
    before = generator.synthesis(w)
    assert not generator.train().training
    assert torch.equal(generator.synthesis(w), before)
    assert not generator.to("cpu").eval().training


@pytest.mark.parametrize("how", FORMATS)
def test_a_scripted_module_in_training_mode_is_switched(load: Any, tmp_path: Path, how: str) -> None:
    """A script keeps both modes; a trace and an export are stuck with theirs, which batch norm and dropout give away."""
    torch.manual_seed(0)
    path = save(Decoder().train(), tmp_path / "training.pt", how, example())
    if how == "script":
        load(path)
    else:
        with pytest.raises(UserError, match=r"makes another image .* call \.eval\(\)"):
            load(path)


@pytest.mark.parametrize("how", ["trace", "export"])
def test_projection_finds_an_image(made: Any, load: Any, how: str) -> None:
    generator = load(made(Decoder, how))
    x = generator.synthesis(generator.mapping(torch.randn(3, W_DIM, generator=torch.Generator().manual_seed(7))))
    config = ProjectionConfig(lpips=0, l1=10, l2=50, noise=0, steps=150)
    found = Projector(generator, config, CPU).project(x, ["a", "b", "c"])
    at_mean = (x - generator.synthesis(generator.w_mean.expand(3, 1, -1))).abs().mean(dim=(1, 2, 3))
    assert (found.l1_B < at_mean / 10).all(), (found.l1_B, at_mean)
    assert torch.equal(found.x_BCHW, generator.synthesis(found.w_BLD))


@pytest.mark.parametrize("how", ["script", "export"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_latent_attack_stays_in_its_ball(made: Any, load: Any, how: str, norm: str) -> None:
    generator = load(made(LayeredDecoder, how), **CARDS[LayeredDecoder], w_std=[0.5, 1, 1, 1, 2])
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    w = generator.mapping(torch.randn(5, W_DIM)).contiguous()
    batch = Batch([str(i) for i in range(5)], generator.synthesis(w), torch.arange(5) % 4, w)
    threat = threats.build(LatentThreat(norm=norm, eps=0.3, scale="std"), generator)
    found = attack(network, threat, batch, AttackConfig(steps=5), seed=0, purpose="test")
    assert threat.distance(batch, found.theta).max() <= 0.3 * 1.0001
    torch.testing.assert_close(found.x_BCHW, generator.synthesis(w + found.theta * generator.w_std))
    before = F.cross_entropy(network(batch.x_BCHW), batch.y_B, reduction="none")
    assert (found.loss_B > before).all()


@pytest.mark.parametrize("how", ["script", "trace", "export"])
def test_recomputed_activations_give_the_same_gradient(made: Any, load: Any, tmp_path: Path, how: str) -> None:
    """Every time: TorchScript runs another program once it has seen what goes through."""
    kept = load(made(LayeredDecoder, how), **CARDS[LayeredDecoder])
    again = generators.load_configured(GeneratorConfig(path=str(tmp_path / "generator"), recompute=True))
    for number in range(4):
        w = example(LayeredDecoder, 3 + number % 2).requires_grad_(True)
        numbers: list[list[int]] = []
        slopes = []
        for generator in (kept, again):
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
                x = generator.synthesis(w, clamp=False)
            slopes.append(torch.autograd.grad(x.square().sum(), w)[0])
            numbers.append(sizes)
        torch.testing.assert_close(slopes[0], slopes[1])
        assert sum(numbers[1]) < sum(numbers[0]) / 2, "less is kept"
    with torch.no_grad():
        assert torch.equal(kept.synthesis(w), again.synthesis(w))


def test_programs_are_known_by_their_content(made: Any, tmp_path: Path) -> None:
    for how in FORMATS:
        disguised = tmp_path / f"{how}.pkl"
        disguised.write_bytes(made(Decoder, how).read_bytes())
        assert exported.is_program(disguised)
    torch.save({"g_ema": torch.zeros(2)}, tmp_path / "checkpoint.pt")
    (tmp_path / "text.pt").write_text("code/ constants.pkl")
    (tmp_path / "truncated.pt").write_bytes(made(Decoder, "script").read_bytes()[:-200])
    for name in ("checkpoint.pt", "text.pt", "truncated.pt", "missing.pt", ""):
        assert not exported.is_program(tmp_path / name)


# what can be wrong with a decoder, as modules and cards


class Noisy(Decoder):
    def forward(self, w: Tensor) -> Tensor:
        return self.features(w).sigmoid() + 0.1 * torch.randn(w.shape[0], 1, 8, 8)


class Broken(Decoder):
    def forward(self, w: Tensor) -> Tensor:
        return (self.features(w) - 100).sqrt()


class Detached(Decoder):
    def forward(self, w: Tensor) -> Tensor:
        return self.features(w.detach()).sigmoid()


class Rounded(Decoder):
    def forward(self, w: Tensor) -> Tensor:
        return (self.features(w).sigmoid() * 255).round() / 255


class Unbounded(Decoder):
    def forward(self, w: Tensor) -> Tensor:
        return 50 * self.features(w)


class Pair(Decoder):
    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(w).sigmoid()
        return x, x


class Neighbours(Decoder):
    def forward(self, w: Tensor) -> Tensor:
        x = self.features(w)
        return (x - x.mean(dim=0, keepdim=True)).sigmoid()


class Fixed(Decoder):
    def features(self, w: Tensor) -> Tensor:
        return super().features(w.reshape(3, 5))


REFUSED = [
    (
        Decoder,
        {"resolution": 16},
        r"makes \(1, 1, 8, 8\) of 1 w, its card promises \(1, 1, 16, 16\); set resolution and channels",
    ),
    (Decoder, {"channels": 3}, "set resolution and channels in the card"),
    (Decoder, {"w_dim": 6}, r"fails on w of shape \(B, 6\).*set w_dim"),
    (Decoder, {"num_ws": 3}, r"fails on w of shape \(B, 3, 5\).*set w_dim, num_ws and input in the card"),
    (Noisy, {}, "another image of the same w each time"),
    (Broken, {}, "values that are not finite"),
    (Detached, {}, "no gradient reaches w"),
    (Rounded, {}, "no gradient reaches w"),
    (Unbounded, {}, r"puts out values from -\d+.* its card promises \[0, 1\]; set output_range"),
    (Neighbours, {}, "another image of w alone than among others"),
]


@pytest.mark.parametrize("how", ["trace", "export"])
@pytest.mark.parametrize(("kind", "card", "message"), REFUSED, ids=lambda v: v.__name__ if isinstance(v, type) else None)
def test_decoders_that_are_refused(load: Any, tmp_path: Path, kind: Any, card: Any, message: str, how: str) -> None:
    torch.manual_seed(1)
    path = save(kind().eval(), tmp_path / "bad.pt", how, example())
    with pytest.raises(UserError, match=message) as caught:
        load(path, **card)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "generator").exists()


@pytest.mark.parametrize("how", ["trace", "export"])
def test_more_than_one_tensor_is_refused(load: Any, tmp_path: Path, how: str) -> None:
    with pytest.raises(UserError, match="one tensor; export a decoder w -> image"):
        load(save(Pair().eval(), tmp_path / "pair.pt", how, example()))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_fixed_batch_is_refused(load: Any, tmp_path: Path, count: int) -> None:
    path = save(Decoder().eval(), tmp_path / "fixed.pt", "export", example(count=count), dynamic=False)
    with pytest.raises(UserError, match=r"(fixed batch, it fails on a batch of|fails on w of shape).* dynamic batch dimension"):
        load(path)


def test_a_fixed_batch_in_a_trace_is_refused(load: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = save(Fixed().eval(), tmp_path / "fixed.pt", "trace", example(count=3))
    with pytest.raises(UserError, match=r"fixed batch, it fails on a batch of 1 \(.*invalid for input of size 5.* dynamic batch"):
        load(path)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"w_dims": 5}, "w_dims: there is no such setting"),
        ({"w_dim": 10**30}, "w_dim: must be 1048576 or less"),
        ({"w_dim": 10**6, "num_ws": 4096}, "num_ws 4096 times w_dim 1000000 is more than"),
        ({"input": "x" * 1_000_000}, "input: .*x{77}"),
        ({"w_dim": 0}, "w_dim: must be 1 or more"),
        ({"resolution": None}, "resolution: "),
        ({"output_range": [0, 255]}, r"output_range is \[0\.0, 255\.0\], but must be \[0, 1\] or \[-1, 1\]"),
        ({"w_mean": [0, 0]}, "w_mean has 2 numbers, but w_dim is 5"),
        ({"w_std": [1, 1, 1, 1, 0]}, "w_std must be above 0"),
        ({"w_std": float("nan")}, "w_std"),
        ({"input": "BLDX"}, "input: "),
        ({"kind": "torch_export"}, "says kind 'torch_export', but .* is torchscript"),
        ({"kind": "onnx"}, "kind: "),
    ],
)
def test_cards_that_are_wrong(made: Any, load: Any, card: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(made(Decoder, "trace"), **card)
    assert "\n" not in str(caught.value)


def test_cards_that_are_none(made: Any, tmp_path: Path) -> None:
    program, folder = made(Decoder, "trace"), tmp_path / "generator"
    for card in (None, tmp_path / "absent.json"):
        with pytest.raises(UserError, match=r'needs a card.* \{"w_dim": 64, "resolution": 32, "channels": 1\}'):
            exported.import_program(program, card, folder)
    (tmp_path / "card.json").write_text("[1]")
    with pytest.raises(UserError, match="is not a JSON object"):
        exported.import_program(program, tmp_path / "card.json", folder)
    (tmp_path / "card.json").write_text('{"w_dim": 5')
    with pytest.raises(UserError, match=r"card\.json' is damaged"):
        exported.import_program(program, tmp_path / "card.json", folder)
    (tmp_path / "card.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"card\.json' is damaged"):
        exported.import_program(program, tmp_path / "card.json", folder)
    with pytest.raises(UserError, match="there is no file at"):
        exported.import_program(tmp_path / "absent.pt", tmp_path / "card.json", folder)
    assert not folder.exists()


@pytest.mark.parametrize("how", ["script", "export"])
def test_damaged_files(made: Any, load: Any, tmp_path: Path, how: str) -> None:
    whole = made(Decoder, how).read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged, or neither"):
        load(tmp_path / "truncated.pt")
    weights = 32 * W_DIM * 4
    middle = whole.index(module(Decoder).first.weight.detach().numpy().tobytes()) + weights // 2
    (tmp_path / "flipped.pt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(UserError, match=r"is damaged .*Bad CRC-32"):
        load(tmp_path / "flipped.pt")
    load(made(Decoder, how))
    name = exported.FILES["torch_export" if how == "export" else "torchscript"]
    program = tmp_path / "generator" / name
    program.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="is not the program that its card was written for"):
        generators.load_generator(str(tmp_path / "generator"))
    program.unlink()
    with pytest.raises(UserError, match=f"has no {re.escape(name)}"):
        generators.load_generator(str(tmp_path / "generator"))


@pytest.mark.parametrize("how", ["script", "export"])
@pytest.mark.parametrize(("place", "byte"), [(6, b"\xff"), (46, b"\xff")])
def test_a_damaged_directory_is_no_program(made: Any, load: Any, tmp_path: Path, how: str, place: int, byte: bytes) -> None:
    load(made(Decoder, how))
    name = exported.FILES["torch_export" if how == "export" else "torchscript"]
    program = tmp_path / "generator" / name
    program.write_bytes(odd_directory(program.read_bytes(), place, byte))
    assert not exported.is_program(program)
    card = tmp_path / "generator" / "card.json"
    card.write_text(json.dumps({k: v for k, v in json.loads(card.read_text()).items() if k != "sha256"}))
    with pytest.raises(UserError, match="is damaged, or neither") as caught:
        generators.load_generator(str(tmp_path / "generator"))
    assert str(program) in str(caught.value)


# programs that would do more than arithmetic: each leaves a marker if torch is given the file as it is


def edited(path: Path, target: Path, edit: Callable[[str, bytes], bytes | None], **more: bytes) -> Path:
    """A copy of an archive with records changed, left out, or added."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            content = edit(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
        for name, content in more.items():
            new.writestr(f"{root}/{name}", content)
    return target


class Saves(Decoder):
    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker

    def forward(self, w: Tensor) -> Tensor:
        torch.save(w, self.marker)
        return self.features(w).sigmoid()


class Restores(nn.Module):
    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.marker = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.marker)

    def forward(self, w: Tensor) -> Tensor:
        return w


class Counts(nn.Module):
    def forward(self, w: Tensor, k: int = 3) -> Tensor:
        return w * k


def test_a_script_that_saves_is_refused(load: Any, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "saves.pt"
    torch.jit.script(Saves(str(marker)).eval()).save(str(path))
    with pytest.raises(UserError, match=r"mentions 'save' in code/.*may touch files"):
        load(path)
    assert not marker.exists()
    torch.jit.load(path)(torch.zeros(1, W_DIM))
    assert marker.exists()


def test_a_script_with_setstate_is_refused(load: Any, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "restores.pt"
    torch.jit.script(Restores(str(marker)).eval()).save(str(path))
    marker.unlink(missing_ok=True)
    with pytest.raises(UserError, match="mentions '__setstate__'"):
        load(path)
    assert not marker.exists()
    torch.jit.load(path)
    assert marker.exists(), "torch runs it while loading, which is why the text is searched"


def test_a_script_with_a_default_that_makes_a_file_is_refused(load: Any, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "counts.pt"
    torch.jit.script(Counts()).save(str(path))

    def edit(name: str, content: bytes) -> bytes | None:
        default = f'k: Tensor=torch.from_file("{marker}", True, 10)'.encode()
        return None if name.endswith("debug_pkl") else content.replace(b"k: int=3", default)

    evil = edited(path, tmp_path / "evil.pt", edit)
    with pytest.raises(UserError, match="mentions 'from_file'"):
        load(evil)
    assert not marker.exists()
    torch.jit.load(evil)
    assert marker.exists()


def fork_me(w: Tensor) -> Tensor:
    return w.sin()


class Forks(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return torch.jit.wait(torch.jit.fork(fork_me, w))


class Prints(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        print(w)
        return w


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, w: Tensor) -> Tensor:
        self.calls += 1
        return w * self.calls


@pytest.mark.parametrize(
    ("kind", "message"), [(Forks, "uses aten::wait|uses .*prim::fork"), (Prints, "prim::Print"), (Remembers, "prim::SetAttr")]
)
def test_a_script_with_other_operators_is_refused(load: Any, tmp_path: Path, kind: Any, message: str) -> None:
    torch.jit.script(kind()).save(str(tmp_path / "strange.pt"))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "strange.pt")


def test_a_script_with_operators_of_others_is_refused(load: Any, tmp_path: Path) -> None:
    torch.jit.script(Counts()).save(str(tmp_path / "counts.pt"))

    def edit(name: str, content: bytes) -> bytes:
        return content.replace(b"torch.mul(w, k)", b"ops.quantized.mul_scalar(w, k)")

    with pytest.raises(UserError, match="mentions 'ops'"):
        load(edited(tmp_path / "counts.pt", tmp_path / "strange.pt", edit))


# programs that would fill the memory, or end the process, while torch loads them


def repacked(path: Path, target: Path, compression: int, **more: bytes) -> Path:
    """A copy of an archive with some of its records replaced by compressed ones."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            if name.partition("/")[2] not in more:
                new.writestr(name, old.read(name))
        for name, content in more.items():
            new.writestr(f"{root}/{name}", content, compression)
    return target


@pytest.mark.parametrize(
    ("record", "compression", "message"),
    [
        ("constants.pkl", zipfile.ZIP_DEFLATED, "is a compressed zip"),
        ("data.pkl", zipfile.ZIP_BZIP2, "is a compressed zip"),
        ("code/__torch__/more.py", zipfile.ZIP_DEFLATED, "more than 16 MiB of code"),
        ("code/__torch__/more.py", zipfile.ZIP_BZIP2, "packed in a way that torch does not know"),
    ],
)
def test_bombs_are_not_unpacked(made: Any, tmp_path: Path, record: str, compression: int, message: str) -> None:
    path = repacked(made(Decoder, "script"), tmp_path / "bomb.pt", compression, **{record: bytes(30_000_000)})
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as caught:
        load_program(path, "torchscript", CPU)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_a_record_that_is_longer_than_it_says_is_not_unpacked(made: Any, tmp_path: Path) -> None:
    record, content = "code/__torch__/more.py", bytes(30_000_000)
    path = repacked(made(Decoder, "script"), tmp_path / "bomb.pt", zipfile.ZIP_DEFLATED, **{record: content})
    length = struct.pack("<I", len(content))
    path.write_bytes(path.read_bytes().replace(length, struct.pack("<I", 1000)))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"is damaged .*Bad CRC-32"):
        load_program(path, "torchscript", CPU)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


MANY = 200_000
DEEP_CODE = {
    "brackets": "(" * MANY + "w" + ")" * MANY,
    "brackets after a string": "f('\"', " * MANY + "w" + ")" * MANY,
    "brackets after a comment": "w # '\n" + "    return " + "(" * MANY + "w" + ")" * MANY + " # '",
    "sum": "+".join(["w"] * MANY),
    "signs": "-" * MANY + "w",
    "choices": "w if True else " * MANY + "w",
    "indices": "w" + "[0]" * MANY,
    "calls": "w" + "()" * MANY,
    "indentation": "\n" + "".join(" " * i + "if True:\n" for i in range(4, 500)),
    "elif": "\n    if True:\n      pass\n" + "    elif True:\n      pass\n" * 30_000,
    "a long string": '"""' + "(" * 10 + '"""',
}


@pytest.mark.parametrize("what", DEEP_CODE)
def test_code_that_would_end_the_process_is_refused(made: Any, tmp_path: Path, what: str) -> None:
    left = [1]  # a process that has scripted much before makes files of code that are copies of each other

    def edit(name: str, content: bytes) -> bytes:
        if not left or not name.endswith(".py") or b"    return " not in content:
            return content
        left.clear()
        return content.replace(b"    return ", f"    return {DEEP_CODE[what]}\n    return ".encode(), 1)

    path = edited(made(Decoder, "script"), tmp_path / "deep.pt", edit)
    with pytest.raises(UserError, match=r"holds (code that is nested deeper|elif|\"\"\").*code/.*\.py") as caught:
        load_program(path, "torchscript", CPU)
    assert "\n" not in str(caught.value)


def test_code_with_long_strings_and_lists_is_not_deep() -> None:
    check_source(b'x = ["((((", ' + b"'[\\'', -1.5, w + 2 * (w - 1), " * 100_000 + b"w]\n")
    check_source(b"y = torch.add(w, w)\n" * 50_000)
    with pytest.raises(RefusedError):
        check_source(b"(" * 201)


GROWING = b"\x80\x02" + b"".join(b"]q" + bytes([i]) for i in range(100)) + b"0" * 99  # 100 empty lists
DEEP_PICKLES = {
    "tuples": b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "lists": b"\x80\x02" + b"]" * MANY + b"a" * (MANY - 1) + b".",
    "lists from the outside": GROWING + b"h\x00h\x01a0h\x01h\x02a.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "shared tuples": b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b".",
    "shared lists": b"\x80\x02]q\x00" + b"0](h\x00h\x00eq\x00" * 60 + b".",
    "a second pickle": b"\x80\x02N." + b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "no pickle": b"\xff" * 100,
}


@pytest.mark.parametrize("record", ["data.pkl", "constants.pkl"])
@pytest.mark.parametrize("what", DEEP_PICKLES)
def test_pickles_that_would_end_the_process_are_refused(made: Any, tmp_path: Path, what: str, record: str) -> None:
    path = repacked(made(Decoder, "script"), tmp_path / "deep.pt", zipfile.ZIP_STORED, **{record: DEEP_PICKLES[what]})
    with pytest.raises(UserError, match=r"holds|is longer or nested|cannot load") as caught:
        load_program(path, "torchscript", CPU)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return io.open, (str(self.marker), "w")


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def graph_edit(edit: Callable[[dict[str, Any]], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        program = json.loads(content)
        edit(program)
        return json.dumps(program).encode()

    return change


def replaced(old: str, new: str) -> Callable[[str, bytes], bytes]:
    """The graph's JSON with a piece of text replaced everywhere."""
    return lambda name, content: content.replace(old.encode(), new.encode()) if name == "models/model.json" else content


def first_pickled(marker: Path) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if name == "data/weights/model_weights_config.json":
            return content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
        return saved(Evil(marker)) if name == "data/weights/weight_0" else content

    return change


def in_spec(marker: Path) -> Callable[[str, bytes], bytes]:
    (marker.parent / "made_by_spec.py").write_text(f"open({str(marker)!r}, 'w')")
    context = json.dumps([{"__enum__": True, "fqn": "made_by_spec:x", "name": "y"}])
    spec = json.dumps([1, {"type": "builtins.dict", "context": context, "children_spec": []}])
    return graph_edit(lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=spec))


def target(marker: Path) -> Callable[[str, bytes], bytes]:
    values = {"filename": {"as_string": str(marker)}, "shared": {"as_bool": True}, "size": {"as_int": 10}}
    arguments = [{"name": name, "arg": value, "kind": 1} for name, value in values.items()]
    operator = {"target": "torch.ops.aten.from_file.default", "inputs": arguments}
    return graph_edit(lambda p: p["graph_module"]["graph"]["nodes"][1].update(operator))


EVIL_EXPORTS: dict[str, tuple[Callable[[Path], Callable[[str, bytes], bytes]], str]] = {
    "weight": (first_pickled, "holds 'first.weight' as a pickled object, which is not loaded"),
    "expression": (lambda m: replaced("Symbol(", f"open('{m}', 'w') and Symbol("), "as expr_str in its graph"),
    "name": (lambda m: replaced('"w"', f"\"w=open('{m}', 'w')\""), "in its graph"),
    "spec": (in_spec, "is not a function of one tensor"),
    "operator": (target, r"uses 'torch\.ops\.aten\.from_file\.default'"),
    "function": (lambda m: replaced("torch.ops.aten.linear.default", "torch.os.system"), r"uses 'torch\.os\.system'"),
}


@pytest.mark.parametrize("what", EVIL_EXPORTS)
def test_exports_that_would_run_code_are_refused(
    made: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    marker = tmp_path / "marker"
    edit, message = EVIL_EXPORTS[what]
    path = edited(made(Decoder, "export"), tmp_path / "evil.pt2", edit(marker))
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()
    run_by_torch(path)
    assert marker.exists() or what == "function", "torch alone runs all but functions, which is why the graph is searched"


def run_by_torch(path: Path) -> None:
    """Load and call a program as torch does it, whatever comes of it."""
    with contextlib.suppress(Exception):
        torch.export.load(path).module()(torch.zeros(2, W_DIM))


@pytest.mark.parametrize("what", ["sample inputs", "guards"])
def test_what_only_torch_would_run_is_left_behind(made: Any, load: Any, tmp_path: Path, what: str) -> None:
    """Every export carries sample inputs as a pickle; neither they nor the guards, which are Python, are needed."""
    marker = tmp_path / "marker"
    guards = graph_edit(lambda p: p.update(guards_code=[f"open({str(marker)!r}, 'w')"]))

    def samples(name: str, content: bytes) -> bytes:
        return saved(Evil(marker)) if name == "data/sample_inputs/model.pt" else content

    path = edited(made(Decoder, "export"), tmp_path / "evil.pt2", samples if what == "sample inputs" else guards)
    generator, w = load(path), example(count=4)
    torch.testing.assert_close(generator.synthesis(w[:, None]), module(Decoder)(w), atol=1e-6, rtol=0)
    assert not marker.exists()
    run_by_torch(path)
    assert marker.exists()


@pytest.mark.parametrize(
    "record",
    [
        "data/constants/opaque_obj_0",
        "data/constants/custom_obj_0",
        "data/weights/model.pt",
        "data/constants/model.pt",
        "data/aotinductor/model/model.so",
        "models/second.json",
        "data/weights/../../../x",
    ],
)
def test_exports_with_other_records_are_refused(made: Any, load: Any, tmp_path: Path, record: str) -> None:
    content = pickle.dumps(Evil(tmp_path / "marker"))
    path = edited(made(Decoder, "export"), tmp_path / "more.pt2", lambda name, old: old, **{record: content})
    with pytest.raises(UserError, match=f"holds '.*{re.escape(record)}', which is not code, graph or plain tensors"):
        load(path)
    assert not (tmp_path / "marker").exists()


def test_an_export_of_before_2_8_is_refused(load: Any, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.2")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", saved(Evil(tmp_path / "marker")))
    with pytest.raises(UserError, match=r"export it again, with torch 2\.13"):
        load(tmp_path / "old.pt2")
    assert not (tmp_path / "marker").exists()


def test_an_export_made_on_a_gpu_loads_on_the_cpu(made: Any, load: Any, tmp_path: Path) -> None:
    """Devices in the file are where it was made, not where it shall run."""

    def on_gpu(name: str, content: bytes) -> bytes:
        return content.replace(b'{"type": "cpu", "index": null}', b'{"type": "cuda", "index": 0}')

    generator = load(edited(made(Decoder, "export"), tmp_path / "gpu.pt2", on_gpu))
    w = example(count=3)
    torch.testing.assert_close(generator.synthesis(w[:, None]), module(Decoder)(w), atol=1e-6, rtol=0)
