"""What is wrong with the inputs of `from dmat_ray import ...` is said by name, with the way out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dmat_ray import (
    attack_images,
    build_threat,
    evaluate,
    load_classifier,
    load_generator,
    load_images,
    make_set,
    open_set,
    predict,
    project,
    settings,
    terminal_table,
    train,
)
from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.devices import device_of
from dmat_ray.errors import UserError
from dmat_ray.manifold import generators
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.types import Batch

X, Y = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.int64)


MEAN = [{"name": "m", "how": "mean", "of": ["PGD-99"]}]


ROWS = [
    {"threat": "clean"},
    {"threat": "image", "name": "PGD", "eps": 0.1, "steps": 1},
    {"threat": "latent", "name": "OM", "eps": 0.1, "steps": 1},
]


def of_the_batch() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 3))


def three_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def three_channels() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X.numpy(), Y, r"x_BCHW is a ndarray, not a torch tensor; convert it, as by torch.from_numpy"),
        ((X * 255).byte(), Y, r"x_BCHW is uint8, but images are float in \[0, 1\] here; give x_BCHW / 255"),
        (X.bool(), Y, r"x_BCHW is bool, but images are float"),
        (X.half(), Y, r"x_BCHW is float16, whose .*; give x_BCHW.float\(\) and network.float\(\)"),
        (X.bfloat16(), Y, r"x_BCHW is bfloat16, whose .*; give x_BCHW.float\(\) and network.float\(\)"),
        (X[0], Y, r"x_BCHW has the shape \(1, 8, 8\), but must have .* give x_BCHW\[None\] for one image"),
        (X[:0], Y, r"x_BCHW has the shape \(0, 1, 8, 8\)"),
        (X.permute(0, 2, 3, 1), Y, r"shape \(4, 8, 8, 1\), its channels last; give x_BCHW.permute\(0, 3, 1, 2\)"),
        (X * 255, Y, r"x_BCHW ranges from [\d.]+ to 25\d.*, but images must lie in \[0, 1\]; divide by 255"),
        (X - 0.5, Y, r"ranges from -0\.\d+ to 0\.\d+, .* undo their normalisation"),
        (X / 0, Y, r"x_BCHW ranges from .*, but images must lie in \[0, 1\]"),
        (X.repeat(1, 3, 1, 1), Y, r"the network cannot take images of 3x8x8: .*channels"),
        (X, Y.float(), r"y_B is float32, but labels are int64; give y_B.long\(\)"),
        (X, F.one_hot(Y, 4).float(), r"y_B is float32, but labels are int64; give y_B.argmax\(dim=1\)"),
        (X, Y[:3], r"y_B has the shape \(3,\), but 4 images have as many labels, \(4,\)"),
        (X, Y + 4, r"y_B ranges from 4 to 4, but the network puts out 4 classes, 0 to 3"),
        (X, [0, 0, 0, 0], r"y_B is a list, not a torch tensor; give torch.tensor\(y_B\)"),
    ],
)
def test_images_and_labels_are_looked_at(x: Any, y: Any, message: str, small_net: nn.Module) -> None:
    dtype = x.dtype if isinstance(x, Tensor) and x.is_floating_point() else torch.float32
    with pytest.raises(UserError, match=message):
        attack_images(small_net.to(dtype), build_threat("image"), x, y)


def test_codes_are_looked_at(small_net: nn.Module, generator: StyleGAN2, make_batch: Callable[..., Batch]) -> None:
    batch, threat = make_batch(4), build_threat("latent", generator=generator)
    w = batch.w_BLD
    assert w is not None
    for x, given, message in (
        (batch.x_BCHW, None, "this threat moves w, and there is none; give w_BLD and its images"),
        (batch.x_BCHW, w.numpy(), "w_BLD is a ndarray, not a torch tensor; convert it, as by torch.from_numpy"),
        (batch.x_BCHW, w[:, :1], r"w_BLD has the shape \(4, 1, 8\), but 4 codes of this generator have \(4, 4, 8\)"),
        (1 - batch.x_BCHW, w, r"x_BCHW is not g\(w_BLD\): pixels of image 0 differ by up to"),
        (batch.x_BCHW.repeat(1, 3, 1, 1), w, "x_BCHW has images of 3x8x8, the generator makes 1x8x8"),
    ):
        with pytest.raises(UserError, match=message):
            attack_images(three_channels() if x.shape[1] == 3 else small_net, threat, x, batch.y_B, given)
    with pytest.raises(UserError, match="on meta, the images are on cpu; move one of them"):
        attack_images(small_net.to("meta"), threat, batch.x_BCHW, batch.y_B, w)


@pytest.mark.parametrize("batch_size", [5, 100])
def test_the_codes_of_all_images_are_looked_at(
    small_net: nn.Module, generator: StyleGAN2, make_batch: Callable[..., Batch], batch_size: int
) -> None:
    batch, threat = make_batch(14), build_threat("latent", generator=generator)
    assert batch.w_BLD is not None
    mixed = batch.w_BLD[[*range(8), 13, *range(8, 13)]]
    with pytest.raises(UserError, match=r"x_BCHW is not g\(w_BLD\): pixels of image 8 differ by up to .*, in their order"):
        attack_images(small_net, threat, batch.x_BCHW, batch.y_B, mixed, batch_size=batch_size)
    found = attack_images(small_net, threat, batch.x_BCHW, batch.y_B, batch.w_BLD, batch_size=batch_size, steps=1)
    assert len(found.x_BCHW) == 14


def test_other_inputs_are_looked_at(small_net: nn.Module, generator: StyleGAN2, set_folder: Path, tmp_path: Path) -> None:
    image, data = build_threat("image"), open_set(set_folder, "test")
    made, taken = (open_set(set_folder, "test", images=kind) for kind in ("on_manifold", "natural"))
    suite = EvaluationConfig()
    results = evaluate({"a": three_classes()}, data, generator, suite, attacks=ROWS, limit=3)
    assert evaluate({"a": three_classes()}, made, generator, suite, sets=["on_manifold"], limit=3).models == ["a"]
    for call, message in (
        (lambda: build_threat("imgae"), r"no threat 'imgae'; did you mean image\? choose from image, latent, fog"),
        (lambda: attack_images(small_net, image, X, Y, steps=3, step_size=1 / 255), "3 steps of step_size 0.00392 .* weak"),
        (
            lambda: attack_images(small_net, build_threat("fog"), X, Y, steps=20, step_size=1 / 255),
            r"20 steps of step_size 0.00392 .* in a unit box is 0\.4: a weak attack",
        ),
        (lambda: build_threat("latent"), r"threat latent moves w; give its generator, as build_threat\('latent', generator="),
        (lambda: build_threat("image", eps=8), "threat image: eps is 8, but pixels are in .* did you mean 8/255?"),
        (lambda: build_threat("latent", generator=small_net), "generator is a SmallNet; give 'mnist32', a folder"),
        (lambda: attack_images(small_net, image, X, Y, step=3), r"attack: step: there is no .*; did you mean steps\?"),
        (lambda: attack_images(small_net, image, X, Y, curve=(1,)), "curve belongs to a suite's table"),
        (lambda: attack_images(small_net, image, X, Y, ids=["a"] * 4), "ids has 'a' more than once; give each image a name"),
        (lambda: attack_images(small_net, image, X, Y, ids=list("ab")), "ids has 2 names for 4 images"),
        (lambda: attack_images(small_net, "image", X, Y), r"threat is 'image'; give what build_threat makes"),
        (lambda: attack_images(small_net, image, X, Y, name="x"), "name belongs to a suite's table"),
        (lambda: attack_images(small_net, image, X, Y, batch_size=0), "batch_size is 0; give a whole number, 1 or more"),
        (lambda: attack_images(small_net, image, X, Y, batch_size="3"), "batch_size is '3'; give a whole number, 1 or more"),
        (lambda: attack_images(small_net, image, X, Y, X[:3]), r"w_BLD has the shape \(3, 1, 8, 8\), but 4 images have as many"),
        (lambda: attack_images(small_net, image, X, Y, X.numpy()), "w_BLD is a ndarray, not a torch tensor; convert it"),
        (lambda: results.accuracy("b", "natural", "clean"), "there is no model 'b' in these results; choose from a"),
        (lambda: results.accuracy("a", "natrual", "clean"), r"no set 'natrual' in .*; did you mean natural\? choose from"),
        (lambda: results.accuracy("a", "natural", "PDG"), r"no column 'PDG' .*; did you mean PGD\? choose from clean, PGD$"),
        (lambda: results.accuracy("a", "natural", "OM"), "no column 'OM' in these results; choose from clean, PGD"),
        (lambda: terminal_table(None, ["a"]), "results is a NoneType; give what evaluate returns"),
        (lambda: terminal_table(results, ["typo"]), "there is no model 'typo' in these results; choose from a"),
        (lambda: terminal_table(results, []), r"models is \[\]; give some of those that were evaluated: a"),
        (lambda: attack_images(lambda x: x, image, X, Y), "the network is a function, not a torch.nn.Module"),
        (lambda: attack_images(nn.Flatten(0), image, X, Y), r"puts out \(64,\) for one image, but must put out"),
        (lambda: attack_images(of_the_batch(), image, X, Y), "the network says something else of an image as the other images"),
        (lambda: evaluate({"a": of_the_batch()}, data, generator, suite), "model 'a' says something else of an image"),
        (lambda: project(generator, X.repeat(1, 1, 2, 2)), "x_BCHW has images of 1x16x16, the generator makes 1x8x8"),
        (lambda: project(generator, X, settings("demo")), "projection settings are a Config; give a ProjectionConfig"),
        (lambda: project(generator, X, ids=["a"], lpips=0), "ids has 1 names for 4 images"),
        (lambda: project(generator, X, ids=list("abab"), lpips=0), "ids has 'a' more than once"),
        (lambda: load_images("mnist5k", "val"), "split is 'val'; choose train or test"),
        (lambda: load_images(str(tmp_path / "none")), "neither 'mnist5k' nor a folder"),
        (lambda: evaluate(small_net, data, generator, suite), "models is a SmallNet; give models by names, {'mine'"),
        (lambda: evaluate([small_net], data, generator, suite), "models is a list; give models by names"),
        (lambda: evaluate({"a": max}, data, generator, suite), "model 'a' is a builtin_function_or_method, not a torch"),
        (lambda: evaluate({"a": small_net}, "runs/x", generator, suite), r"data is 'runs/x'; give .* open_set\(folder, 'test'\)"),
        (lambda: evaluate({"a": small_net}, made, generator, suite), "without its natural images, .*; open it with images=None"),
        (lambda: evaluate({"a": small_net}, taken, generator, suite, sets=["natural"]), "without its on_manifold images, which"),
        (lambda: evaluate({"a": small_net}, data, generator, "digits", summaries=MEAN), "evaluation: .*names 'PGD-99', which"),
        (lambda: evaluate({}, data, generator, suite), "there are no models to evaluate"),
        (lambda: evaluate({1: small_net}, data, generator, suite), "models has the name 1; names are texts, as in {'mine': netw"),
        (lambda: evaluate({"": small_net}, data, generator, suite), "models has the name ''; names are texts"),
        (lambda: evaluate({"a": small_net}, data, generator, suite), "model 'a' puts out 4 classes, the set has 3"),
        (lambda: evaluate({"a": small_net}, data, generator, "digit"), r"does not exist; did you mean digits\? choose from"),
        (lambda: evaluate({"a": "nowhere"}, data, generator, suite), "there is no trained model at 'nowhere'"),
        (lambda: evaluate({"a": small_net}, data, "mnist32", suite), "the set has images of 1x8x8, the generator makes 1x32x32"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            call()


def test_places_settings_and_devices_are_looked_at(small_net: nn.Module, set_folder: Path, generator_folder: Path) -> None:
    no_place = r"^a SmallNet names no folder or file; give a path or URL, as text or a pathlib\.Path$"
    unknown = r"^device is 'gpu', which torch does not know; give 'cpu', 'cuda' or 'cuda:0'$"
    for call, message in (
        (lambda: predict(small_net, "photos"), no_place),
        (lambda: load_classifier(small_net), no_place),
        (lambda: load_generator(small_net), no_place),
        (lambda: load_images(small_net), no_place),
        (lambda: open_set(small_net, "test"), no_place),
        (lambda: open_set(None, "test"), "a NoneType names no folder or file"),
        (lambda: predict("model", "photos", device="gpu"), unknown),
        (lambda: load_classifier("model", "gpu"), unknown),
        (lambda: load_generator(generator_folder, "gpu"), unknown),
        (lambda: load_generator(generator_folder, None), "device is None, which torch does not know"),
        (lambda: load_generator(generator_folder, "xpu"), "device is 'xpu', and torch finds no such device here; give 'cpu'"),
        (lambda: train("demo"), r"config is 'demo'; give what settings makes, as settings\('demo', 'dmat'\)"),
        (lambda: make_set("demo"), "config is 'demo'; give what settings makes"),
        (lambda: train({"epochs": 1}), "config is a dict; give what settings makes"),
    ):
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize(
    ("count", "given", "message"),
    [
        (0, "cuda", "^device is 'cuda', and torch finds no such device here; give 'cpu'$"),
        (2, "cuda:2", "^device is 'cuda:2', and the GPUs here are cuda:0 to cuda:1; give one of these$"),
        (2, "cuda:1", None),
        (2, "cuda", None),
    ],
)
def test_a_gpu_must_be_there(monkeypatch: pytest.MonkeyPatch, count: int, given: str, message: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if message is None:
        assert device_of(given) == torch.device(given)
    else:
        with pytest.raises(UserError, match=message):
            device_of(given)


def test_numbers_of_numpy_are_numbers(small_net: nn.Module) -> None:
    found = [attack_images(small_net, build_threat("image"), X, Y, batch_size=size, steps=2) for size in (3, np.int64(3))]
    assert torch.equal(found[0].x_BCHW, found[1].x_BCHW)


@pytest.mark.slow
def test_gradients_must_be_allowed(
    small_net: nn.Module, generator: StyleGAN2, set_folder: Path, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    data, image = open_set(set_folder, "test"), build_threat("image")
    config = make_config(output=str(tmp_path), manifold_set=str(set_folder), name="tiny", training={"epochs": 1})
    own = settings("demo", "small", output=str(tmp_path), data={"train_limit": 20, "test_limit": 10}, projection={"steps": 1})
    calls = (
        lambda: make_set(own),
        lambda: train(config),
        lambda: attack_images(small_net, image, X, Y, steps=1),
        lambda: project(generator, X, steps=1, lpips=0),
        lambda: evaluate({"a": three_classes()}, data, generator, EvaluationConfig(), attacks=ROWS, limit=3),
    )
    for call in calls:
        with torch.inference_mode(), pytest.raises(UserError, match=r"inference_mode\(\) is on, and .* or use torch.no_grad\(\)"):
            call()
        with torch.no_grad():
            call()


def test_folders_may_be_paths(generator_folder: Path, set_folder: Path, tmp_path: Path) -> None:
    data = open_set(set_folder, "test")
    batch = data.batch(np.arange(3), "on_manifold")
    found = [project(folder, batch.x_BCHW, steps=2, lpips=0) for folder in (generator_folder, str(generator_folder))]
    assert torch.equal(found[0].w_BLD, found[1].w_BLD)
    threat = build_threat("latent", generator=generator_folder, eps=0.1)
    assert attack_images(three_classes(), threat, batch.x_BCHW, batch.y_B, batch.w_BLD, steps=1).x_BCHW.shape == (3, 1, 8, 8)
    results = evaluate({"a": three_classes()}, data, generator_folder, EvaluationConfig(), attacks=ROWS, limit=3)
    assert results.accuracy("a", "on_manifold", "OM").count == 3
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.fromarray(np.full((8, 8), 99 * k, np.uint8)).save(tmp_path / name / f"{k}.png")
    assert load_images(tmp_path, resolution=8, test_share=0.5)[1] == ("a", "b")
    (tmp_path / "mine.yaml").write_text("training: {epochs: 7}")
    config = settings(tmp_path / "mine.yaml", output=tmp_path, generator={"path": generator_folder})
    assert config == settings(str(tmp_path / "mine.yaml"), output=str(tmp_path), generator={"path": str(generator_folder)})


class Picky(nn.Module):
    """A network that says in its own way what it does not take."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


def test_a_network_may_refuse_images_by_any_error() -> None:
    for error, said in (
        (AssertionError("height 8"), "height 8"),
        (TypeError("a\nb"), "a$"),
        (AssertionError(), "AssertionError"),
    ):
        with pytest.raises(UserError, match=f"the network cannot take images of 1x8x8: {said}"):
            attack_images(Picky(error), build_threat("image"), X, Y)


def test_a_set_of_another_generator_is_refused(
    make_generator: Callable[..., StyleGAN2], set_folder: Path, tmp_path: Path
) -> None:
    data, network = open_set(set_folder, "test"), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    other, not_of_w = (
        make_generator(seed=9),
        r"the set was made by another generator: its images are not g\(w\), pixels differ by",
    )
    with pytest.raises(UserError, match=not_of_w):
        evaluate({"a": network}, data, other, EvaluationConfig())
    mixed = replace(data, w=np.concatenate([data.w[:8], data.w[8:][::-1]]))
    with pytest.raises(UserError, match=not_of_w):
        evaluate({"a": network}, mixed, make_generator(), EvaluationConfig())
    other.num_ws += 1
    with pytest.raises(UserError, match=r"the set was made by another generator: its w is 4x8, this one's 5x8"):
        evaluate({"a": network}, data, other, EvaluationConfig())
    # the same images: a folder is told by its weights, as by the job
    same = make_generator()
    same.w_mean += 1
    generators.save_generator(tmp_path, same, {"name": "other"})
    with pytest.raises(UserError, match=r"the set was made with generator .*, but the one given is"):
        evaluate({"a": network}, data, str(tmp_path), EvaluationConfig())
