"""What stages with a pool of actors ask of Ray Data. Needs no session: nothing is executed."""

from types import SimpleNamespace

import pyarrow as pa
import pytest
import ray.data
from small import settings

from dmat_ray.cluster import evaluate, predict, project
from dmat_ray.data.set_writer import Shard
from dmat_ray.storage import at
from dmat_ray.units import Unit

pytestmark = pytest.mark.cluster


class _MadeError(Exception):
    pass


@pytest.fixture
def made(monkeypatch) -> list[ray.data.DataContext]:
    """The contexts of the datasets that were begun."""
    found: list[ray.data.DataContext] = []

    def from_items(*_, **__):
        found.append(ray.data.DataContext.get_current())
        raise _MadeError

    monkeypatch.setattr(ray.data, "from_items", from_items)
    return found


def test_no_stage_is_killed_because_a_piece_of_work_takes_long(monkeypatch, tmp_path, made):
    """Ray Data ends what has shown nothing for half an hour; AutoAttack on a large model shows nothing for longer."""
    config = settings(tmp_path)
    assert ray.data.DataContext.get_current().execution_no_progress_timeout_s > 0
    with pytest.raises(_MadeError):
        next(project.run_shards(config, at(tmp_path), ("a",), [Shard("part-000000", pa.table({"id": ["x"]}))]))
    work = SimpleNamespace(config=config, name=lambda unit: unit.model)
    with pytest.raises(_MadeError):
        next(evaluate._Work.run(work, [Unit("dmat", "natural", "clean", (0,))]))
    monkeypatch.setattr(predict.checkpoint, "read_run", lambda model: {})
    monkeypatch.setattr(predict.prediction, "read_as", lambda run, data, images: data)
    monkeypatch.setattr(predict.session, "await_machine", lambda cluster, say: None)
    with pytest.raises(_MadeError):
        predict.predict(config, at(tmp_path), str(tmp_path), pa.table({"path": ["x.png"]}), at(tmp_path / "rows"), print)
    assert [context.execution_no_progress_timeout_s for context in made] == [-1, -1, -1]
    assert all("OSError" in context.retried_map_errors for context in made)
    assert ray.data.DataContext.get_current().execution_no_progress_timeout_s > 0
