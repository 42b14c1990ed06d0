"""Networks: they take the images' channels and normalise inside themselves."""

import pytest
import torch

from dmat_ray import classifiers
from dmat_ray.config import ClassifierConfig
from dmat_ray.errors import UserError


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_models_take_the_images_channels(name: str, channels: int) -> None:
    network = classifiers.build(ClassifierConfig(name=name, mean=(0.4,), std=(0.2,)), channels, 5).eval()
    with torch.no_grad():
        assert network(torch.rand(2, channels, 32, 32)).shape == (2, 5)


def test_normalisation_is_inside_the_classifier() -> None:
    torch.manual_seed(0)
    network = classifiers.build(ClassifierConfig(name="digits_cnn", mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)), 3, 4).eval()
    x = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network(x), network.network((x - mean) / std))


def test_a_network_that_cannot_be_built() -> None:
    with pytest.raises(UserError, match=r"classifier\.name 'resnet19' is not known; choose 'digits_cnn', timm.*resnet18"):
        classifiers.build(ClassifierConfig(name="resnet19"), 3, 5)
    with pytest.raises(UserError, match=r"classifier\.mean has 2 values, images have 3 channel"):
        classifiers.build(ClassifierConfig(name="digits_cnn", mean=(0.1, 0.2)), 3, 5)
