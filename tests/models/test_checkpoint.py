"""Checkpoints: what is saved comes back, and what is damaged is named."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmat_ray import presets
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.models import checkpoint, trained_settings
from dmat_ray.networks import classifiers

MakeConfig = Callable[..., Config]


@pytest.fixture
def saved(tmp_path: Path, make_config: MakeConfig) -> Path:
    """A checkpoint of a random network after one optimiser step."""
    torch.manual_seed(0)
    config = make_config()
    network = classifiers.build(config.classifier, 1, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.rand(8, 1, 8, 8)).sum().backward()
    optimizer.step()
    run = checkpoint.describe_run(config, ("a", "b", "c"), 1, 8, "f" * 64, "e" * 64)
    state = {"optimizer": optimizer.state_dict(), "epoch": 1}
    checkpoint.save(tmp_path / "checkpoint", network, {**run, "epoch": 1, "history": [{"train_loss": 0.5}]}, state)
    return tmp_path / "checkpoint"


def test_round_trip(saved: Path, make_config: MakeConfig) -> None:
    network, run = checkpoint.load_classifier(saved)
    assert not network.training
    assert Config.model_validate(run["config"]) == make_config()
    assert (run["class_names"], run["channels"], run["resolution"]) == (["a", "b", "c"], 1, 8)
    assert (run["generator_sha256"], run["history"]) == ("f" * 64, [{"train_loss": 0.5}])
    plain = load_file(saved / "model.safetensors")
    own = network.state_dict()
    assert own.keys() == plain.keys()
    assert all(torch.equal(own[key], plain[key]) for key in plain)
    assert any(key.endswith("running_mean") for key in plain)


def test_the_digest_of_a_model_is_of_its_weights_and_of_how_it_is_built(saved: Path) -> None:
    """The same weights under another mean are another model; how it was trained is not looked at."""
    before, run = checkpoint.digest(saved), json.loads((saved / "run.json").read_text())
    digests = []
    for section, setting in (("training", {"epochs": 77}), ("classifier", {"mean": [0.4]})):
        changed = {**run["config"], section: {**run["config"][section], **setting}}
        checkpoint.seal(saved, "run.json", {**run, "config": changed})
        digests.append(checkpoint.digest(saved))
    assert [found == before for found in digests] == [True, False]


def test_rows_that_are_refused_by_now_do_not_keep_a_model_from_being_loaded(saved: Path) -> None:
    """How it was to be evaluated says nothing of the network."""
    description = json.loads((saved / "run.json").read_text())
    description["config"]["evaluation"]["attacks"] = [
        {"threat": "autoattack", "name": "AA", "part": "square", "eps": 8, "group": "g"}
    ]
    description["config"]["tune"] = {"searcher": "of another time"}
    description["config"]["tracking"] = {"uri": "http://me:secret@of-another-time"}
    del description["sha256"]
    checkpoint.seal(saved, "run.json", description)
    network, run = checkpoint.load_classifier(saved)
    assert run["config"]["evaluation"]["attacks"][0]["eps"] == 8
    assert network(torch.zeros(1, run["channels"], run["resolution"], run["resolution"])).shape == (1, len(run["class_names"]))


def test_state_holds_the_optimiser(saved: Path) -> None:
    state = checkpoint.load_state(saved)
    assert state["epoch"] == 1
    buffers = [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
    assert len(buffers) == 14
    assert all(torch.isfinite(b).all() for b in buffers)


class Attacker:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(__file__).with_name("never_written"),))


def test_state_runs_no_code(saved: Path) -> None:
    with (saved / "state.pt").open("wb") as file:
        pickle.dump({"epoch": 1, "optimizer": Attacker()}, file)
    with pytest.raises(UserError, match=r"state\.pt.* is damaged"):
        checkpoint.load_state(saved)
    assert not Path(__file__).with_name("never_written").exists()


def _no_run(folder: Path) -> None:
    (folder / "run.json").unlink()


def _damaged_run(folder: Path) -> None:
    (folder / "run.json").write_text('{"version"')


def _other_version(folder: Path) -> None:
    _edit(folder, version=7)


def _unknown_setting(folder: Path) -> None:
    run = json.loads((folder / "run.json").read_text())
    run["config"]["training"]["nonsense"] = 1
    _edit(folder, config=run["config"])


def _other_classes(folder: Path) -> None:
    _edit(folder, class_names=["a", "b"])


def _other_architecture(folder: Path) -> None:
    other = torch.nn.Sequential(torch.nn.Linear(3, 3))
    save_file(other.state_dict(), folder / "model.safetensors")


def _more_weights(folder: Path) -> None:
    save_file({**load_file(folder / "model.safetensors"), "extra": torch.zeros(1)}, folder / "model.safetensors")


def _truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _edit(folder: Path, **values: object) -> None:
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_run, r"there is no trained model at .* \(no run\.json\)"),
        (_damaged_run, r"run\.json' is damaged"),
        (_other_version, "format version 7, this program reads 2"),
        (_unknown_setting, r"training\.nonsense: there is no such setting"),
        (_other_classes, r"do not fit the network: size mismatch for network\.\d+\.weight"),
        (_other_architecture, "are of another architecture: it lacks"),
        (_more_weights, "it has extra, which the network has not"),
        (_truncated_weights, "do not fit the network"),
        (_empty_weights, "do not fit the network"),
        (_no_weights, r"has no model\.safetensors"),
    ],
)
def test_damaged_checkpoints_are_named(saved: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(saved)
    with pytest.raises(UserError, match=message) as raised:
        checkpoint.load_classifier(saved)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no trained model at"):
        checkpoint.load_classifier(tmp_path / "absent")


def test_a_finished_model_without_state_cannot_be_resumed(saved: Path) -> None:
    (saved / "state.pt").unlink()
    with pytest.raises(UserError, match="training cannot go on from it"):
        checkpoint.load_state(saved)
    assert checkpoint.load_classifier(saved)[1]["epoch"] == 1


def test_an_interrupted_save_is_no_checkpoint(saved: Path) -> None:
    network, run = checkpoint.load_classifier(saved)
    with pytest.raises(TypeError):
        checkpoint.save(saved, network, {**run, "history": object()})
    with pytest.raises(UserError, match="there is no trained model"):
        checkpoint.read_run(saved)


def test_flat_settings_name_every_leaf(make_config: MakeConfig) -> None:
    flat = trained_settings.flatten_config(make_config())
    assert flat["objective.image.eps"] == 0.1
    assert flat["gan.architecture.w_dim"] == 64
    assert not any(isinstance(value, dict) for value in flat.values())


def test_settings_that_came_later_are_those_of_their_defaults(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    older = config.to_json()
    del older["training"]["awp_gamma"]
    trained_settings.require_same_config(older, config, tmp_path)
    other = config.model_copy(update={"training": config.training.model_copy(update={"awp_gamma": 0.5})})
    with pytest.raises(UserError, match=r"was trained with training\.awp_gamma = 0\.0, now it is 0\.5"):
        trained_settings.require_same_config(older, other, tmp_path)
    with pytest.raises(UserError, match=r"was trained with training\.awp_gamma = 0\.5, now it is 0\.0"):
        trained_settings.require_same_config(other.to_json(), config, tmp_path)


def test_where_a_set_came_from_is_no_other_training(make_config: MakeConfig, tmp_path: Path) -> None:
    """Its digest and the generator's are compared instead."""
    config = make_config()
    elsewhere = {"data": {"source": "/photos"}, "projection": {"batch_size": 3}, "generator": {"path": "s3://b/generator"}}
    other = Config.model_validate(presets.merge(config.to_json(), elsewhere))
    assert trained_settings.relevant(other) == trained_settings.relevant(config)
    trained_settings.require_same_config(config.to_json(), other, tmp_path)


def test_a_term_of_no_weight_is_no_other_training(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    idle = Config.model_validate(presets.merge(config.to_json(), {"objective": {"more": {"joint": {"threat": "joint"}}}}))
    assert trained_settings.relevant(idle) == trained_settings.relevant(config)
    trained_settings.require_same_config(config.to_json(), idle, tmp_path)
    trained_settings.require_same_config(idle.to_json(), config, tmp_path)
    working = Config.model_validate(presets.merge(idle.to_json(), {"objective": {"more": {"joint": {"weight": 1}}}}))
    for old, new, told in ((working, config, "joint, now it is absent"), (config, working, "absent, now it is joint")):
        with pytest.raises(UserError, match=rf"objective\.more\.joint\.threat = {told}"):
            trained_settings.require_same_config(old.to_json(), new, tmp_path)


HANDS_OVER = """
import sys, time
from pathlib import Path
from dmat_ray.local import LocalContext
from dmat_ray.models import checkpoint

def write(folder):
    (folder / "model.safetensors").write_text("half")
    print(folder, flush=True)
    time.sleep(600)

checkpoint.hand_over(LocalContext(Path(sys.argv[1])), {}, write)
"""


@pytest.mark.slow
def test_what_killed_workers_were_writing_is_removed_with_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of real processes, and never what one that lives is writing."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    (temporary / "dmat_ray_0").mkdir()  # whosever
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    command = [sys.executable, "-c", HANDS_OVER, str(tmp_path / "theirs")]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(temporary)})
        for _ in range(2)
    ]
    try:
        killed, alive = (Path(worker.stdout.readline().strip()) for worker in workers if worker.stdout)
        workers[0].kill()
        workers[0].wait()
        assert (killed / "model.safetensors").is_file()
        checkpoint.hand_over_state(LocalContext(tmp_path / "ours"), {}, "it.json", {}, {}, wait=True)
        assert {path.name for path in temporary.iterdir()} == {alive.name, "dmat_ray_0"}
        assert (alive / "model.safetensors").is_file()
        assert (tmp_path / "ours" / "checkpoint" / "it.json").is_file()
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
