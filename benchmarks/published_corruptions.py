"""What the published code makes of one image: what tests/threats/test_corruptions.py holds dmat_ray.corruptions against.

    python benchmarks/published_corruptions.py --robustness DIR --output tests/published/corruptions.npz

DIR is a clone of hendrycks/robustness, whose functions are run in this process: it is the reader's own, no part of dmat_ray.
They need an environment of their own with opencv-python-headless, scikit-image, wand (and ImageMagick's library), scipy,
pillow and numpy. Only functions and classes of the scripts are run, with the few names of old libraries that they use put back.

The file holds `image` (32x32, which is repeated to 64 and 224 pixels); of kinds without chance the pixels on a lattice, as
`KIND/SIZE` (5 severities, 11, 11, 3); of the others the four numbers of `statistics` below, as `KIND/SIZE` (5, 3, 4): their
mean over some runs, their standard deviation, and the number of runs.
"""

import argparse
import ast
import ctypes
import functools
import io
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import scipy.ndimage
import skimage.color
import skimage.filters
import skimage.util
import wand.api
import wand.image
from PIL import Image

SCRIPTS = {32: "make_cifar_c.py", 64: "make_tinyimagenet_c.py", 224: "make_imagenet_c.py"}
CERTAIN = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate")
RANDOM = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "fog",
    "elastic_transform",
    "speckle_noise",
    "spatter",
)
RUNS = {32: 100, 64: 30, 224: 6}
GLASS_RUNS = {32: 20, 64: 6, 224: 0}  # a loop over pixels, a quarter of a minute a run at 224


def picture(rng: np.random.Generator) -> np.ndarray:
    """32x32 pixels, uint8: colours that change slowly, a disc, a bar, a grey and a black patch, and some texture."""
    row, column = np.mgrid[:32, :32] / 31
    values = 0.5 + 0.25 * np.stack([np.sin(3 * row + 2 * column), np.cos(4 * column - row), np.sin(5 * row * column)], axis=2)
    values[(row - 0.35) ** 2 + (column - 0.6) ** 2 < 0.06] = (0.9, 0.75, 0.2)
    values[24:28, 4:20] = (0.15, 0.2, 0.6)
    values[2:7, 2:7] = 0.55
    values[26:30, 24:29] = 0.0
    values[16:22, 20:30] += 0.15 * rng.standard_normal((6, 10, 1))
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)


def published(script: Path, seed: int) -> dict[str, Any]:
    """The functions and classes of a script, by name."""
    np.float_, np.fromstring = np.float64, np.frombuffer  # type: ignore[attr-defined]
    noise = functools.partial(skimage.util.random_noise, rng=np.random.default_rng(seed))

    def gaussian(image: np.ndarray, *args: Any, multichannel: bool = False, **kwargs: Any) -> np.ndarray:
        return skimage.filters.gaussian(image, *args, channel_axis=-1 if multichannel else None, **kwargs)

    wand.api.library.MagickMotionBlurImage.argtypes = (ctypes.c_void_p, ctypes.c_double, ctypes.c_double, ctypes.c_double)
    names: dict[str, Any] = {
        "np": np,
        "cv2": cv2,
        "sk": types.SimpleNamespace(util=types.SimpleNamespace(random_noise=noise), color=skimage.color),
        "gaussian": gaussian,
        "BytesIO": io.BytesIO,
        "PILImage": Image,
        "WandImage": wand.image.Image,
        "wandlibrary": wand.api.library,
        "scizoom": scipy.ndimage.zoom,
        "map_coordinates": scipy.ndimage.map_coordinates,
        "data": types.SimpleNamespace(Dataset=object),
    }
    tree = ast.parse(script.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.args.defaults = [d for d in node.args.defaults if isinstance(d, ast.Constant | ast.Attribute)]
    tree.body = [node for node in tree.body if node.name not in ("fgsm", "save_distorted")]  # type: ignore[attr-defined]
    exec(compile(ast.fix_missing_locations(tree), str(script), "exec"), names)
    return names


def statistics(found: np.ndarray, image: np.ndarray) -> list[float]:
    """Mean, root mean square of the change, mean steps between pixels side by side and one above the other, in [0, 1] units."""
    steps = [float(np.abs(np.diff(found, axis=axis)).mean()) for axis in (1, 0)]
    return [float(found.mean()), float(np.sqrt(np.square(found - image).mean())), *steps]


def recorded(function: Callable[..., Any], image: np.ndarray, runs: int) -> np.ndarray:
    """What the file holds of a kind: pixels on a lattice, or mean and standard deviation of statistics over `runs` runs."""

    def result(severity: int) -> np.ndarray:
        return np.asarray(function(Image.fromarray(image), severity), dtype=np.float64)

    if not runs:
        lattice = np.linspace(0, len(image) - 1, 11).astype(int)
        return np.array([result(s)[np.ix_(lattice, lattice)].round() for s in range(1, 6)], dtype=np.uint8)
    values = [[statistics(result(s) / 255, image / 255) for _ in range(runs)] for s in range(1, 6)]
    return np.array([[np.mean(v, axis=0), np.std(v, axis=0, ddof=1), [runs] * 4] for v in values], dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robustness", type=Path, required=True, help="a clone of hendrycks/robustness")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    arrays: dict[str, np.ndarray] = {"image": picture(np.random.default_rng(args.seed))}
    for size, script in SCRIPTS.items():
        functions = published(args.robustness / "ImageNet-C" / "create_c" / script, args.seed)
        image = arrays["image"].repeat(size // 32, axis=0).repeat(size // 32, axis=1)
        for number, kind in enumerate((*CERTAIN, *RANDOM)):
            np.random.seed([args.seed, size, number])
            runs = GLASS_RUNS[size] if kind == "glass_blur" else RUNS[size]
            if runs:
                arrays[f"{kind}/{size}"] = recorded(functions[kind], image, 0 if kind in CERTAIN else runs)
                print(f"{kind} of {size} pixels", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output, **arrays)


if __name__ == "__main__":
    main()
