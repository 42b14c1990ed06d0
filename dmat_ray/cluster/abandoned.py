"""Room that is still reserved for a training whose controller is gone.

Ray Train reserves its workers' room, a placement group, in the name of its controller. If that is killed, as when Tune ends a
trial, the room stays reserved for as long as the job lives: Ray's own cleaner asks the dashboard whether the controller is alive,
and a Ray of this machine alone has no dashboard.
"""

import time
from typing import Any

import ray
import ray.tune
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group


def free() -> int:
    """Give back what dead actors of this job have reserved; returns how many reservations these were. Ray must be connected."""
    job = ray.get_runtime_context().get_job_id()
    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    found = 0
    for entry in map(PlacementGroupTableData.FromString, table):
        # of what the driver itself has reserved, as Tune does for trials, Ray says the same: that its actor is dead
        by_actor = entry.creator_actor_id not in (b"", ray.ActorID.nil().binary())
        gone = by_actor and entry.creator_actor_dead and entry.creator_job_id.hex() == job
        if gone and entry.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(entry.placement_group_id)))
            found += 1
    return found


class TakesBack(ray.tune.Callback):  # type: ignore[misc]  # ray is untyped
    """While Tune runs trainings of several workers: once a second what dead ones had reserved, which the next wait for."""

    def __init__(self) -> None:
        self.swept = 0.0

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() > self.swept + 1:
            free()
            self.swept = time.monotonic()
