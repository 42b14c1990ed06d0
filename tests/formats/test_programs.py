"""Programs compute on the device that they are loaded on, whichever they were made on."""

from pathlib import Path

import pytest
import torch
from exported_decoders import CPU, edited, save
from torch import Tensor, nn

from dmat_ray.formats.programs import load_and_pack, load_program

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
META = torch.device("meta")  # as strict as a GPU about tensors of two devices
AS_TEXT = "torch.device(\"cpu\") and torch.device('cpu')"


class Places(nn.Module):
    """w (B, 4) -> (B, 4), with tensors made in the forward, on the device of w."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, w: Tensor) -> Tensor:
        places = torch.arange(w.shape[1], device=w.device, dtype=w.dtype)
        return self.last(w + places) + torch.zeros(4).to(w.device)  # type: ignore[no-any-return]


class Holds(nn.Module):
    """As `Places`, with a device that it holds."""

    possible: torch.device | None

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.where = torch.device("cpu")
        self.possible = torch.device("cpu")
        self.nothing: str | None = None

    def forward(self, w: Tensor) -> Tensor:
        places = torch.arange(w.shape[1], device=self.where, dtype=w.dtype)
        if self.possible is not None:
            places = places + torch.ones(4, device=self.possible)
        return self.last(w + places)  # type: ignore[no-any-return]


class Nested(nn.Module):
    """One within another that holds a device of the same name, and one of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Holds(), Holds())
        self.where = torch.device("cpu")
        self.elsewhere = torch.device("cpu")

    def forward(self, w: Tensor) -> Tensor:
        return self.inner(w) + torch.ones(4, device=self.where) + torch.ones(4, device=self.elsewhere)  # type: ignore[no-any-return]


class Tells(nn.Module):
    """A script with a text that looks like a device."""

    def forward(self, w: Tensor, text: str = AS_TEXT) -> Tensor:
        return w * len(text)


def as_traced_on_a_gpu(path: Path) -> Path:
    """The same archive with the devices that tracing on a GPU writes down."""

    def edit(name: str, content: bytes) -> bytes:
        return content.replace(b'torch.device("cpu")', b'torch.device("cuda:0")') if name.endswith(".py") else content

    return edited(path, path.with_name("gpu.pt"), edit)


def test_a_program_traced_on_the_cpu_computes_on_another_device(tmp_path: Path) -> None:
    path = save(Places(), tmp_path / "places.pt", "trace", torch.rand(2, 4))
    program = load_program(path, "torchscript", META)
    assert program(torch.rand(3, 4, device=META)).device == META
    code = program.code  # type: ignore[operator, union-attr]
    assert 'torch.device("meta")' in code
    assert "cpu" not in code


def test_a_program_traced_on_a_gpu_computes_on_the_cpu(tmp_path: Path) -> None:
    module, w = Places(), torch.rand(3, 4)
    path = as_traced_on_a_gpu(save(module, tmp_path / "places.pt", "trace", torch.rand(2, 4)))
    torch.testing.assert_close(load_program(path, "torchscript", CPU)(w), module(w))


@pytest.mark.parametrize("module", [Holds(), Nested()], ids=["one", "nested"])
def test_a_scripted_program_that_holds_its_device_computes_on_another(module: nn.Module, tmp_path: Path) -> None:
    path, w = save(module, tmp_path / "holds.pt", "script", torch.rand(2, 4)), torch.rand(3, 4)
    assert load_program(path, "torchscript", META)(w.to(META)).device == META
    _, packed = load_and_pack(path, "torchscript", META)
    (tmp_path / "kept.pt").write_bytes(packed)
    torch.testing.assert_close(load_program(tmp_path / "kept.pt", "torchscript", CPU)(w), module(w))


def test_a_text_that_looks_like_a_device_stays(tmp_path: Path) -> None:
    path = save(Tells(), tmp_path / "tells.pt", "script", torch.rand(2, 4))
    program = load_program(path, "torchscript", META)
    assert program.forward.schema.arguments[2].default_value == AS_TEXT  # type: ignore[operator, union-attr]
