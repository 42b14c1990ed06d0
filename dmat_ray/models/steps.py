"""How far a training came that counts its steps, by the JSON of its checkpoint: a generator's, or an encoder's."""

from typing import Any

from dmat_ray.errors import UserError
from dmat_ray.storage import Place


def is_last(progress: dict[str, Any]) -> bool:
    """Whether a checkpoint of this JSON is a training's last."""
    return bool(progress["step"] == progress["of"])


def require_last(folder: Place, progress: dict[str, Any]) -> None:
    """Raise UserError for a checkpoint, with this JSON, from before the end of a training."""
    if not is_last(progress):
        raise UserError(
            f"'{folder}' is of step {progress['step']} of {progress['of']}, which is no result yet; give the command again, "
            "which goes on from it"
        )
