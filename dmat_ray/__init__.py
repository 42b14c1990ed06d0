"""dmat_ray: dual manifold adversarial training on Ray.

What a notebook needs is imported from here (docs/python.md), each name with its module when it is first asked for: settings
import neither torch nor ray.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmat_ray.api import attack_images, build_threat, evaluate, project
    from dmat_ray.cli import settings
    from dmat_ray.data.manifold_set import open_set
    from dmat_ray.image_files import load_images, predict
    from dmat_ray.local_stages import make_set, train
    from dmat_ray.manifold.generators import load_generator
    from dmat_ray.models.checkpoint import load_classifier
    from dmat_ray.reports.terminal import terminal_table

__version__ = "0.1.0"

_HOMES = {
    "attack_images": "api",
    "build_threat": "api",
    "evaluate": "api",
    "load_classifier": "models.checkpoint",
    "load_generator": "manifold.generators",
    "load_images": "image_files",
    "make_set": "local_stages",
    "open_set": "data.manifold_set",
    "predict": "image_files",
    "project": "api",
    "settings": "cli",
    "terminal_table": "reports.terminal",
    "train": "local_stages",
}

__all__ = [
    "attack_images",
    "build_threat",
    "evaluate",
    "load_classifier",
    "load_generator",
    "load_images",
    "make_set",
    "open_set",
    "predict",
    "project",
    "settings",
    "terminal_table",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dmat_ray' has no attribute '{name}'")
    return getattr(_import_module(f"dmat_ray.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
