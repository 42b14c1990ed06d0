"""Where accuracies and predictions are computed float32 is float32, whatever GPUs are allowed elsewhere."""

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
