"""Which device computes."""

import torch

from dmat_ray.errors import UserError


def device_of(given: torch.device | str) -> torch.device:
    """The device of this name. Raises UserError for one that torch does not know, or that this machine does not have."""
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        raise UserError(f"device is {given!r}, which torch does not know; give 'cpu', 'cuda' or 'cuda:0'") from None
    kind = getattr(torch, device.type, None)  # torch.cuda, say; nothing is asked of the device itself, which may be busy
    if not getattr(kind, "is_available", lambda: True)():
        raise UserError(f"device is '{device}', and torch finds no such device here; give 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"device is '{device}', and the GPUs here are cuda:0 to cuda:{count - 1}; give one of these")
    return device
