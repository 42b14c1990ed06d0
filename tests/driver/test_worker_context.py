"""What a worker of Ray Train knows of its machines and its storage, without Ray."""

import errno
from types import SimpleNamespace

import pytest
import ray.train
import torch
from ray.train import CheckpointUploadMode, PreemptionInfo
from ray.train.v2._internal.constants import AWS_RETRYABLE_TOKENS
from ray.train.v2._internal.execution.context import TrainContext

from dmat_ray.cluster import context
from dmat_ray.cluster.context import RayContext
from dmat_ray.errors import StorageError, UserError
from dmat_ray.storage import at

pytestmark = pytest.mark.slow  # imports Ray


@pytest.fixture
def worker(tmp_path) -> RayContext:
    """Rank 0 of one worker, as its constructor leaves it that asks Ray."""
    made = object.__new__(RayContext)
    made.rank, made.world_size, made.device = 0, 1, torch.device("cpu")
    made._name, made._mailbox, made._wait, made._stopping, made._newest = "dmat", "mailbox", False, False, ""
    made._leaving, made._uploading = set(), False
    made._storage, made._filesystem = at(tmp_path / "train" / "dmat"), None
    return made


def test_each_machine_that_is_to_go_is_noticed_once(worker, monkeypatch):
    """Ray tells of all of them, again and again."""
    one, both = PreemptionInfo(None, {"a": [0]}), PreemptionInfo(None, {"a": [0], "b": [2, 3]})
    told = iter([None, one, one, both, both, one, None, one])
    monkeypatch.setattr(context, "is_stopping", lambda mailbox: False)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(told))
    assert [worker.preempted() for _ in range(8)] == [False, True, False, True, False, False, False, True]


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [None, StorageError("away"), NO_SPACE, OSError(errno.EIO, "Input/output error")])
def test_what_cannot_be_uploaded_does_not_stay_in_the_temporary_folder(worker, monkeypatch, tmp_path, error):
    """Else the next attempts, which leave theirs as well, would fill it. What was uploaded Ray removes."""

    def put(folder, place):
        if error is not None:
            raise error

    told = []
    actor = SimpleNamespace(put_user_error=SimpleNamespace(remote=told.append))
    monkeypatch.setattr(context.ray, "get_actor", lambda name: actor)
    monkeypatch.setattr(context.ray, "get", lambda answer: answer)
    monkeypatch.setattr(context, "put", put)
    monkeypatch.setattr(context, "UPLOAD_PAUSES_S", ())
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "state.pt").write_bytes(b"state")
    made = ray.train.Checkpoint(str(tmp_path / "made"))
    if error is None:
        assert worker._upload(made, "checkpoint_1").path == str(tmp_path / "train" / "dmat" / "checkpoint_1")
    else:
        with pytest.raises(UserError if error is NO_SPACE else type(error)):
            worker._upload(made, "checkpoint_1")
    assert (tmp_path / "made").exists() == (error is None)
    full = f"a checkpoint cannot be written to '{tmp_path}/train/dmat' ([Errno 28] No space left on device): is the disk full?"
    assert [str(found).split(" There")[0] for found in told] == ([full] if error is NO_SPACE else [])


def test_ray_train_does_not_upload_again_what_is_no_longer_there(worker, monkeypatch, tmp_path):
    """It does so for some errors of Amazon's, by their words; the store is named by the error that ends the attempt."""
    away = StorageError(
        "'s3://b/run' cannot be written: AWS Error SLOW_DOWN during UploadPart operation: Please reduce your rate"
    )
    calls = []

    def put(folder, place):
        calls.append(1)
        raise away

    monkeypatch.setattr(context, "put", put)
    monkeypatch.setattr(context, "UPLOAD_PAUSES_S", ())
    assert any(token in str(away) for token in AWS_RETRYABLE_TOKENS)
    (tmp_path / "made").mkdir()
    train = object.__new__(TrainContext)
    train.execution_context = SimpleNamespace(train_context_callbacks=[])
    made = ray.train.Checkpoint(str(tmp_path / "made"))
    with pytest.raises(StorageError, match=r"^'s3://b/run' cannot be written: AWS SLOW_DOWN during UploadPart"):
        train._upload_checkpoint("checkpoint_1", {}, made, True, worker._upload)
    assert len(calls) == 1


def test_one_checkpoint_at_a_time_is_uploaded_while_training_goes_on(worker, monkeypatch, tmp_path):
    """A store that is slower than the training would else have them pile up: Ray's queue has no end."""
    (tmp_path / "made").mkdir()
    under_way, modes = [], []

    def report(metrics, *, checkpoint, checkpoint_upload_mode, **_):
        modes.append(checkpoint_upload_mode)
        under_way.append(checkpoint)

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(context, "put", lambda *_: None)
    for handed_over, uploaded in ((True, False), (False, False), (True, True), (True, False)):
        worker.report({}, tmp_path / "made" if handed_over else None)
        if uploaded:
            for checkpoint in filter(None, under_way):
                worker._upload(checkpoint, "checkpoint_1")
            under_way.clear()
    assert modes == [CheckpointUploadMode[name] for name in ("ASYNC", "ASYNC", "SYNC", "ASYNC")]
