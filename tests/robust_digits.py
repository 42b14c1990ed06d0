"""Test digits, and an adversarially trained network that knows them."""

from pathlib import Path

import numpy as np
import torch
from classifiers.make import digits
from torch import nn

from dmat_ray.config import ClassifierConfig
from dmat_ray.data.manifold_set import ManifoldSet
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers

COUNT = 60
CPU = torch.device("cpu")


def digits_set() -> ManifoldSet:
    """Test digits of all classes."""
    every = digits("test")
    part = every.take(torch.arange(COUNT) * len(every) // COUNT)
    pixels = (part.x_BCHW.numpy() * 255).round().astype(np.uint8)
    order = np.argsort(np.array(part.id))
    ids, names = [part.id[i] for i in order], tuple(str(k) for k in range(10))
    codes = np.zeros((COUNT, 1, 4), np.float32)
    return ManifoldSet(ids, pixels[order], pixels[order], part.y_B.numpy()[order], codes, names, {})


def robust_network() -> nn.Module:
    """The adversarially trained one that ships with the tests."""
    network = classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=10)
    checkpoint.load_weights(Path(__file__).parent / "classifiers" / "robust", network)
    return network.eval()
