"""Running without ray: one process, and two under torchrun that must do what one would by averaging."""

import copy
import json
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrun import run_two_workers
from two_workers import one_step

from dmat_ray.config import Config
from dmat_ray.data import set_reader
from dmat_ray.data.epochs import held_out_positions
from dmat_ray.data.manifold_set import epoch_batches, open_set
from dmat_ray.data.set_reader import read_manifest
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.local_stages import train
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint
from dmat_ray.networks.attack_view import AttackView
from dmat_ray.storage import at
from dmat_ray.storage.files import is_full, read_json
from dmat_ray.storage.folders import put
from dmat_ray.storage.lease import sole
from dmat_ray.training import objectives, trained_models
from dmat_ray.training.schedules import learning_rate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(make_config: Callable[..., Config]) -> Config:
    # 19 examples in batches of 8: the last batch has 3, which two workers cannot share without topping up
    # rounding turns signs of gradients of networks so small, so that the layout must be the plain one on both sides
    return make_config(training={"val_examples": 5, "channels_last": False})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, config: Config, set_folder: Path) -> Path:
    """The folder of a training that torchrun ran with two workers over the loopback device."""
    folder = tmp_path_factory.mktemp("two_workers")
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    run_two_workers("two_workers.py", str(folder), str(set_folder))
    return folder


@pytest.fixture(scope="module")
def ranks(finished: Path) -> list[dict[str, Any]]:
    """What each worker wrote down."""
    return [torch.load(finished / f"rank{r}.pt", weights_only=True) for r in range(2)]


def timeless(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if key != "examples_per_second"}


def test_two_workers_end_with_equal_weights(ranks: list[dict[str, Any]], finished: Path) -> None:
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    one, two = ranks[0]["weights"], ranks[1]["weights"]
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert [timeless(m) for m in ranks[0]["reports"]] == [timeless(m) for m in ranks[1]["reports"]]
    saved, _ = checkpoint.load_classifier(finished / "checkpoint")
    assert all(torch.equal(value, one[key]) for key, value in saved.state_dict().items())


def test_averages_are_means_over_the_workers(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        averaged = [t.tolist() for t in rank["averaged"]]
        assert averaged == [[0.5, 1.0], [[2.5]], 0.5]


def test_two_workers_average_their_gradients(
    ranks: list[dict[str, Any]], config: Config, set_folder: Path, generator: StyleGAN2
) -> None:
    """The same training in one process: two networks, each with its part of the batch, move by the mean gradient."""
    data, settings = open_set(set_folder, "train"), config.training
    index, _ = held_out_positions(len(data), settings)
    workers = [checkpoint.classifiers.build(config.classifier, 1, 3)]
    workers[0].load_state_dict(ranks[0]["first_weights"])
    workers.append(copy.deepcopy(workers[0]))
    optimizers = [torch.optim.SGD(w.parameters(), lr=0, momentum=0.9, weight_decay=1e-4) for w in workers]
    objective = objectives.build(config.objective, generator)
    for epoch in range(settings.epochs):
        dealt = [
            epoch_batches(data, index, images="on_manifold", batch_size=8, epoch=epoch, seed=0, rank=r, world_size=2)
            for r in (0, 1)
        ]
        for step, parts in enumerate(zip(*dealt, strict=True)):
            for worker, part in zip(workers, parts, strict=True):
                worker.train().zero_grad()
                weights = objective.weights
                images = objective.worst(AttackView(worker, channels_last=False), part, weights, seed=0, purpose=f"train/{epoch}")
                objective.loss(worker, worker, images, part.y_B, weights)[0].backward()
            for pair in zip(*(w.parameters() for w in workers), strict=True):
                mean = (pair[0].grad + pair[1].grad) / 2
                pair[0].grad, pair[1].grad = mean.clone(), mean.clone()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = learning_rate(settings, epoch + step / 3)
                optimizer.step()
            for one, two in zip(*(w.buffers() for w in workers), strict=True):
                if one.is_floating_point():
                    mean = (one + two) / 2
                    one.copy_(mean)
                    two.copy_(mean)
    for key, value in workers[0].state_dict().items():
        np.testing.assert_allclose(value, ranks[0]["weights"][key], atol=1e-4, rtol=1e-3, err_msg=key)


def test_a_step_of_two_workers_is_that_of_one_on_the_joined_batch(
    ranks: list[dict[str, Any]], config: Config, set_folder: Path, tmp_path: Path
) -> None:
    """Where batch norm is frozen; elsewhere each worker normalises by its own part."""
    expected = one_step(config, open_set(set_folder, "train"), LocalContext(tmp_path))
    for rank in ranks:
        torch.testing.assert_close(rank["step_weights"], expected, atol=1e-9, rtol=1e-7)


def test_no_worker_returns_before_the_model_is_there(ranks: list[dict[str, Any]]) -> None:
    assert [rank["model_was_there"] for rank in ranks] == [True, True]


def test_two_trainings_of_one_name_are_refused(make_config: Callable[..., Config], set_folder: Path, tmp_path: Path) -> None:
    """Either might publish what the other has just written, and not finished."""
    config = make_config(output=str(tmp_path), manifold_set=str(set_folder), name="tiny")
    with pytest.raises(UserError, match=r"^every model needs a name of its own; given: ''; give one by name=, or --name on a"):
        train(config.model_copy(update={"name": ""}))
    (tmp_path / "local" / "tiny").mkdir(parents=True)
    with sole(tmp_path / "local" / "tiny"), pytest.raises(UserError, match=rf"is being written by process {os.getpid()} "):
        train(config)
    assert not (tmp_path / "models").exists()
    assert (Path(train(config)) / "model.safetensors").is_file()
    assert not list((tmp_path / "local").glob(".*")), "its own lease is taken away again"


def test_a_model_that_is_there_leaves_no_checkpoints(
    make_config: Callable[..., Config], set_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is not trained again; one of other settings takes its place."""
    names = {"output": str(tmp_path), "manifold_set": str(set_folder), "name": "tiny"}
    said = []
    for seed in (0, 0, 1):
        model = train(make_config(training={"seed": seed}, **names))
        assert [path.name for path in tmp_path.iterdir()] == ["models"]
        assert (model / "run.json").read_json()["config"]["training"]["seed"] == seed
        said.append([line for line in capsys.readouterr().err.splitlines() if "tiny: epoch" not in line])
    assert said[0][-1] == f"model in {model}"
    assert said[1] == ["tiny: is trained already and unchanged, nothing to do"]
    assert said[2][1] == "tiny: there is a model of this name, of other settings or another set; this one will take its place"


class KilledError(BaseException):
    """Nothing is tidied up after it."""


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("after", ["publishing", "a part"])
def test_checkpoints_that_a_kill_has_left_beside_their_model_are_no_hindrance(
    make_config: Callable[..., Config], set_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, after: str
) -> None:
    """Neither to the same command nor to one of other settings; those of a training that has not ended stay."""

    def config(seed: int) -> Config:
        return make_config(training={"seed": seed}, output=str(tmp_path), manifold_set=str(set_folder), name="tiny")

    publish, unlink = trained_models.publish, os.unlink

    def published(*given: Any) -> None:
        publish(*given)
        if after == "publishing":
            raise KilledError
        here.setattr(os, "unlink", killed)

    def killed(name: Any, **how: Any) -> None:
        unlink(name, **how)
        if Path(name).name == "run.json":
            raise KilledError

    with monkeypatch.context() as here:
        here.setattr(trained_models, "publish", published)
        with pytest.raises(KilledError):
            train(config(0))
    model = train(config(seed))
    assert (model / "run.json").read_json()["config"]["training"]["seed"] == seed
    assert not any(path.name != "models" and list(path.iterdir()) for path in tmp_path.iterdir())

    report = LocalContext.report

    def stopped(self: LocalContext, *given: Any, **how: Any) -> None:
        report(self, *given, **how)
        raise KilledError

    with monkeypatch.context() as here:
        here.setattr(LocalContext, "report", stopped)
        with pytest.raises(KilledError):
            train(config(seed + 1))
    assert train(config(seed)) == model
    assert (tmp_path / "local" / "tiny" / "checkpoint" / "run.json").is_file()


@pytest.mark.parametrize("sent", [0, 1])
def test_a_sigterm_that_comes_too_late_for_a_training_is_the_callers(
    make_config: Callable[..., Config], set_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    """While the model is published; whose SIGTERM was before has it afterwards."""
    config = make_config(output=str(tmp_path), manifold_set=str(set_folder), name="tiny")
    publish, models = trained_models.publish, []

    def signalled(*given: Any) -> None:
        for _ in range(sent):
            os.kill(os.getpid(), signal.SIGTERM)
        publish(*given)

    def note(number: int, frame: object) -> None:
        models.append([path.name for path in (tmp_path / "models").iterdir()])

    monkeypatch.setattr(trained_models, "publish", signalled)
    before = signal.signal(signal.SIGTERM, note)
    try:
        train(config, heed_sigterm=True)
        assert signal.getsignal(signal.SIGTERM) is note
    finally:
        signal.signal(signal.SIGTERM, before)
    assert models == [["tiny"]] * sent


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    reports: list[Mapping[str, float]] = []
    context = LocalContext(tmp_path, reports.append)
    assert context.checkpoints() == []
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
        context.report({"epoch": 1.0}, tmp_path / name)
    context.report({"epoch": 2.0})
    assert [[p.name for p in found.iterdir()] for found in context.checkpoints()] == [["third.txt"], ["second.txt"]]
    assert not (tmp_path / "third").exists(), "a folder that is handed over is the context's"
    assert reports == [{"epoch": 1.0}] * 3 + [{"epoch": 2.0}]


def test_one_process_is_its_own_average(tmp_path: Path) -> None:
    context = LocalContext(tmp_path)
    value, network = torch.tensor([3.0]), torch.nn.Linear(1, 1)
    context.average_([value])
    assert value.item() == 3.0
    assert context.wrap(network) is network
    assert (context.rank, context.world_size) == (0, 1)


@pytest.mark.parametrize(
    ("local_rank", "expected", "made_current"),
    [(None, "cuda:2", []), ("1", "cuda:1", [torch.device("cuda:1")]), ("0", "cuda:0", [torch.device("cuda:0")])],
)
def test_the_gpu_is_torchruns_or_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_rank: str | None, expected: str, made_current: list[torch.device]
) -> None:
    """The current one stays what the caller has chosen where it is not torchrun that chooses."""
    found: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert LocalContext(tmp_path).device == torch.device(expected)
    assert found == made_current


def test_of_more_processes_than_gpus_the_last_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any waits for another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="process 4 on a machine with 1 GPU; give --nproc-per-node the number of GPUs"):
        LocalContext(tmp_path)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize(("size", "batch_size"), [(19, 8), (19, 3), (17, 16), (18, 16), (24, 12), (3, 8)])
def test_the_least_share_is_that_of_the_batches_that_are_dealt(
    set_folder: Path, size: int, batch_size: int, workers: int
) -> None:
    data, index = open_set(set_folder, "train"), np.arange(size)
    dealt = [
        len(batch)
        for rank in range(workers)
        for batch in epoch_batches(
            data, index, images="natural", batch_size=batch_size, epoch=0, seed=0, rank=rank, world_size=workers
        )
    ]
    assert trained_models._least_share(size, batch_size, workers) == min(2, *dealt)


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(tmp_path: Path) -> None:
    def save(context: LocalContext, step: int) -> None:
        checkpoint.hand_over_state(context, {}, "it.json", {"step": step}, {"x": torch.tensor(step)}, wait=True)

    context = LocalContext(tmp_path)
    save(context, 1)
    save(context, 2)
    (tmp_path / "checkpoint" / "state.pt").write_bytes(b"half")
    again = LocalContext(tmp_path)
    assert checkpoint.newest(again, "it.json") == at(tmp_path / "checkpoint.before")
    save(again, 3)
    steps = [read_json(folder / "it.json")["step"] for folder in again.checkpoints()]
    assert steps == [3, 1]
    assert all(map(checkpoint.is_whole, again.checkpoints()))


def test_a_storage_that_is_full_is_named_and_keeps_no_half_of_a_checkpoint(tmp_path: Path) -> None:
    """The temporary folder takes it, the output does not."""
    context, (soft, hard) = LocalContext(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(folder: Path) -> None:
        (folder / "state.pt").write_bytes(bytes(100_000))
        checkpoint.seal(folder, "it.json", {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    try:
        with pytest.raises(UserError, match=r"a checkpoint cannot be written to the output folder \(.*\): is the disk full\?"):
            checkpoint.hand_over(context, {}, write)
        with pytest.raises(UserError, match=rf"a checkpoint cannot be written to '{tempfile.gettempdir()}' \(.*\): is the disk"):
            checkpoint.hand_over(context, {}, write)  # the limit is there from the beginning
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        write(make_folder(tmp_path / "made"))
        with pytest.raises(OSError, match="File too large") as caught:
            put(tmp_path / "made", at(tmp_path / "kept"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert is_full(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_settings_that_change_nothing_of_the_training_are_told(make_config: Callable[..., Config], set_folder: Path) -> None:
    manifest = read_manifest(set_folder)

    def told(**training: Any) -> str:
        return "\n".join(trained_models._trained_on([make_config(training=training)], manifest)[1:])

    assert told(epochs=2, lr_epochs=[0, 2], lr_values=[0.1, 0.1]) == ""
    assert "the learning rate is cut off: training.lr_epochs ends at 3, " in told(
        epochs=2, lr_epochs=[0, 3], lr_values=[0.1, 0.1]
    )
    assert "stays at its last: training.lr_epochs ends at 1, training.epochs is 2" in told(
        epochs=2, lr_epochs=[0, 1], lr_values=[0.1, 0.1]
    )
    assert told(epochs=2, schedule="cosine") == ""
    quiet: dict[str, Any] = {"epochs": 2, "schedule": "cosine"}
    images = read_manifest(set_folder)["usable"]["train"] - 4
    assert told(**quiet, val_examples=4, batch_size=images) == ""
    more = f"note: training.batch_size {images + 1} is more than all images to train on, {images}: an epoch is one step of these"
    assert told(**quiet, val_examples=4, batch_size=images + 1) == more
    never = told(**quiet, awp_gamma=0.005, awp_warmup=2)
    assert never == "note: AWP never begins: training.awp_warmup is 2, training.epochs is 2"
    assert told(**quiet, awp_gamma=0.005, awp_warmup=1) == ""
    assert told(**quiet, awp_warmup=1) == "note: training.awp_warmup is 1 and delays nothing: training.awp_gamma is 0"
    nothing = "note: training.best_metric is val_clean and decides nothing: training.keep is last, training.patience null"
    assert told(**quiet, best_metric="val_clean") == nothing
    for used in ({"keep": "best"}, {"patience": 1}):
        assert told(**quiet, val_examples=4, best_metric="val_clean", **used) == ""


def test_one_image_a_worker_is_refused_before_anything_is_trained(
    make_config: Callable[..., Config], set_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"training": {"batch_size": 3}, "classifier": {"name": "resnet18"}}
    config = make_config(output=str(tmp_path), manifold_set=str(set_folder), name="tiny", **changes)
    lines: list[str] = []
    assert trained_models.untrained([config], lines.append, 1) == [config]
    manifest = read_manifest(set_folder)
    usable, held_out = manifest["usable"]["train"], config.training.val_examples
    assert lines[0].startswith(f"{usable - held_out} images to train on")
    assert ("projected poorly" in lines[0]) == (manifest["splits"]["train"] > usable)
    lost = {**manifest, "classes_without_usable": {"train": ["odd"], "test": ["even"]}}
    monkeypatch.setattr(set_reader, "read_manifest", lambda place: lost)
    assert trained_models.untrained([config], lines.append, 1) == [config]
    assert [line for line in lines if "no usable" in line] == set_reader.warnings_of_lost(lost, "train")
    assert "no usable training image of 'odd'" in lines[-1]
    with pytest.raises(UserError, match="'resnet18' cannot take 8x8 images one at a time"):
        trained_models.untrained([config], print, 3)  # with two each has two of the three, one of them twice
