"""What does a step of dual manifold adversarial training cost beside the published one, and is it the same step?

    python benchmarks/train_step.py [--network resnet50] [--kinds stylegan1 stylegan2] [--resolutions 64 256] [--batch 16 256:4]
        [--sides published ...] [--stylegan1-code DIR] [--device cuda] [--compile] [--rounds 5] [--threads 1] [--json FILE]

A step: PGD-5 on the pixels (radius 4/255, steps of 1/255), PGD-5 on w (radius 0.02, steps of 0.005), half of the loss from each,
SGD with momentum 0.9. Generators have the published widths, all weights are random, and w is known. Sides, of which each in the
middle adds one change to the one above it:

- published: the published logic, written plainly in step_sides.py: the generator in the papers' arithmetic (for times, with
  --stylegan1-code, the code of genforce/higan or genforce/interfacegan from a clone), the network attacked in eval mode with
  frozen parameters, two forward passes in training mode, float32, contiguous.
- + fast generator: `accelerate` in float32.
- + attack view: attacks go to `AttackView`, batch norm folded, refreshed once a step.
- + one batch: `TrainingStep` without channels_last: both terms go through the network together; with all else that it does.
- ours float32: `TrainingStep` as it comes (channels_last).
- ours bf16: precision bf16, and the generator in bfloat16; "ours bf16 contiguous" is without channels_last.
- with --compile, both of ours with training.compile.

All have the same random starts. Before times are taken each side is held against `published`, from the same weights, in three
ways: the signs of the first gradients of both attacks; the gradient to the weights from the images that the published attacks
found; and a whole first step: the loss, the weights afterwards (largest difference, relative to the largest of a tensor, without
those that start at zero), and the cosine of the weights' move. Sign steps through random networks are chaotic: after five of them
rounding has become another attack, as the row "published, w off by 1e-6" shows, which whole steps are to be held against.

Shares are those of the parts run by themselves: the generator (six synthesis passes, five gradients to w), the classifier under
attack (ten passes and gradients to its input), its update (passes and gradients to its weights), and what is left of the
step. FLOPs are those of matrix products and convolutions, of the side itself and of the published step (the work that was asked
for), against the fastest product or convolution that this machine was seen to do in the same run and precision (on CUDA with
torch's defaults: float32 convolutions use TF32).

Ratios are medians over rounds, with quartiles; how they are taken and why the script starts itself again is said in
benchmarks/generator.py. "A/A" runs the first side twice and shows the noise.
"""

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attack import CLASSES, settled
from generator import (
    add_batch,
    alternate,
    batch_at,
    build,
    flops_of,
    machine_limit,
    prepared,
    published_stylegan1,
    quartiles,
    record,
    stopwatch,
)
from step_agreement import agreement
from step_sides import Ours, Published, Side, Synthesis, parts_of

from dmat_ray.errors import UserError
from dmat_ray.manifold import fast
from dmat_ray.manifold.stylegan1 import StyleGAN1
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.types import Batch, Generator

GOALS = {"ours float32": 0.68, "ours bf16": 0.38}  # of the published step's time


def in_range(generator: StyleGAN1 | StyleGAN2) -> StyleGAN1 | StyleGAN2:
    """The generator with images that lie mostly inside (0, 1), where pixels have a gradient."""
    with torch.no_grad():
        synth: Any = generator.synth
        for weight in [synth.image_weight] if isinstance(generator, StyleGAN1) else [layer.conv.weight for layer in synth.images]:
            weight *= 0.3
    return generator.eval().requires_grad_(False)


class Case:
    """Generator, network and batch that all sides have."""

    def __init__(self, kind: str, resolution: int, count: int, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, torch.device(arguments.device)
        generator = in_range(build(kind, resolution, arguments.channel_base))
        generator.measure_w(samples=1000)
        self.generator = generator.to(self.device)
        self.quick = {dtype: fast.accelerate(generator, dtype) for dtype in (torch.float32, torch.bfloat16)}
        draws = torch.Generator().manual_seed(1)
        z = torch.randn(count, generator.z_dim, generator=draws).to(self.device)
        w = generator.mapping(z).contiguous()
        y = torch.randint(CLASSES, (count,), generator=draws).to(self.device)
        self.batch = Batch([f"example-{i}" for i in range(count)], generator.synthesis(w), y, w)
        self.network = settled(arguments.network, self.batch.x_BCHW).train()
        self.published_code: Synthesis | None = None
        if isinstance(generator, StyleGAN1) and arguments.stylegan1_code:
            code = published_stylegan1(arguments.stylegan1_code, generator.config).to(self.device).eval().requires_grad_(False)
            self.published_code = lambda w: ((code(w) + 1) * 0.5).clamp(0, 1)

    def _published(self, generator: Generator, view: bool = False) -> Published:
        return Published(copy.deepcopy(self.network), generator.synthesis, self.batch, view)

    def _ours(self, dtype: torch.dtype, **training: Any) -> Ours:
        precision = "bf16" if dtype == torch.bfloat16 else "float32"
        network = copy.deepcopy(self.network)
        return Ours(network, self.quick[dtype], self.batch, self.device, precision=precision, **training)

    def sides(self) -> dict[str, Side]:
        """What is compared, the first being the measure of the others."""
        single, half = torch.float32, torch.bfloat16
        makers: dict[str, Callable[[], Side]] = {
            "published": lambda: self._published(self.generator),
            "+ fast generator": lambda: self._published(self.quick[single]),
            "+ attack view": lambda: self._published(self.quick[single], view=True),
            "+ one batch": lambda: self._ours(single, channels_last=False),
            "ours float32": lambda: self._ours(single),
            "ours bf16 contiguous": lambda: self._ours(half, channels_last=False),
            "ours bf16": lambda: self._ours(half),
        }
        if self.arguments.compile:
            makers["ours float32 compiled"] = lambda: self._ours(single, compile=True)
            makers["ours bf16 compiled"] = lambda: self._ours(half, compile=True)
        chosen = self.arguments.sides
        return {name: make() for name, make in makers.items() if name == "published" or not chosen or name in chosen}

    def control(self) -> Published:
        """The published step on codes that are off by what rounding might be."""
        w = self.batch.w_BLD
        assert w is not None
        noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(3)).to(w)
        batch = dataclasses.replace(self.batch, w_BLD=w * (1 + 1e-6 * noise))
        return Published(copy.deepcopy(self.network), self.generator.synthesis, batch)


def compare(kind: str, resolution: int, count: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every side, printed."""
    case = Case(kind, resolution, count, arguments)
    print(f"\nDMAT step of {arguments.network} and {kind}, {resolution}x{resolution}, batch {count}")
    sides = case.sides()
    agreed = agreement(sides, case.control())
    if case.published_code is not None:
        assert isinstance(sides["published"], Published)
        sides["published"].synthesis = case.published_code
    clock = stopwatch(case.device)
    seconds = alternate({**sides, "published again (A/A)": sides["published"]}, arguments.rounds, clock)
    print(f"\n{'side':24} {'ms a step':>10}   to published (quartiles)  to the side above")
    rows, above = [], "published"
    for name, times in seconds.items():
        above = "published" if name not in sides else above
        low, middle, high = quartiles(times / seconds["published"])
        step = quartiles(times / seconds[above])[1]
        milliseconds = float(np.median(times)) * 1000
        print(f"{name:24} {milliseconds:10.1f}   {middle:.3f} ({low:.3f} to {high:.3f})    {step:.3f}", flush=True)
        row = {"kind": kind, "resolution": resolution, "batch": count, "network": arguments.network, "rounds": arguments.rounds}
        row |= {"side": name, "ms": milliseconds, "ratio": middle, "ratio_quartiles": [low, high], "ratio_to_above": step}
        rows.append(row | ({"agreement": agreed[name]} if name in agreed else {}))
        above = name
    for name, goal in GOALS.items():
        for row in [row for row in rows if row["side"] == name]:
            print(f"goal: {name} at most {goal} of published: {row['ratio']:.3f}, {reached(row['ratio'], goal)}")
    shares = shares_of({name: side for name, side in sides.items() if name.startswith(("published", "ours"))}, case, clock)
    return [row | shares.get(row["side"], {}) for row in rows]


def reached(value: float, goal: float) -> str:
    return "reached" if value <= goal else "missed"


def shares_of(sides: dict[str, Side], case: Case, clock: Callable[[], float]) -> dict[str, dict[str, Any]]:
    """Where each side's time goes, and how near it comes to what the machine can do, printed."""
    limits = {
        name: machine_limit(case.device, dtype, clock) for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))
    }
    runs = {(name, part): run for name, side in sides.items() for part, run in parts_of(side).items()}
    operations = {key: flops_of(run) for key, run in runs.items() if "compiled" not in key[0]}
    seconds = alternate(runs, case.arguments.rounds, clock)  # type: ignore[arg-type, type-var]
    print(
        f"\nfastest product or convolution: float32 {limits['float32'] / 1e12:.3f} TFLOP/s, bf16 {limits['bf16'] / 1e12:.3f}; "
        f"published step: {operations['published', 'step'] / 1e9:.1f} GFLOP"
    )
    print(
        f"{'side':24} {'ms a step':>10} {'generator':>10} {'attacks':>9} {'update':>8} {'rest':>7} {'GFLOP':>9}"
        "   TFLOP/s (of limit)   of the published work"
    )
    found = {}
    for name in sides:
        step = seconds[name, "step"]
        share = {part: float(np.median(seconds[name, part] / step)) for part in ("generator", "attacks", "update")}
        share["rest"] = 1 - sum(share.values())
        limit, median = limits["bf16" if "bf16" in name else "float32"], float(np.median(step))
        own, asked = operations.get((name, "step")), operations["published", "step"]
        counts = {part: operations.get((name, part)) for part in ("step", "generator", "attacks", "update")}
        found[name] = {"shares": share, "flops": counts, "limit": limit, "asked_flops": asked}
        gflop, rate = (f"{own / 1e9:.1f}", f"{own / median / 1e12:.3f} ({own / median / limit:.0%})") if own else ("", "")
        print(
            f"{name:24} {median * 1000:10.1f} {share['generator']:10.1%} {share['attacks']:9.1%} {share['update']:8.1%} "
            f"{share['rest']:7.1%} {gflop:>9}   {rate:20} {asked / median / 1e12:.3f} ({asked / median / limit:.0%})",
            flush=True,
        )
    return found


def compare_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All kinds and sizes."""
    return [
        row
        for kind in arguments.kinds
        for resolution in arguments.resolutions
        for row in compare(kind, resolution, batch_at(resolution, arguments), arguments)
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="torchvision's name")
    parser.add_argument("--kinds", nargs="+", choices=["stylegan1", "stylegan2"], default=["stylegan1"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[64], help="image sizes in pixels")
    add_batch(parser, "step")
    parser.add_argument("--channel-base", type=int, help="feature channels at resolution r are this / r; default as published")
    parser.add_argument("--sides", nargs="+", help="only these, and published; default all")
    parser.add_argument("--stylegan1-code", type=Path, help="clone of genforce/higan or genforce/interfacegan")
    parser.add_argument("--compile", action="store_true", help="time ours with training.compile too")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one operation")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    prepared(arguments)
    rows = compare_all(arguments)
    record(arguments, rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
