"""Images as they lie on a disk or in an object store, for a notebook: with their labels, or to be given some."""

import warnings
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from dmat_ray import inputs
from dmat_ray.config import DataConfig
from dmat_ray.data import reading, sources
from dmat_ray.data.pixels import to_unit
from dmat_ray.devices import device_of
from dmat_ray.errors import UserError
from dmat_ray.models import checkpoint, prediction
from dmat_ray.storage import Place, at, text_of
from dmat_ray.types import Batch


def load_images(source: Place = "mnist5k", split: str = "test", **data: Any) -> tuple[Batch, tuple[str, ...]]:
    """Images of a source with their labels, and the names of the classes: what projection reads as well.

    `source` is mnist5k, a folder with one sub-folder a class, or any other that `data.source` may be; `data` are further settings
    of that section (test_share, ...), and `limit` is train_limit or test_limit. Images come as `resolution` (default 32) and
    `channels` (default 1, grey; 3 is RGB) say, scaled and cropped to that; of other sources than mnist5k a warning tells which of
    the two was not given. The batch has ids, x_BCHW (float32 in [0, 1]) and y_B (int64), on the CPU, and no w. Images that cannot
    be read are left out with a warning; another tells of files that are not taken.
    Raises UserError for a source that there is not, or of which more than max_rejected cannot be read.

    >>> from dmat_ray import load_images
    >>> digits, class_names = load_images("mnist5k", "train", limit=100)
    >>> digits.x_BCHW.shape, digits.y_B.bincount().tolist(), class_names[:3]
    (torch.Size([100, 1, 32, 32]), [10, 10, 10, 10, 10, 10, 10, 10, 10, 10], ('0', '1', '2'))
    """
    if split not in ("train", "test"):
        raise UserError(f"split is '{split}'; choose train or test")
    if "limit" in data:
        data[f"{split}_limit"] = data.pop("limit")
    config = inputs.section(DataConfig, {"source": text_of(source), **data}, "data")
    if config.source != "mnist5k" and (missing := [name for name in ("resolution", "channels") if name not in data]):
        size = f"{config.resolution}x{config.resolution} {'grey' if config.channels == 1 else 'RGB'}"
        ways = ", ".join(f"{name}={getattr(config, name)}" for name in missing)
        told = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given"
        warnings.warn(f"{told}: images of '{config.source}' come as {size}; give {ways}, or others", stacklevel=2)
    listing = sources.list_examples(config)
    if listing.ignored:
        warnings.warn(f"not taken: {listing.ignored}", stacklevel=2)
    rows = listing.rows(split)
    good, pixels, bad = reading.read_good(rows, config)
    if bad:
        first, reason = next(iter(bad.items()))
        told = f"{len(bad)} of {len(rows)} images cannot be read, the first: '{first}' {reason}"
        if len(bad) > config.max_rejected * len(rows) or not good:
            way = f", or raise max_rejected, which is {config.max_rejected}" if good else ""
            raise UserError(f"{told}. Repair or replace the files{way}")
        warnings.warn(told, stacklevel=2)
    rows = rows.take(pa.array(good, pa.int64()))
    labels = torch.from_numpy(rows["label"].to_numpy().copy())
    return Batch(rows["id"].to_pylist(), to_unit(pixels), labels), listing.class_names


def predict(model: Place, images: Place, *, batch_size: int = 100, device: str = "cpu") -> pa.Table:
    """Labels of all images below a folder or URL, as jobs/predict.py gives them: a row an image, in the order of paths.

    `model` is a folder of a trained or imported classifier. The columns are path, prediction, class_name, probability, top5, and
    reason, which is set for a file that cannot be read. Raises UserError for a model, images or a device that there are not.

    >>> from pathlib import Path
    >>> from dmat_ray import make_set, predict, settings, train
    >>> from dmat_ray.data.digits import digits
    >>> for id, png in zip(*(column.to_pylist()[:2] for column in (digits(32).ids, digits(32).files))):
    ...     Path("photos").mkdir(exist_ok=True)
    ...     _ = Path(f"photos/{id}.png").write_bytes(png)
    >>> config = settings("demo", "dmat", "small", output="runs/small")
    >>> _ = make_set(config)
    >>> table = predict(train(config), "photos")
    >>> table["path"].to_pylist(), table["class_name"].to_pylist()  # doctest: +ELLIPSIS
    (['mnist5k-0000.png', 'mnist5k-0001.png'], ['...', '...'])
    """
    batch_size, where = inputs.require_batch_size(batch_size), device_of(device)
    network, run = checkpoint.load_classifier(model, where)
    listing, ignored = prediction.list_images(str(at(images)))
    if ignored:
        warnings.warn(f"not taken: {ignored}", stacklevel=2)
    if unseen := prediction.warning_of_unseen(run):
        warnings.warn(unseen.removeprefix("warning: "), stacklevel=2)
    data = prediction.read_as(run, DataConfig(), str(at(images)))
    tables = []
    for start in range(0, listing.num_rows, batch_size):
        rows = listing.slice(start, batch_size)
        good, pixels, bad = reading.read_good(rows, data)
        paths = rows["id"].take(pa.array(good, pa.int64())).to_pylist()
        tables.append(prediction.predict(network, run["class_names"], paths, pixels, where))
        tables.append(prediction.unreadable(bad))
    table = pa.concat_tables(tables)
    return table.take(pc.index_in(listing["id"], value_set=table["path"].combine_chunks()))
