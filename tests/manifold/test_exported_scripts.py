"""TorchScript that would do more than arithmetic is refused: it leaves a marker if torch is given the file as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exported_decoders import W_DIM, Decoder, edited, load_fixture  # noqa: F401  (fixtures)
from torch import Tensor, nn

from dmat_ray.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]


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
