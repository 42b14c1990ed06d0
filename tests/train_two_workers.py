"""What torchrun starts in test_local.py: `train` with two workers, of which the first is slow to publish the model."""

import json
import sys
import time
from pathlib import Path

import torch

from dmat_ray import models, train
from dmat_ray.config import Config
from dmat_ray.storage import Location, Place

publish = models.publish


def slow(source: Place, folder: Location) -> None:
    time.sleep(2)
    publish(source, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    models.publish = slow
    model = train(Config.model_validate(json.loads(Path(sys.argv[1]).read_text())))
    assert (model / "run.json").is_file(), "it returns when the model is there"
    torch.distributed.destroy_process_group()
