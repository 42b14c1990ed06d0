"""Programs that are no decoder of the images that their card promises, cards that are wrong, and damaged files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_decoders import W_DIM, Decoder, example, load_fixture, made_fixture, module, save  # noqa: F401  (fixtures)
from foreign_files import odd_directory
from torch import Tensor

from dmat_ray.errors import UserError
from dmat_ray.manifold import exported, generators

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]


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
