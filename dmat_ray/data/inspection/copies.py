"""Images that a set holds more than once: no defect of the set, but a test image that was trained on tells nothing."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dmat_ray.data.inspection.rows import open_shard
from dmat_ray.data.set_format import pixel_key
from dmat_ray.storage import Location
from dmat_ray.wording import number_of

SPLITS = ("train", "test")
NOTE = np.dtype([("key", "u8"), ("shard", "i4"), ("row", "i4"), ("label", "i8"), ("split", "i1")])


class Copies:
    """Notes images by their pixels, at the set's size, and finds those that are there twice and should not be."""

    def __init__(self, folder: Location, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names
        self.parts: list[np.ndarray] = []

    def add(self, shard: int, start: int, batch: pa.RecordBatch, pixels: Sequence[np.ndarray | None]) -> None:
        """Note the images of a part of a shard, which begins at row `start`; those that cannot be read are None."""
        described = zip(batch["split"].to_pylist(), batch["label"].to_pylist(), pixels, strict=True)
        noted = [
            (pixel_key(image), shard, start + i, label, SPLITS.index(split))
            for i, (split, label, image) in enumerate(described)
            if image is not None and label is not None and split in SPLITS
        ]
        self.parts.append(np.array(noted, NOTE))

    def warnings(self, class_names: Sequence[str]) -> list[str]:
        """A line for test images that are training images too, and one for images that have several labels."""
        notes = np.concatenate([np.empty(0, NOTE), *self.parts])
        return [line for line in (self._trained_on(notes), self._of_two_labels(notes, class_names)) if line]

    def _trained_on(self, notes: np.ndarray) -> str:
        test, train = notes[notes["split"] == SPLITS.index("test")], notes[notes["split"] == SPLITS.index("train")]
        known = test[np.isin(test["key"], train["key"])]
        if not len(known):
            return ""
        other = train[train["key"] == known["key"][0]][0]
        first = f"{self._id(known[0])} is {self._id(other)}"
        return f"warning: among the test images are training images, {len(known)} of {len(test)}, the first: {first}"

    def _of_two_labels(self, notes: np.ndarray, class_names: Sequence[str]) -> str:
        pairs = np.unique(notes[["key", "label"]])
        keys, times = np.unique(pairs["key"], return_counts=True)
        if not (mixed := keys[times > 1]).size:
            return ""
        first = notes[np.isin(notes["key"], mixed)][0]
        other = notes[(notes["key"] == first["key"]) & (notes["label"] != first["label"])][0]
        named = [f"{self._id(note)} ({dict(enumerate(class_names)).get(int(note['label']))})" for note in (first, other)]
        return f"warning: {number_of(len(mixed), 'image')} with more than one label, the first: {' is '.join(named)}"

    def _id(self, note: np.void) -> str:
        with open_shard(self.folder, self.names[note["shard"]]) as parquet:
            return f"'{parquet.read(columns=['id'])['id'][int(note['row'])]}'"
