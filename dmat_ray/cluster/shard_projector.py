"""The projector as an actor of Ray Data: images of a shard in, rows of the set out."""

from typing import Any

import pyarrow as pa
import torch

from dmat_ray.cluster import pools
from dmat_ray.cluster.session import device_of_actor
from dmat_ray.cluster.shard_tasks import pack, unpack
from dmat_ray.config import Config, ProjectionConfig
from dmat_ray.manifold import set_maker
from dmat_ray.manifold.projection import Projector


class ShardProjector:
    """An actor: projects the images of a shard."""

    @pools.patient_start
    def __init__(self, config: dict[str, Any], class_names: list[str]) -> None:
        self.config, self.class_names = Config.model_validate(config), class_names
        device = device_of_actor()
        torch.set_num_threads(self.config.cluster.threads_per_worker)
        self.projector = set_maker.build_projector(self.config, device)

    def __call__(self, row: pa.Table) -> pa.Table:
        return project_shard(self.projector, row, self.config.projection, self.class_names)


def project_shard(projector: Projector, row: pa.Table, settings: ProjectionConfig, class_names: list[str]) -> pa.Table:
    """The rows of the set for the images of one shard, with what could not be read passed on."""
    name, images, rejected = unpack(row)
    return pack(name, set_maker.rows_of(projector, images, settings, class_names), rejected)
