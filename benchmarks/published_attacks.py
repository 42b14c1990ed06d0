"""Record what the published attacks make of given parameters, and how many digits stand under them.

    python benchmarks/published_attacks.py --advex-uar DIR --adversarial-corruptions DIR [--output tests/published]

The first DIR is a clone of ddkang/advex-uar (the code of arXiv 1908.08016), the second of
centerforaisafety/adversarial-corruptions (of its third version). Their code is imported and run in this process: it is the
reader's own, no part of dmat_ray. Both ask for CUDA wherever they make a tensor; on a CPU that is taken out as they are imported.

renders.npz holds parameters and the images (or parts of them, see `RENDERS`) that their code renders of these, in [0, 1].
strength.json holds the rows of `ROWS`, each with how many of 200 digits a classifier under tests/classifiers still gets right
under the published attack. tests/threats/test_published_attacks.py holds ours against both.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from published_code import (
    TESTS,
    ElasticRow,
    GaborRow,
    GlitchRow,
    JpegRow,
    KaleidoscopeRow,
    Negative,
    PixelRow,
    SnowRow,
    WoodRow,
    advex_attack,
    digit_network,
    digits,
    published,
    run_advex,
)
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.config import FogRow, KaleidoscopeThreat, Row
from dmat_ray.errors import UserError
from dmat_ray.rng import Draws
from dmat_ray.threats.jpeg import CHROMA, LUMA
from dmat_ray.threats.texture import Kaleidoscope, gabor_kernel, hsv_to_rgb
from dmat_ray.threats.weather import LAYERS, _streaks, num_fog_values
from dmat_ray.types import Batch

COUNT, STEPS = 200, 20
SIZE = 32  # fog of the first version is cropped by 16 pixels on each side, which fits images of 32, 96 and 224
Arrays = dict[str, Tensor]

# places that tell strong attacks from weak ones: each leaves a part of a classifier's digits
FAR = 2.5 / STEPS  # of the way across a budget in one step
ROWS: list[tuple[str, Row]] = [
    ("standard", FogRow(name="fog", eps=128 / 255, steps=STEPS, step_size=FAR)),
    ("robust", SnowRow(name="snow", eps=0.5, budget=0.2 + 1 / STEPS, steps=STEPS, step_size=1 / STEPS)),
    ("robust", ElasticRow(name="elastic", eps=2.0, steps=STEPS, step_size=2.0 * FAR)),
    # as many places as theirs, which moves all but the impulses
    ("robust", GaborRow(name="gabor", eps=48 / 255, density=13 / 14, steps=STEPS, step_size=1 / STEPS)),
    ("standard", JpegRow(name="jpeg linf", norm="linf", eps=0.2, steps=STEPS, step_size=0.2 * FAR)),
    ("robust", JpegRow(name="jpeg l2", norm="l2", eps=6.0, steps=STEPS, step_size=6.0 * FAR)),
    ("robust", JpegRow(name="jpeg l1", norm="l1", eps=60.0, steps=STEPS, step_size=60.0 * FAR)),
    # which darkens, and has no effect on white strokes: so on negatives; and without the luck of a start
    ("standard", WoodRow(name="wood", eps=0.1, cells=8, random_start=False, steps=STEPS, step_size=0.1 * FAR)),
    ("robust", GlitchRow(name="glitch", eps=0.2, lines=16, steps=STEPS, step_size=0.2 * FAR)),
    ("robust", PixelRow(name="pixel", eps=3.0, size=4 / SIZE, steps=STEPS, step_size=3.0 * FAR)),
    (
        "robust",
        KaleidoscopeRow(name="kaleidoscope", eps=0.2, shapes=5, size=4 / SIZE, outline=2 / SIZE, steps=STEPS, step_size=FAR),
    ),
]


def fog(old: Any, new: Any, x: Tensor, rng: torch.Generator) -> Arrays:
    """Images of the first version; the plasma of the third, which has the true neighbours, of numbers that leave it positive."""
    theta = torch.rand(len(x), num_fog_values(64), generator=rng)
    attack = old("advex_uar.attacks").FogAttack(0, 128, 0.0, SIZE)

    def levels(values: Tensor, size: int) -> list[Tensor]:
        sides = [2 ** (k // 3) for k in range(3 * (size.bit_length() - 1))]
        parts = values.split([side * side for side in sides], dim=1)
        return [part.view(-1, side, side) for part, side in zip(parts, sides, strict=True)]

    attack._init = lambda count, size: levels(theta, size)
    images = attack._forward(nn.Identity(), x * 255, None) / 255
    positive = 0.5 + 0.5 * torch.rand(len(x), num_fog_values(32), generator=rng)
    heights = new("attacks.fog").fog_creator([0.1 * (2 * v - 1) for v in levels(positive, 32)], len(x), 32, 2.0)
    return {"theta": theta, "images": images, "plasma_theta": positive, "plasma": heights}


def snow(old: Any, new: Any, x: Tensor, rng: torch.Generator) -> Arrays:
    """Images with our streaks, image by image, because theirs share them; and the mean of many of theirs."""
    code, apply = old("advex_uar.attacks.snow"), old("advex_uar.attacks.snow_attack").apply_snow
    side = SIZE // 4
    theta = torch.rand(len(x), LAYERS * side * side + 3 * LAYERS, generator=rng)
    flakes, streaks = theta.split([LAYERS * side * side, 3 * LAYERS], dim=1)
    kernels = _streaks(streaks.view(-1, LAYERS, 3))
    images = []
    for image, flake, kernel in zip(x, flakes, kernels, strict=True):
        fallen = code.snow_creator(flake.view(1, LAYERS, side, side), list(kernel[:, None, None]), SIZE)
        images.append(apply(image[None], fallen, torch.tensor([0.3])))
    np.random.seed(0)  # theirs draws from it
    drawn = torch.stack([kernel[0, 0] for _ in range(300) for kernel in code.make_kernels()])
    return {"theta": theta, "images": torch.cat(images), "mean_streak": drawn.mean(dim=0)}


def elastic(old: Any, new: Any, x: Tensor, rng: torch.Generator) -> Arrays:
    """The smoothed flow in pixels (to the right, down) and the images."""
    x = x[:, :, :16, :16]
    flow = torch.rand(len(x), 2, 16, 16, generator=rng) * 8 - 4
    deformer = old("advex_uar.attacks.elastic").ElasticDeformation(16, 25, 3)
    smoothed = deformer.kernel(F.pad(flow, (12,) * 4, mode="reflect"))
    return {"flow": flow, "smoothed": smoothed, "images": deformer(x, flow * 2 / 16)}


def gabor(old: Any, new: Any, x: Tensor, rng: torch.Generator) -> Arrays:
    """Kernels, images of impulses (as they are, no mask between) and the gradient to these of the noise times sin(0, 1, ...), in
    double precision, because theirs goes there and back by FFT; and where an attack starts, with its mask.
    """
    code = old("advex_uar.attacks.gabor")
    torch.set_default_dtype(torch.float64)
    numbers = torch.rand(len(x), 4, generator=rng)  # of sides, width, wave number and turn
    kernels = []
    for sides, width, wave, turn in numbers:
        kernels.append(code.get_gabor_with_sides(23, 0.1 + 0.3 * width, 3 + 2.75 * wave, torch.pi * turn, 1 + int(10 * sides)))
    impulses = torch.rand(len(x), 1, SIZE, SIZE, generator=rng) * 2 - 1
    impulses = impulses * (torch.rand(impulses.shape, generator=rng) < 1 / 14)
    with torch.enable_grad():
        noise = code.gabor_rand_distributed(impulses.requires_grad_(True), torch.stack(kernels)[:, None])
        (gradient,) = torch.autograd.grad((noise * torch.arange(SIZE * SIZE).view(SIZE, SIZE).sin()).sum(), impulses)
    torch.set_default_dtype(torch.float32)
    images = (255 * x + 12.5 * noise).clamp(0, 255) / 255
    np.random.seed(0)  # theirs draws from it
    start, mask = old("advex_uar.attacks").GaborAttack(1, 12.5, 0.1, SIZE)._init(1, 0)
    return {
        "numbers": numbers, "kernels": torch.stack(kernels), "impulses": impulses, "images": images,
        "gradient": gradient, "start": start, "mask": mask,
    }  # fmt: skip


def jpeg(old: Any, new: Any, x: Tensor, rng: torch.Generator) -> Arrays:
    """First version: moves of luma (as blocks of their own), of chroma at half the resolution, and the images; of colours that
    are constant in squares of 2x2, which subsampling leaves alone. Third version: moves of all coefficients, not in steps of
    the tables, in units of 1/255.
    """
    smooth = F.interpolate(x[:, :, ::2, ::2], scale_factor=2.0)
    attack = old("advex_uar.attacks").JPEGAttack(0, 1.0, 0.0, SIZE)
    moves = torch.rand(len(x), SIZE * SIZE * 3 // 2, generator=rng) * 2 - 1
    images = attack._jpeg_cat(smooth * 255, moves, torch.ones(len(x)), len(x), SIZE, SIZE) / 255
    # theirs works on images turned by 90 degrees: blocks and their coefficients have columns first
    parts = attack._convert_cat_var(moves, len(x), SIZE, SIZE)
    luma, blue, red = (blocks_to_image(part.transpose(2, 3), columns_first=True) for part in parts)
    code = new("attacks.jpeg")
    additions = (torch.rand(len(x), 3, SIZE // 8 * SIZE // 8, 8, 8, generator=rng) * 2 - 1) * 4 / 255
    steps = torch.tensor([LUMA, CHROMA, CHROMA]).repeat(1, SIZE // 8, SIZE // 8)
    theta = code.patches_to_image(additions, x.shape) * 255 / steps
    unmoved = attack._jpeg_cat(x * 255, torch.zeros_like(moves), torch.ones(len(x)), len(x), SIZE, SIZE) / 255
    return {
        "smooth": smooth, "luma": luma, "blue": blue, "red": red, "images": images, "unmoved": unmoved,
        "theta": theta, "new_images": code.apply_jpeg(x, additions),
    }  # fmt: skip


def blocks_to_image(blocks_BN88: Tensor, columns_first: bool) -> Tensor:
    """(B, side, side) of square images' blocks."""
    count = round(blocks_BN88.shape[1] ** 0.5)
    blocks = blocks_BN88.view(-1, count, count, 8, 8)
    blocks = blocks.transpose(1, 2) if columns_first else blocks
    return blocks.transpose(2, 3).reshape(-1, 8 * count, 8 * count)


def wood(old: Any, new: Any, x: Tensor, rng: torch.Generator) -> Arrays:
    code, theta = new("attacks.wood"), torch.rand(len(x), 1, 8, 8, generator=rng) * 0.1 - 0.05
    x = x[:, :, :16, :16]
    return {"theta": theta, "images": code.apply_wood_noise(x, code.wood_noise(theta, x.size(), 4, 8))}


def glitch(old: Any, new: Any, x: Tensor, rng: torch.Generator) -> Arrays:
    theta = torch.rand(len(x), 3, 4, generator=rng) * 0.4 - 0.2
    return {"theta": theta, "images": new("attacks.glitch").glitch_image(x[:, :, :16, :16], theta, 4)}


def pixel(old: Any, new: Any, x: Tensor, rng: torch.Generator) -> Arrays:
    code, theta = new("attacks.pixel"), torch.rand(len(x), 3, 4, 4, generator=rng)
    x = x[:, :, :16, :16]
    return {"theta": theta, "images": code.pixelate_image(x, code.get_pixels(x, 4), theta)}


def kaleidoscope(old: Any, new: Any, x: Tensor, rng: torch.Generator) -> Arrays:
    """Images of the shapes that our numbers are, with their outlines."""
    count = 4
    ours = Kaleidoscope(KaleidoscopeThreat(shapes=count, size=0.25, outline=2 / SIZE, eps=0.3, transparency=0.2))
    sizes = [3 * count, SIZE * SIZE, ours.FIXED * count]
    moves, bright, fixed = torch.rand(len(x), sum(sizes), generator=rng).split(sizes, dim=1)
    theta = torch.cat([moves * 2 - 1, bright, fixed], dim=1)
    (shapes, colours), code = kaleidoscope_parts(ours, x, theta), new("attacks.kaleidoscope")
    outlines = torch.stack([code.get_edge_masks(each, 1 + 2 * 2) for each in shapes])
    images = code.add_variables(
        x, shapes, 0.3 * (moves * 2 - 1).view(-1, count, 3), outlines, 0.3 * bright.view(-1, 1, SIZE, SIZE), 0.2, colours, True
    )  # fmt: skip
    return {"theta": theta, "images": images}


def kaleidoscope_parts(threat: Kaleidoscope, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels our shapes cover, and the colours drawn for them."""
    fixed = theta[:, -threat.FIXED * threat.shapes :].view(-1, threat.shapes, threat.FIXED)
    shapes, _ = threat.covers(fixed[:, :, 3:], x)
    return shapes, hsv_to_rgb(fixed[:, :, 0], 0.7 + 0.3 * fixed[:, :, 1], 0.8 + 0.2 * fixed[:, :, 2])


def hsv(old: Any, new: Any, x: Tensor, rng: torch.Generator) -> Arrays:
    colours = torch.rand(1, 3, 8, 8, generator=rng)
    return {"hsv": colours, "rgb": new("attacks.hsv").hsv2rgb(colours)}


RENDERS = {f.__name__: f for f in (fog, snow, elastic, gabor, jpeg, wood, glitch, pixel, kaleidoscope, hsv)}


def renders(old: Any, new: Any) -> dict[str, np.ndarray]:
    """All arrays, named RENDER/PART, and the image that they start from."""
    rng = torch.Generator().manual_seed(0)
    x = (torch.randint(256, (2, 3, SIZE, SIZE), generator=rng) / 255).float()
    found = {"x": x}
    for name, make in RENDERS.items():
        with torch.no_grad():
            found |= {f"{name}/{part}": value for part, value in make(old, new, x, rng).items()}
    return {name: value.detach().float().numpy() for name, value in found.items()}


def new_attack(new: Any, row: Row, batch: Batch) -> Any:
    """The third version's attack with the budget, steps and step size of a row; a kaleidoscope's shapes are those of ours."""
    steps, step = row.steps, row.step_size
    if row.threat == "wood":
        return new("attacks.wood").WoodAdversary(row.eps, steps, step, row.cells, row.rings, row.random_start, 8)
    if row.threat == "glitch":
        return new("attacks.glitch").GlitchAdversary(row.eps, steps, step, row.lines, 0.0)
    if row.threat == "pixel":
        return new("attacks.pixel").PixelAdversary(row.eps, steps, step, row.norm, round(row.size * SIZE))
    code, threat = new("attacks.kaleidoscope"), threats.build(row, None)
    shapes, colours = kaleidoscope_parts(threat, batch.x_BCHW, threat.start(batch, Draws(0, batch.id, "published/0")))
    code.get_shape_masks, code.init_colours = lambda *_: shapes, lambda *_: colours
    edge = 1 + 2 * round(row.outline * SIZE)
    sizes = (row.shapes, row.size * SIZE, 0.8, 0.7, row.transparency, edge)
    return code.KaleidoscopeAdversary(row.eps, steps, row.eps * step, *sizes)


def strength(code: ModuleType, new: Any) -> dict[str, Any]:
    """The rows, each with its classifier and the number of digits that stand under theirs."""
    every, rows = digits(COUNT), []
    for name, row in ROWS:
        network, standing, negative = digit_network(name).requires_grad_(False), 0, isinstance(row, WoodRow)
        network = Negative(network) if negative else network
        torch.manual_seed(0)
        np.random.seed(0)  # theirs draws from it
        random.seed(0)
        for part in torch.arange(COUNT).split(20):  # theirs has one set of streaks for all images of a batch
            batch = every.take(part)
            batch = replace(batch, x_BCHW=1 - batch.x_BCHW) if negative else batch
            if isinstance(row, WoodRow | GlitchRow | PixelRow | KaleidoscopeRow):
                images = new_attack(new, row, batch)(network, batch.x_BCHW, batch.y_B).clamp(0, 1)
            else:
                attack = advex_attack(code, row, SIZE)
                if isinstance(row, GaborRow):  # the kernels that ours will have: some are far stronger than others
                    theta = threats.build(row, None).start(batch, Draws(0, batch.id, "published/0"))
                    attack._get_gabor_kernel = lambda _, theta=theta: gabor_kernel(theta[:, -4:])
                images = run_advex(attack, network, batch).clamp(0, 1)
            with torch.no_grad():
                standing += int((network(images).argmax(dim=1) == batch.y_B).sum())
        print(f"{row.name}: {standing} of {COUNT} stand on {name}", flush=True)
        rows.append({"network": name, "negative": negative, "row": row.model_dump(), "standing": standing})
    return {"ids": list(every.id), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--advex-uar", type=Path, required=True, help="clone of ddkang/advex-uar")
    parser.add_argument(
        "--adversarial-corruptions", type=Path, required=True, help="clone of centerforaisafety/adversarial-corruptions"
    )
    parser.add_argument("--output", type=Path, default=TESTS / "published", help="folder to write to")
    arguments = parser.parse_args()
    old = published(arguments.advex_uar, ["advex_uar"])
    new = published(arguments.adversarial_corruptions, ["attacks", "config"])
    new("config").device = "cpu"
    arguments.output.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.output / "renders.npz", **renders(old, new))
    found = strength(old("advex_uar.attacks"), new)
    (arguments.output / "strength.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
