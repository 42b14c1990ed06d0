"""What `from dmat_ray import ...` gives does what the parts do."""

import doctest
import importlib
import inspect
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import dmat_ray
from dmat_ray import (
    api,
    attack_images,
    build_threat,
    cli,
    dry_run,
    evaluate,
    image_files,
    inputs,
    load_classifier,
    load_images,
    make_set,
    open_set,
    project,
    settings,
    train,
)
from dmat_ray.cluster import shard_tasks
from dmat_ray.config import Config, EvaluationConfig
from dmat_ray.data import set_writer
from dmat_ray.data.set_format import MANIFEST
from dmat_ray.devices import tf32
from dmat_ray.errors import UserError
from dmat_ray.evaluation import evaluation
from dmat_ray.exchange import model_import
from dmat_ray.manifold import set_maker
from dmat_ray.manifold.starts import Nearest
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.threats.balls import Ball
from dmat_ray.types import Batch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_examples_show_what_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one place, one after the other: the first of them make the small set and its model, the others find them there."""
    monkeypatch.chdir(tmp_path)
    runner, found = doctest.DocTestRunner(), doctest.DocTestFinder(recurse=False)
    for name in dmat_ray.__all__:
        one = getattr(dmat_ray, name)
        (example,) = found.find(one, name, importlib.import_module(one.__module__), globs={})
        told: list[str] = []
        failed, tried = runner.run(example, out=told.append)
        assert failed == 0, "".join(told)
        assert tried > 1, f"{name} has no example"


def test_the_page_of_the_api_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code, shown = re.findall(r"```python\n(.*?)```\n[^`]*```text\n(.*?)```", page, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(compile(code, "docs/python.md", "exec"), names)
    said = capsys.readouterr().out
    assert re.sub(r"\d+\.\d+|\d+", "#", said).split() == re.sub(r"\d+\.\d+|\d+", "#", shown).split(), said
    counts = {
        line.split(":")[0]: int(line.split()[-1]) for line in said.splitlines() if line.startswith(("clean", "pixels", "w:"))
    }
    assert counts["pixels"] > counts["clean"], "an attack turns more digits than none"
    assert counts["w"] > counts["clean"]


def test_the_page_lists_all_names() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in dmat_ray.__all__ if f"| `{name}`" not in page] == []


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_names_come_when_they_are_asked_for() -> None:
    assert (
        in_fresh_python("import sys, dmat_ray, dmat_ray.config; print(*{'torch', 'ray', 'pyarrow'} & sys.modules.keys())") == ""
    )
    assert (
        in_fresh_python("import sys; from dmat_ray import settings; settings('demo'); print('torch' in sys.modules)") == "False"
    )
    code = "import sys; sys.modules['ray'] = None; from dmat_ray import *; print('torch' in sys.modules, train.__name__)"
    assert in_fresh_python(code) == "True train"


def test_names_are_listed_and_none_hides_a_module() -> None:
    assert set(dmat_ray.__all__) <= set(dir(dmat_ray))
    modules = {path.stem for path in (ROOT / "dmat_ray").iterdir()}
    assert modules & set(dmat_ray.__all__) == set()
    with pytest.raises(AttributeError, match="'dmat_ray' has no attribute 'trian'"):
        dmat_ray.trian  # noqa: B018
    assert (ROOT / "dmat_ray" / "py.typed").is_file()


def test_settings_are_those_of_the_command_line() -> None:
    options = ["--preset", "demo", "dmat", "--objective.image.eps", "8/255", "--training.epochs", "3", "--output", "runs/x"]
    expected, _ = cli.parse("test", options)
    assert settings("demo", "dmat", objective={"image": {"eps": "8/255"}}, training={"epochs": 3}, output="runs/x") == expected
    assert len(expected.evaluation.attacks) > 5, "the suite's rows"
    with pytest.raises(UserError, match=r"preset 'dmta' does not exist; did you mean dmat\? choose from"):
        settings("dmta")


def by_hand(network: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """FGSM (arXiv 1412.6572)."""
    x = x.clone().requires_grad_(True)
    F.cross_entropy(network(x), y).backward()
    assert x.grad is not None
    return (x + eps * x.grad.sign()).clamp(0, 1).detach()


def test_one_step_in_pixels_is_fgsm(small_net: nn.Module, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(12)
    small_net.eval()
    expected = by_hand(small_net, batch.x_BCHW, batch.y_B, 0.05)
    small_net.train()
    threat = build_threat("image", eps=0.05)
    found = attack_images(small_net, threat, batch.x_BCHW, batch.y_B, steps=1, step_size=0.05, random_start=False)
    torch.testing.assert_close(found.x_BCHW, expected)
    assert small_net.training, "it is left as it was"
    assert torch.equal(found.broken_B, small_net.eval()(expected).argmax(dim=1) != batch.y_B)


def test_a_step_along_the_manifold_is_that_of_w(
    small_net: nn.Module, generator: StyleGAN2, make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch(6)
    assert batch.w_BLD is not None
    w = batch.w_BLD.clone().requires_grad_(True)
    F.cross_entropy(small_net.eval()(generator.synthesis(w)), batch.y_B).backward()
    assert w.grad is not None
    expected = generator.synthesis(batch.w_BLD + 0.1 * w.grad.sign())
    threat = build_threat("latent", generator=generator, eps=0.1)
    search = {"steps": 1, "step_size": 0.1, "random_start": False}
    found = attack_images(small_net, threat, batch.x_BCHW, batch.y_B, batch.w_BLD, **search)
    torch.testing.assert_close(found.x_BCHW, expected)


def test_an_attack_does_not_depend_on_its_batches(small_net: nn.Module, make_batch: Callable[..., Batch]) -> None:
    batch, threat = make_batch(10), build_threat("fog", eps=0.3)
    whole, parts = (attack_images(small_net, threat, batch.x_BCHW, batch.y_B, batch_size=n, steps=2) for n in (100, 3))
    torch.testing.assert_close(whole.x_BCHW, parts.x_BCHW)
    assert torch.equal(whole.broken_B, parts.broken_B)
    names = [f"other-{k}" for k in range(10)]
    other = attack_images(small_net, threat, batch.x_BCHW, batch.y_B, ids=names, steps=2)
    assert not torch.equal(whole.x_BCHW, other.x_BCHW), "random starts belong to names"


def test_an_attack_is_of_float32(small_net: nn.Module, make_batch: Callable[..., Batch]) -> None:
    batch, allowed = make_batch(12), set()

    def note(network: nn.Module, given: tuple[Tensor]) -> None:
        if len(given[0]) == len(batch):  # what tries the network takes fewer
            allowed.add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))

    small_net.register_forward_pre_hook(note)
    with tf32(True):
        attack_images(small_net, build_threat("image", eps=0.05), batch.x_BCHW, batch.y_B, steps=1)
    assert allowed == {("highest", False)}


class Brighter(Ball):
    """A threat of one number an image."""

    def start(self, batch: Batch, draws: Any) -> Tensor:
        return self.within(draws, batch.x_BCHW.new_empty(len(batch), 1))

    def render(self, batch: Batch, theta: Tensor) -> Tensor:
        return (batch.x_BCHW + theta[:, :, None, None]).clamp(0, 1)


def test_a_threat_of_ones_own_is_attacked_with(small_net: nn.Module, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(8)
    found = attack_images(small_net, Brighter("linf", 0.2), batch.x_BCHW, batch.y_B, steps=5)
    assert found.theta.abs().max() <= 0.2
    torch.testing.assert_close(found.x_BCHW, (batch.x_BCHW + found.theta[:, :, None, None]).clamp(0, 1))


PROJECTION: dict[str, Any] = {"lpips": 0, "l1": 10, "l2": 50, "noise": 0, "start": "nearest", "candidates": 50}


def test_projection_comes_closer_than_where_it_starts(generator: StyleGAN2) -> None:
    rng = torch.Generator().manual_seed(3)
    x = generator.synthesis(generator.mapping(torch.randn(5, generator.z_dim, generator=rng)))
    found = project(generator, x, steps=30, **PROJECTION)
    start = generator.synthesis(Nearest(generator, 50, 0)(x))
    assert (found.l1_B < (start - x).abs().mean(dim=(1, 2, 3))).all()
    torch.testing.assert_close(found.x_BCHW, generator.synthesis(found.w_BLD))
    torch.testing.assert_close(found.l1_B, (found.x_BCHW - x).abs().mean(dim=(1, 2, 3)))
    levels = project(generator, (x * 255).round().to(torch.uint8), steps=1, **PROJECTION)
    torch.testing.assert_close(levels.w_BLD, project(generator, (x * 255).round() / 255, steps=1, **PROJECTION).w_BLD)


def test_an_encoder_lies_beside_its_generator() -> None:
    x = load_images("mnist5k", limit=10)[0].x_BCHW
    found = project("mnist32", x, start="encoder", steps=1, lpips=0)
    assert found.l1_B.mean() < project("mnist32", x, start="mean", steps=1, lpips=0).l1_B.mean() / 2
    with pytest.raises(UserError, match="give that one's name or folder"):
        project(dmat_ray.load_generator("mnist32"), x, start="encoder", steps=1, lpips=0)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Config], set_folder: Path) -> Config:
    """A training of a second on the tiny set, elsewhere than the set."""
    output = str(tmp_path_factory.mktemp("trained"))
    return make_config(output=output, manifold_set=str(set_folder), name="tiny")


ROWS = [
    {"threat": "clean"},
    {"threat": "image", "name": "PGD", "eps": 0.1, "steps": 3},
    {"threat": "latent", "name": "OM-PGD", "eps": 0.3, "steps": 3},
]


def test_rows_are_those_of_the_job(config: Config, set_folder: Path, generator: StyleGAN2, small_net: nn.Module) -> None:
    """The job's actors read model, set and generator from their folders, and evaluate units of work."""
    model, data = train(config), open_set(set_folder, "test")
    suite = EvaluationConfig.model_validate({"attacks": ROWS, "batch_size": 5})
    results = evaluate({"tiny": model, "mine": load_classifier(model)[0]}, data, generator, suite)

    def load(name: str) -> nn.Module:
        return load_classifier(str(model))[0]

    evaluator = evaluation.Evaluator(suite, data, generator, load, ["tiny"], CPU)
    expected = evaluation.evaluate_here(evaluator).drop_columns(["seconds"])
    rows = results.rows.drop_columns(["seconds"])
    mask = np.array(rows["model"].to_pylist()) == "tiny"
    assert rows.filter(mask).equals(expected)
    assert rows.filter(~mask).drop_columns(["model", "source"]).equals(expected.drop_columns(["model", "source"]))
    assert expected.num_rows == 5 * 12


def test_what_callers_draw_is_as_if_nothing_had_been_called(
    tmp_path: Path, make_config: Callable[..., Config], set_folder: Path, generator_folder: Path, small_net: nn.Module
) -> None:
    """By torch's random numbers, and by Python's and numpy's, which others may take."""
    config = make_config(output=str(tmp_path), manifold_set=str(set_folder), name="drawn")
    own = settings("demo", "small", output=str(tmp_path), data={"train_limit": 20, "test_limit": 10}, projection={"steps": 1})
    digits, data = load_images("mnist5k", limit=10)[0], open_set(set_folder, "test")
    model, photos, path = tmp_path / "models" / "drawn", tmp_path / "photos", str(generator_folder)
    photos.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(photos / "black.png")
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)

    def drawn() -> Any:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    for call in (
        lambda: make_set(own),
        lambda: train(config),
        lambda: load_classifier(model),
        lambda: dmat_ray.load_generator(path),
        lambda: dmat_ray.load_generator(path, precision="fast"),
        lambda: project("mnist32", digits.x_BCHW, start="encoder", steps=1, lpips=0),
        lambda: attack_images(small_net, build_threat("fog"), images, labels, steps=1),
        lambda: evaluate({"drawn": model}, data, path, EvaluationConfig(), attacks=ROWS),
        lambda: image_files.predict(model, photos),
    ):
        before = drawn()
        call()
        assert drawn() == before, inspect.getsource(call)


def test_an_evaluated_network_is_left_as_it_was(set_folder: Path, generator: StyleGAN2) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).train()
    results = evaluate({"mine": network}, open_set(set_folder, "test"), generator, EvaluationConfig(), attacks=ROWS, limit=4)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert results.accuracy("mine", "natural", "clean").count == 4


def test_an_exported_program_is_attacked_as_its_network(
    set_folder: Path, generator: StyleGAN2, make_batch: Callable[..., Batch]
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(288, 3))
    batch, any_number = make_batch(12), ({0: torch.export.Dim("images")},)
    program = torch.export.export(network.eval(), (batch.x_BCHW,), dynamic_shapes=any_number).module()
    networks = {"plain": network, "program": program, "inside": nn.Sequential(program)}
    threat, labels = build_threat("image", eps=0.05), batch.y_B % 3
    found = {name: attack_images(one, threat, batch.x_BCHW, labels, steps=3) for name, one in networks.items()}
    assert 0 < int(found["plain"].broken_B.sum()) < 12
    results = evaluate(networks, open_set(set_folder, "test"), generator, EvaluationConfig(), attacks=ROWS).rows
    rows = {name: results.filter(pc.equal(results["model"], name)) for name in networks}
    for name in ("program", "inside"):
        assert torch.equal(found[name].broken_B, found["plain"].broken_B)
        for column in ("id", "attack", "prediction"):
            assert rows[name][column].equals(rows["plain"][column])
        assert networks[name].training, "it is left as it was"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["torchscript", "torch_export"])
def test_an_imported_program_is_not_attacked_in_bf16(
    set_folder: Path, generator: StyleGAN2, make_config: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    network, x, file, folder = (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
        torch.rand(2, 1, 8, 8),
        tmp_path / "x",
        tmp_path / "mine",
    )
    if kind == "torchscript":
        torch.jit.script(network).save(str(file))
    else:
        file = file.with_suffix(".pt2")
        torch.export.save(torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("images")},)), file)
    data, config = (
        open_set(set_folder, "test"),
        make_config(manifold_set=str(set_folder), evaluation={"attacks": ROWS, "precision": "bf16"}),
    )
    found = model_import.read_model(file, config.classifier, None, 1, 8, 3)
    model_import.save_model(found, file, config, data.class_names, 1, 8, folder)
    told = rf"model 'mine' is a program \({kind}\), .* evaluation\.precision is bf16; give --evaluation\.precision float32"
    with pytest.raises(UserError, match=told):
        evaluate({"mine": folder}, data, generator, config.evaluation)
    with pytest.raises(UserError, match=told):
        dry_run.evaluation_stage(config, {"mine": folder})
    for changes in ({"precision": "float32"}, {"attacks": ROWS[:1]}):
        assert evaluate({"mine": folder}, data, generator, config.evaluation, **changes).models == ["mine"]


def test_a_set_made_here_is_the_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shards hold what tasks and actors of the job put there, and the job takes it for its own."""
    config = settings("demo", "small", output=str(tmp_path), data={"train_limit": 20, "test_limit": 10}, projection={"steps": 2})
    folder = make_set(config)
    listing = set_maker.prepare(config, lambda line: None)
    assert set_writer.is_finished(folder, set_maker.settings_of(config, listing))
    (shard,) = set_writer.plan(listing, 256)
    row = shard_tasks.read_shard(shard_tasks.pack(shard.name, shard.rows, {}), data=config.data.model_dump(mode="json"))
    from dmat_ray.cluster.shard_projector import project_shard

    made = project_shard(set_maker.build_projector(config, CPU), row, config.projection, list(listing.class_names))
    expected = shard_tasks.unpack(made)[1]
    test = open_set(folder, "test", include_poor=True)
    at = [expected["id"].to_pylist().index(id) for id in test.id]
    w = np.stack([np.array(expected["w"][k].as_py(), np.float32).reshape(8, 64) for k in at])
    np.testing.assert_array_equal(test.w, w)
    capsys.readouterr()
    assert str(make_set(config)) == str(folder)
    assert "nothing to do" in capsys.readouterr().err
    (folder / MANIFEST).unlink()
    monkeypatch.setattr(set_maker, "_project", None)
    assert str(make_set(config)) == str(folder), "its shards are there"
    assert (folder / MANIFEST).is_file()


def test_a_set_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/on_manifold_set' cannot be written: .*; give another --output or --manifold_set"):
        make_set(settings("demo", "small", output=str(tmp_path / "file")))


def test_modules_are_short() -> None:
    for module in (api, image_files, inputs):
        assert len(Path(str(module.__file__)).read_text().splitlines()) < 300
