"""Which of some examples are meant: by their positions, or by a mask of all of them."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dmat_ray.errors import UserError

Index = Tensor | np.ndarray | Sequence[int] | Sequence[bool]


def positions(index: Index, count: int) -> np.ndarray:
    """int64 positions (N) among `count` examples; a mask gives the places where it is True.

    Raises UserError for a mask of another length, and for what is neither.
    """
    found = index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
    if found.dtype == np.bool_:
        if found.shape != (count,):
            raise UserError(
                f"a mask of the shape {found.shape} was given for {count} examples; give one value for each, ({count},)"
            )
        return np.flatnonzero(found)
    if found.ndim != 1 or (found.dtype.kind not in "iu" and len(found)):
        raise UserError(f"{index!r} is neither whole numbers, which count examples from 0, nor a mask of {count} values")
    return found.astype(np.int64)
