"""The projector as an actor of Ray Data: images of a shard in, rows of the set out."""

import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dmat_ray.cluster.session import device_of_actor
from dmat_ray.cluster.shard_tasks import pack, unpack
from dmat_ray.config import Config, ProjectionConfig
from dmat_ray.data import set_format
from dmat_ray.data.pixels import quantise
from dmat_ray.manifold import encoder, generators
from dmat_ray.manifold.projection import Projector
from dmat_ray.storage import Location


class ShardProjector:
    """An actor: projects the images of a shard."""

    def __init__(self, config: dict[str, Any], class_names: list[str]) -> None:
        self.config, self.class_names = Config.model_validate(config), class_names
        device = device_of_actor()
        torch.set_num_threads(self.config.cluster.threads_per_worker)
        self.projector = build_projector(self.config, device)

    def __call__(self, row: pa.Table) -> pa.Table:
        return project_shard(self.projector, row, self.config.projection, self.class_names)


def project_shard(projector: Projector, row: pa.Table, settings: ProjectionConfig, class_names: list[str]) -> pa.Table:
    """The rows of the set for the images of one shard, with what could not be read passed on."""
    name, images, rejected, _ = unpack(row)
    began, generator = time.monotonic(), projector.generator
    shape = (generator.channels, generator.resolution, generator.resolution)
    schema = set_format.schema(generator.channels, generator.resolution, generator.num_ws, generator.w_dim, class_names)
    if images.num_rows == 0:
        return pack(name, schema.empty_table(), rejected, 0.0)
    ids = images["id"].to_pylist()
    found = projector.project(torch.from_numpy(set_format.from_lists(images["pixels"], shape)), ids)
    l1, lpips = found.l1_B.numpy(), found.lpips_B.numpy()
    poor = set_format.is_poor(l1, lpips, settings.poor_l1, settings.poor_lpips)
    columns = {
        "id": ids,
        "split": images["split"].cast(pa.string()),
        "label": images["label"].cast(pa.int64()),
        "image": [{"bytes": content, "path": id} for content, id in zip(images["image"].to_pylist(), ids, strict=True)],
        "on_manifold": set_format.to_netpbm(quantise(found.x_BCHW)),
        "w": set_format.fixed_list(found.w_BLD.numpy(), pa.float32()),
        "lpips": lpips,
        "l1": l1,
        "l2": found.l2_B.numpy(),
        "steps": found.steps_B.numpy(),
        "status": np.where(poor, "poor", "ok"),
    }
    return pack(name, pa.table(columns, schema=schema), rejected, time.monotonic() - began)


def build_projector(config: Config, device: torch.device) -> Projector:
    """The projector that the settings describe, with its generator and encoder. Raises UserError for what does not fit."""
    generator = generators.load_configured(config.generator, device)
    generators.require_images(generator, config.generator.path, config.data.channels, config.data.resolution)
    start = None
    if config.projection.start == "encoder":
        folder = encoder_folder(config)
        start = encoder.load_encoder(folder, generators.fingerprint(config.generator.path), device)
    return Projector(generator, config.projection, device, start)


def encoder_folder(config: Config) -> Location:
    """The folder of the encoder that projection starts from."""
    return encoder.locate_encoder(config.projection.encoder, config.output, config.generator.path)
