"""What stages with a pool of actors ask of Ray Data."""

import sys
from pathlib import Path

import pytest
import ray.cloudpickle
import ray.data

from dmat_ray.cluster import pools

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_session", "impatient")]
# actors do not have this file
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Reader:
    """Its storage refuses the first two questions after it has started."""

    def __init__(self, asked: Path) -> None:
        self.asked = asked

    def __call__(self, batch):
        with self.asked.open("a") as file:
            file.write("x")
        if self.asked.stat().st_size < 3:
            raise OSError("the connection was refused")
        return batch


def test_what_may_pass_is_tried_again_and_the_callers_own_context_stays(tmp_path):
    before = ray.data.DataContext.get_current()
    with pools.patient():
        dataset = ray.data.from_items([{"n": 1}, {"n": 2}], override_num_blocks=1).map_batches(
            Reader, fn_constructor_args=[tmp_path / "asked"], concurrency=1, batch_size=None
        )
        found = [row["n"] for row in dataset.iter_rows()]
    assert found == [1, 2]
    assert (tmp_path / "asked").stat().st_size == 3
    assert ray.data.DataContext.get_current() is before
    assert before.execution_no_progress_timeout_s == 1
