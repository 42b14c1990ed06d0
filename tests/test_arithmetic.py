"""Where accuracies and predictions are computed, and decoders tried, float32 is float32, whatever GPUs are allowed elsewhere."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dmat_ray.config import Config
from dmat_ray.data.manifold_set import open_set
from dmat_ray.devices import tf32
from dmat_ray.local import LocalContext
from dmat_ray.manifold import exported
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models.prediction import predict
from dmat_ray.training.validation import Validator


class Asking(nn.Sequential):
    """A network that notes what torch allows for float32 at each of its calls."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 3))
        self.allowed: list[tuple[str, bool]] = []

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.allowed.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return super().forward(x_BCHW)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _tf32_is_allowed() -> Iterator[None]:
    with tf32(True):
        yield
        assert torch.backends.cudnn.allow_tf32, "what was before is there again"
        assert torch.get_float32_matmul_precision() == "high"


def test_held_out_accuracies_are_of_float32(
    make_config: Callable[..., Config], set_folder: Path, generator: StyleGAN2, tmp_path: Path
) -> None:
    network = Asking()
    Validator(make_config(), open_set(set_folder, "test"), generator)(network, LocalContext(tmp_path))
    assert set(network.allowed) == {("highest", False)}


def test_predictions_are_of_float32() -> None:
    network = Asking()
    assert predict(network, ["a", "b", "c"], ["x"], np.zeros((1, 1, 8, 8), np.uint8), torch.device("cpu")).num_rows == 1
    assert network.allowed == [("highest", False)]


class AskingDecoder(nn.Linear):
    """A decoder that notes the same."""

    def __init__(self) -> None:
        super().__init__(2, 64)
        self.allowed: list[tuple[str, bool]] = []

    def forward(self, w_BD: Tensor) -> Tensor:
        self.allowed.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return super().forward(w_BD).view(-1, 1, 8, 8).sigmoid()


def test_decoders_are_tried_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = AskingDecoder()
    monkeypatch.setattr(exported, "load_program", lambda *_: decoder)  # a program has no words for what torch allows
    card = {"kind": "torchscript", "w_dim": 2, "resolution": 8, "channels": 1}
    exported.load_exported(tmp_path, card, torch.device("cpu"))
    assert set(decoder.allowed) == {("highest", False)}


# what a user may have said before, in words older and newer, and together
SAID = (
    "pass",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'bf16'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.backends.cudnn.fp32_precision = 'ieee'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.cudnn.rnn.fp32_precision = 'none'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.set_float32_matmul_precision('high'); torch.backends.fp32_precision = 'tf32'",
)
SCRIPT = """
import os, sys, traceback
import torch
from dmat_ray.devices import tf32

OLDER = torch.get_float32_matmul_precision, torch._C._get_cublas_allow_tf32, torch._C._get_cudnn_allow_tf32
OPERATIONS = [(backend, kind) for backend in ("cuda", "mkldnn") for kind in ("all", "conv", "rnn", "matmul")]

def newer(backend, kind):
    return torch._C._get_fp32_precision_getter(backend, kind)

def older(ask):
    try:
        return ask()
    except RuntimeError:
        return "refused"

def state():
    return [older(ask) for ask in OLDER] + [newer(*one) for one in [("generic", "all"), *OPERATIONS]]

def look():
    before = state()
    with tf32(False):
        assert not {newer(*one) for one in OPERATIONS if one != ("mkldnn", "all")} - {"ieee"}, state()
        assert [older(ask) for ask in OLDER] == ["highest", False, False]
    assert state() == before, (before, state())
    with tf32(True):
        assert {newer("cuda", kind) for kind in ("conv", "rnn", "matmul")} == {"tf32"}, state()
        assert [older(ask) for ask in OLDER] == ["high", True, True]
        with tf32(False):
            assert [older(ask) for ask in OLDER] == ["highest", False, False]
        assert [older(ask) for ask in OLDER] == ["high", True, True]
    assert state() == before, (before, state())
    if torch.backends.fp32_precision == "tf32":  # what followed it follows it still
        torch.backends.fp32_precision = "ieee"
        assert newer("cuda", "rnn") == newer("mkldnn", "matmul") == "ieee", state()

for said in sys.argv[1:]:
    if not os.fork():  # for some settings can be said, and never be taken back
        try:
            exec(said)
            look()
        except BaseException:
            print(said, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
sys.exit(any([os.wait()[1] for _ in sys.argv[1:]]))
"""


@pytest.mark.slow
def test_whatever_was_said_before_tf32_is_off_inside_and_afterwards_as_it_was() -> None:
    ran = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT, *SAID], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
