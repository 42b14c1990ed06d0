"""Classifiers by others that come as programs: the same logits and gradients, and nothing but arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import torch
from imported_models import Normalised, Small, images_fixture, imported, program, read, saved, shufflenet_fixture, small  # noqa: F401  (fixtures)
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.config import AttackConfig, ImageThreat
from dmat_ray.errors import UserError
from dmat_ray.models import checkpoint
from dmat_ray.networks.attack_view import AttackView
from dmat_ray.types import Batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("how", ["script", "trace", "export"])
def test_programs(tmp_path: Path, images: Tensor, how: str) -> None:
    theirs = Normalised(small()).eval() if how != "script" else small()
    path = program(theirs, tmp_path / "theirs.pt", how)
    network, run = imported(path, tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(network(images), theirs(images), rtol=1e-5, atol=1e-6)
    assert run["config"]["classifier"]["name"] == "program"
    x = images.clone().requires_grad_(True)
    expected = images.clone().requires_grad_(True)
    torch.testing.assert_close(
        torch.autograd.grad(network(x).square().sum(), x)[0],
        torch.autograd.grad(theirs(expected).square().sum(), expected)[0],
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    # whoever evaluates may call these, and attacks look at a copy
    assert not network.train().eval().training
    torch.testing.assert_close(AttackView(network)(images), network(images), rtol=1e-4, atol=1e-5)
    found = attack(
        network,
        threats.build(ImageThreat(eps=0.1), None),
        Batch(["a", "b", "c"], images, torch.tensor([0, 1, 2])),
        AttackConfig(steps=3),
        seed=0,
        purpose="test",
    )
    assert float((found.x_BCHW - images).abs().max()) == pytest.approx(0.1, abs=1e-5)
    # a normalisation around the program, if one is asked for
    given = read(path, given=((0.5,), (0.25,)))
    with torch.no_grad():
        torch.testing.assert_close(given.network(images), theirs((images - 0.5) / 0.25), rtol=1e-5, atol=1e-6)


def test_a_stored_program_is_one_that_plain_torch_loads(tmp_path: Path, images: Tensor) -> None:
    imported(program(small(), tmp_path / "x.pt", "export"), tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "model" / "program.pt2").module()(images), small()(images))


def test_another_program_in_its_place_is_noticed(tmp_path: Path) -> None:
    imported(program(small(), tmp_path / "x.pt", "export"), tmp_path / "model")
    other = program(small(Small, 5), tmp_path / "y.pt", "export")
    (tmp_path / "model" / "program.pt2").write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="is not the program that was imported"):
        checkpoint.load_classifier(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no whole model\.safetensors"):
        checkpoint.load_classifier(tmp_path / "model")


class Features(Small):
    """Not one logit a class."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Frozen(Small):
    """No gradient to the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Overflowing(Small):
    """Infinite logits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0.0


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (lambda: small(), {"classes": 10}, "puts out 4 classes for 3 images, there are 10 class names"),
        (lambda: small(), {"channels": 1}, r"fails on 3 image\(s\) of 1x32x32 \(.*\); is that its shape"),
        (lambda: small(Features), {}, r"makes \(3, 8, 8, 8\) of 3 image\(s\)"),
        (lambda: small(Frozen), {}, "no finite gradient reaches the images"),
        (lambda: small(Overflowing), {}, "not finite"),
        (lambda: small().train(), {}, "otherwise alone than among others|fails on"),
    ],
)
def test_programs_that_are_refused(tmp_path: Path, network: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(program(network(), tmp_path / "x.pt", "trace"), **options)
    assert "\n" not in str(raised.value)


def test_programs_that_are_not_run(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers"
    numbers.write_bytes(bytes(16))

    class Reader(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4] + torch.from_file(str(numbers), False, 4)

    with pytest.raises(UserError, match="mentions 'from_file'"):
        read(program(Reader(), tmp_path / "x.pt", "trace"))
    path = program(small(), tmp_path / "y.pt", "export", dynamic=False)
    with pytest.raises(UserError, match=r"fails on (3|1) image\(s\)"):
        read(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", ["state", "trace", "export"])
def test_on_a_gpu(tmp_path: Path, shufflenet: nn.Module, images: Tensor, how: str) -> None:
    path = saved(shufflenet.state_dict(), tmp_path / "x.pth") if how == "state" else program(small(), tmp_path / "x.pt", how)
    on_cpu, _ = imported(path, tmp_path / "model")
    on_gpu, _ = checkpoint.load_classifier(tmp_path / "model", "cuda")
    x = images.cuda().requires_grad_(True)
    logits = on_gpu(x)
    torch.testing.assert_close(logits.detach().cpu(), on_cpu(images).detach(), rtol=1e-3, atol=1e-3)
    assert torch.autograd.grad(logits.sum(), x)[0].abs().max() > 0
