"""The gallery of a page without Ray, which workers make elsewhere."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dmat_ray.config import Config
from dmat_ray.data import manifold_set
from dmat_ray.evaluation.evaluation import Evaluator
from dmat_ray.evaluation.units import chosen
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint
from dmat_ray.reports import gallery
from dmat_ray.storage import Place


def gallery_here(config: Config, set_folder: Place, models: Mapping[str, Place]) -> dict[str, Any]:
    """What `gallery.joined` gives, made in this process."""
    listed = manifold_set.usable(set_folder, "test")
    ids = listed["id"].to_pylist()
    work = gallery.units(list(models), config.evaluation, listed["label"].to_numpy(), chosen(ids, config.evaluation))
    shown = np.array(work[0].positions)
    data = manifold_set.open_set(set_folder, "test", only=[ids[i] for i in shown])
    positions = tuple(np.argsort(np.argsort(shown)).tolist())  # of the set, which is in the order of ids
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluator = Evaluator(
        config.evaluation.model_copy(update={"lpips": "none"}),
        data,
        generators.load_configured(config.generator, device),
        lambda name: checkpoint.load_classifier(models[name], device)[0],
        list(models),
        device,
    )
    drawn = ((unit, gallery.draw(evaluator, replace(unit, positions=positions))) for unit in work)
    return gallery.joined(drawn, config.evaluation, listed, data.manifest)
