"""Flips and crops of training images: torchvision's, each image's own, and refused where w must stay that of x."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as tv

from dmat_ray.config import Config, TrainingConfig
from dmat_ray.data.manifold_set import open_set
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint
from dmat_ray.training import trainer
from dmat_ray.training.augmentation import augment
from dmat_ray.training.objectives import Objective
from dmat_ray.types import Batch

BOTH = TrainingConfig(flip=True, crop_padding=2)


def batch(count: int) -> Batch:
    x = torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(0)) + 0.01  # no pixel is black
    return Batch([f"image {k}" for k in range(count)], x, torch.arange(count), torch.rand(count, 2, 4))


def places(before: Batch, after: Batch, padding: int) -> list[tuple[int, int, bool]]:
    """Where torchvision crops each of the padded images, and whether it mirrors it, to get what was made of it."""
    found, offsets = [], range(2 * padding + 1)
    for x, made in zip(before.x_BCHW, after.x_BCHW, strict=True):
        padded = tv.pad(x, [padding])
        for top, left, mirrored in itertools.product(offsets, offsets, (False, True)):
            cropped = tv.crop(padded, top, left, *x.shape[1:])
            if torch.equal(tv.hflip(cropped) if mirrored else cropped, made):
                found.append((top, left, mirrored))
    return found


def test_each_image_is_one_of_torchvisions_crops_and_all_of_them_occur() -> None:
    before = batch(1000)
    found = places(before, augment(before, BOTH, 3), 2)
    assert len(found) == 1000
    counts = {place: found.count(place) for place in set(found)}
    assert len(counts) == 50
    assert max(counts.values()) < 45, "20 each, give or take"
    assert {(top, left) for top, left, _ in places(before, augment(before, TrainingConfig(flip=True), 3), 0)} == {(0, 0)}
    assert not any(mirrored for *_, mirrored in places(before, augment(before, TrainingConfig(crop_padding=1), 3), 1))


def test_what_is_made_of_an_image_depends_on_itself_the_epoch_and_the_seed() -> None:
    before = batch(40)
    after = augment(before, BOTH, 1)
    assert after.w_BLD is None
    assert torch.equal(after.y_B, before.y_B)
    some = torch.tensor([7, 3])
    assert torch.equal(augment(before.take(some), BOTH, 1).x_BCHW, after.x_BCHW[some])
    for settings, epoch in ((BOTH, 2), (BOTH.model_copy(update={"seed": 1}), 1)):
        same = (augment(before, settings, epoch).x_BCHW == after.x_BCHW).flatten(1).all(dim=1)
        assert same.sum() < 8


def test_training_sees_them_before_the_attack(
    make_config: Callable[..., Config],
    set_folder: Path,
    generator: StyleGAN2,
    generator_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attacks meet the images that are made, and other images make other weights; where w is attacked they are refused."""
    data, sha = open_set(set_folder, "train"), generators.fingerprint(str(generator_folder))
    made = make_config(training={"flip": True, "crop_padding": 1}).training

    def trained(name: str, latent: float = 0.0, **training: object) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir()
        objective = {"clean": {"weight": 0.5}, "latent": {"weight": latent}}
        config = make_config(training=training, objective=objective)
        trainer.train(config, data, generator, sha, LocalContext(tmp_path / name))
        return checkpoint.load_classifier(tmp_path / name / "checkpoint")[0].state_dict()

    attacked: list[Batch] = []
    worst = Objective.worst

    def noted(self: Objective, view: object, part: Batch, *given: object, **named: object) -> dict[str, torch.Tensor]:
        attacked.append(part)
        return worst(self, view, part, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Objective, "worst", noted)
    plain = trained("plain")
    before = {id: x for part in attacked for id, x in zip(part.id, part.x_BCHW, strict=True)}
    attacked.clear()
    moved = trained("moved", flip=True, crop_padding=1)
    met = attacked[0]
    expected = augment(Batch(met.id, torch.stack([before[id] for id in met.id]), met.y_B), made, 0).x_BCHW
    assert torch.equal(met.x_BCHW, expected)
    assert not torch.equal(met.x_BCHW, torch.stack([before[id] for id in met.id]))
    natural = trained("natural", images="natural", flip=True)
    weights = [key for key in plain if key.startswith("network.") and plain[key].dim() == 4]
    assert weights
    assert not any(torch.equal(plain[key], moved[key]) for key in weights)
    assert all(torch.isfinite(value).all() for value in natural.values() if value.is_floating_point())
    with pytest.raises(UserError, match=r"training\.flip and training\.crop_padding .* objective\.latent .* g\(w\)"):
        trained("refused", latent=0.5, flip=True)
