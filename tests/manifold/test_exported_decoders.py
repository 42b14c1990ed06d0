"""Decoders that come as a program: the same images and gradients as the module they were made of."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exported_decoders import (  # noqa: F401  (fixtures)
    CARDS,
    CPU,
    W_DIM,
    Decoder,
    LayeredDecoder,
    edited,
    example,
    load_fixture,
    made_fixture,
    module,
    save,
)
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.config import AttackConfig, GeneratorConfig, LatentThreat, ProjectionConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold import exported, generators
from dmat_ray.manifold.projection import Projector
from dmat_ray.types import Batch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]
FORMATS = ["script", "trace", "export"]


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


def test_an_export_made_on_a_gpu_loads_on_the_cpu(made: Any, load: Any, tmp_path: Path) -> None:
    """Devices in the file are where it was made, not where it shall run."""

    def on_gpu(name: str, content: bytes) -> bytes:
        return content.replace(b'{"type": "cpu", "index": null}', b'{"type": "cuda", "index": 0}')

    generator = load(edited(made(Decoder, "export"), tmp_path / "gpu.pt2", on_gpu))
    w = example(count=3)
    torch.testing.assert_close(generator.synthesis(w[:, None]), module(Decoder)(w), atol=1e-6, rtol=0)
