"""What does projection cost beside the published loop and its strongest peers, and is the result as good?

    python benchmarks/projection.py step [--kinds stylegan1 stylegan2] [--resolutions 64 256] [--batch 64:16 256:4]
    python benchmarks/projection.py images [--digits 48] [--group 16] [--sides published cached fast] [--option steps=80 ...]
    python benchmarks/projection.py recover [--option steps=80 ...]
    any with [--device cuda] [--threads 1] [--compile] [--json FILE], step also with [--count]

`step` times one optimisation step on random weights of the published widths, or counts its operations (--count). Sides,
each written plainly here but ours:

- published: the loop of the code of arXiv 2009.02470, with LPIPS for its perceptual distance. Generator as in the papers;
  a VGG that still requires gradients, so that every step computes those of its weights too; the target goes through it
  in every step.
- lpips package: the same with lpips.LPIPS as it ships (backbone frozen).
- cached: what NVlabs' projector does: backbone frozen, features of the target computed once. (It handles one image a
  run; here it has a batch, as all others.)
- ours, in float32 and in bfloat16: a whole step of `Projector`, with noise, Adam, and all that stopping needs.

`images` projects digits of the test split onto the shipped generator, by the published loop and by the cached one with
1,000 steps and by preset `fast` (VGG with random weights on all sides), group by group, and reports errors and images per
second. `recover` projects eight images that the generator made, by presets `paper` and `fast`. What is done once is left
out of the times: loading, the encoder's training (jobs/train_encoder.py), and the principal axes, whose time is printed.

Ratios are medians over rounds, with quartiles (over groups: with the lowest and the highest); how they are taken and why
the script starts itself again is said in benchmarks/generator.py. "A/A" runs the first side twice and shows the noise.
"""

import argparse
import contextlib
import io
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import torch
from generator import add_batch, alternate, batch_at, build, flops_of, prepared, quartiles, record, stopwatch
from torch import Tensor

from dmat_ray import presets
from dmat_ray.config import Config, DataConfig, ProjectionConfig
from dmat_ray.data import reading, sources
from dmat_ray.data.pixels import unit
from dmat_ray.errors import UserError
from dmat_ray.manifold import fast, generators, set_maker
from dmat_ray.manifold.projection import Projection, Projector, learning_rate, noise_scale
from dmat_ray.types import Generator

PUBLISHED = ProjectionConfig(lpips_weights="random")  # the defaults are the published settings
SPLIT = 0.95


def vgg(device: torch.device, *, frozen: bool) -> lpips.LPIPS:
    """LPIPS of the package on a random VGG, the one that `Projector` makes for seed 0."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        metric = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    metric.net.requires_grad_(not frozen)
    return metric.to(device).eval()


def rgb(x: Tensor) -> Tensor:
    """Images in [0, 1] as LPIPS wants them: three channels in [-1, 1]."""
    return x.expand(-1, 3, -1, -1) * 2 - 1


def package_distance(metric: lpips.LPIPS, target: Tensor) -> Callable[[Tensor], Tensor]:
    """LPIPS to the target, whose features are computed in every call."""
    return lambda x: metric(rgb(x), rgb(target)).flatten()


def cached_distance(metric: lpips.LPIPS, target: Tensor) -> Callable[[Tensor], Tensor]:
    """LPIPS to the target, whose features are computed here, once."""

    def features(x: Tensor) -> list[Tensor]:
        return [lpips.normalize_tensor(f) for f in metric.net(metric.scaling_layer(rgb(x)))]

    with torch.no_grad():
        wanted = features(target)

    def distance(x: Tensor) -> Tensor:
        layers = zip(metric.lins, features(x), wanted, strict=True)
        return torch.stack([lin((a - b) ** 2).mean(dim=(1, 2, 3)) for lin, a, b in layers]).sum(dim=0)

    return distance


class PlainLoop:
    """The published loop, from its description: Adam on w, the rate and the noise of the step, gradients by backward()."""

    def __init__(self, generator: Generator, target: Tensor, distance: Callable[[Tensor], Tensor], steps: int) -> None:
        self.generator, self.target, self.distance = generator, target, distance
        self.config = PUBLISHED.model_copy(update={"steps": steps})
        w = generator.w_mean.expand(len(target), generator.num_ws, -1)
        self.w = w.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.w], lr=self.config.lr)

    def step(self, step: int) -> None:
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, step)
        noise = torch.randn_like(self.w) * self.generator.w_std.square().sum().sqrt() * noise_scale(self.config, step)
        x = self.generator.synthesis(self.w + noise, clamp=False)
        loss = self.distance(x) + 200 * (x - self.target).abs().mean(dim=(1, 2, 3))
        self.optimizer.zero_grad()
        loss.sum().backward()
        self.optimizer.step()


def our_step(generator: Generator, target: Tensor, device: torch.device, **settings: Any) -> Callable[[], None]:
    """A step of `Projector` on a full batch that never ends."""
    values = {"batch_size": len(target), "steps": 1_000_000, "stop_window": 10, "stop_improvement": 1e-6, **settings}
    config = PUBLISHED.model_copy(update=values)
    projector = Projector(generator, config, device)
    with torch.no_grad():
        slots = projector.reserved()
        projector.enter(slots, list(range(len(target))), target.cpu(), [str(i) for i in range(len(target))])

    def step() -> None:
        with torch.no_grad():
            projector.step(slots, len(target), noisy=True)

    return step


def step_sides(kind: str, resolution: int, batch: int, arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """One step of each side, on the same images."""
    device, generator = torch.device(arguments.device), build(kind, resolution, None).eval().requires_grad_(False)
    generator.measure_w(samples=1000)
    generator = generator.to(device)
    target = torch.rand(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(1)).to(device)
    distances = {
        "published": package_distance(vgg(device, frozen=False), target),
        "lpips package": package_distance(vgg(device, frozen=True), target),
        "cached": cached_distance(vgg(device, frozen=True), target),
    }
    loops = {name: PlainLoop(generator, target, distance, 1000) for name, distance in distances.items()}
    sides: dict[str, Callable[[], None]] = {name: lambda loop=loop: loop.step(100) for name, loop in loops.items()}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        quick = fast.accelerate(generator, dtype)
        sides[f"ours {name}"] = our_step(quick, target, device, lpips_precision=name)
        if arguments.compile:
            sides[f"ours {name} compiled"] = our_step(quick, target, device, lpips_precision=name, compile=True)
    return sides


def compare_steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every generator and side."""
    rows = []
    for kind in arguments.kinds:
        for resolution in arguments.resolutions:
            batch = batch_at(resolution, arguments)
            sides = step_sides(kind, resolution, batch, arguments)
            print(f"\nstep on {kind} {resolution}x{resolution}, batch {batch}")
            case = {"kind": kind, "resolution": resolution, "batch": batch}
            found = count_steps(sides, batch) if arguments.count else time_steps(sides, batch, arguments)
            rows += [{**case, **row} for row in found]
    return rows


def count_steps(sides: dict[str, Callable[[], None]], batch: int) -> list[dict[str, Any]]:
    """Floating-point operations of a step's products and convolutions."""
    operations = {name: flops_of(run) / batch / 1e9 for name, run in sides.items()}
    print(f"{'side':24} {'GFLOP an image':>14}   to published")
    for name, gflop in operations.items():
        print(f"{name:24} {gflop:14.1f}   {gflop / operations['published']:.3f}", flush=True)
    return [{"side": name, "gflop": gflop} for name, gflop in operations.items()]


def time_steps(sides: dict[str, Callable[[], None]], batch: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of a step, and its ratios within rounds."""
    clock = stopwatch(torch.device(arguments.device))
    seconds = alternate({**sides, "published again (A/A)": sides["published"]}, arguments.rounds, clock)
    rows = []
    print(f"{'side':24} {'ms an image':>12}   to published (quartiles)     to the lpips package (quartiles)")
    for name, times in seconds.items():
        ratios = {base: quartiles(times / seconds[base]) for base in ("published", "lpips package")}
        milliseconds = float(np.median(times)) / batch * 1000
        rows.append({"side": name, "ms": milliseconds, "ratios": ratios})
        shown = [f"{middle:.3f} ({low:.3f} to {high:.3f})" for low, middle, high in ratios.values()]
        print(f"{name:24} {milliseconds:12.1f}   {shown[0]:28} {shown[1]}", flush=True)
    return rows


def digits(count: int) -> tuple[Tensor, list[str]]:
    """Test digits (uint8) and their ids, in a seeded order."""
    config = DataConfig(source="mnist5k", resolution=32, channels=1)
    rows = sources.list_examples(config).rows("test").sort_by("id")
    rows = rows.take(np.random.default_rng(0).permutation(len(rows))[:count])
    return torch.from_numpy(np.stack(reading.read_pixels(rows, config))), rows["id"].to_pylist()


def projector_of(preset: str, arguments: argparse.Namespace, device: torch.device) -> Projector:
    """A preset with the options of the command line."""
    values = presets.merge(
        presets.load([preset]), {"projection": {"lpips_weights": "random", "batch_size": arguments.batch_size}}
    )
    options = dict(entry.split("=", 1) for entry in arguments.option)
    values = presets.merge(values, {"projection": {**options, "compile": arguments.compile}})
    return set_maker.build_projector(Config.model_validate(values), device)


def plain_images(x: Tensor, cached: bool, arguments: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """The last w of a plain loop, and its steps; batch by batch."""
    generator, found = generators.load_generator("mnist32", device), []
    metric, distance = vgg(device, frozen=cached), cached_distance if cached else package_distance
    for part in x.split(arguments.batch_size):
        target = unit(part).to(device)
        loop = PlainLoop(generator, target, distance(metric, target), arguments.steps)
        for step in range(arguments.steps):
            loop.step(step)
        found.append(loop.w.detach().cpu())
    return torch.cat(found), torch.full((len(x),), arguments.steps)


def compare_images(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every side: errors over all digits, and the ratio of images per second."""
    device = torch.device(arguments.device)
    x, ids = digits(arguments.digits)
    clock = stopwatch(device)
    began = clock()
    ours = projector_of("fast", arguments, device)
    print(f"made the projector of preset fast, its principal axes included, in {clock() - began:.1f} s")
    # the same measure for both: LPIPS in float32, the clamped images of the papers' arithmetic
    judged = ours.config.model_copy(update={"start": "mean", "axes": "w"})
    judge = Projector(generators.load_generator("mnist32", device), judged, device)

    def by_ours(part: slice) -> tuple[Tensor, Tensor]:
        result = ours.project(x[part], ids[part])
        return result.w_BLD, result.steps_B

    every: dict[str, Callable[[slice], tuple[Tensor, Tensor]]] = {
        "published": lambda part: plain_images(x[part], False, arguments, device),
        "cached": lambda part: plain_images(x[part], True, arguments, device),
        "fast": by_ours,
    }
    sides = {name: every[name] for name in arguments.sides}
    found: dict[str, list[Projection]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    ours.project(x[:2], ids[:2])  # compiles, and brings the heap to its size
    for start in range(0, len(x), arguments.group):
        part = slice(start, start + arguments.group)
        for name in random.sample(list(sides), len(sides)):
            began = clock()
            w, steps = sides[name](part)
            seconds[name].append(clock() - began)
            found[name].append(judge.measured(x[part], w, steps))
            print(f"{name}: {len(steps)} images in {seconds[name][-1]:.1f} s", flush=True)
    return [row_of(name, found[name], seconds, ours.config) for name in found]


def row_of(name: str, parts: list[Projection], seconds: dict[str, list[float]], config: ProjectionConfig) -> dict[str, Any]:
    """What is reported of one side."""
    lpips_B, l1_B, l2_B, steps_B = (torch.cat([getattr(p, k) for p in parts]) for k in ("lpips_B", "l1_B", "l2_B", "steps_B"))
    errors = {
        "loss": config.lpips * lpips_B + config.l1 * l1_B + config.l2 * l2_B,
        "lpips": lpips_B, "l1": l1_B, "psnr": -10 * l2_B.log10(),
    }  # fmt: skip
    row: dict[str, Any] = {"side": name, "images": len(l1_B), "steps": float(steps_B.float().mean())}
    row["images_per_second"] = len(l1_B) / sum(seconds[name])
    print(f"\n{name}: {row['steps']:.1f} steps an image, {row['images_per_second']:.3f} images/s")
    for base in [side for side in ("published", "cached") if side in seconds]:
        times = np.array(seconds[base]) / np.array(seconds[name])
        row[f"times_{base}"] = [float(times.min()), float(np.median(times)), float(times.max())]
        print("  {1:.2f} ({0:.2f} to {2:.2f}) times the images/s of the loop '{3}'".format(*row[f"times_{base}"], base))
    for key, value in errors.items():
        # the bad end of PSNR is the low one
        bad = float(value.quantile(1 - SPLIT if key == "psnr" else SPLIT))
        row[key] = {"mean": float(value.mean()), "median": float(value.median()), "p95": bad}
        print(f"  {key:6} mean {row[key]['mean']:9.5f}  median {row[key]['median']:9.5f}  95th percentile {bad:9.5f}")
    return row


def recover(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """PSNR of images that the generator made, from seeded z."""
    device = torch.device(arguments.device)
    generator = generators.load_generator("mnist32", device)
    z = torch.randn(8, generator.z_dim, generator=torch.Generator().manual_seed(100)).to(device)
    x = generator.synthesis(generator.mapping(z)).cpu()
    rows = []
    for preset in ("paper", "fast"):
        found = projector_of(preset, arguments, device).project(x, [f"image-{i}" for i in range(len(x))])
        psnr = (-10 * found.l2_B.log10()).sort().values.tolist()
        rows.append({"side": preset, "psnr": psnr, "steps": float(found.steps_B.float().mean())})
        print(f"{preset}: {rows[-1]['steps']:.0f} steps an image, PSNR {', '.join(f'{v:.1f}' for v in psnr)} dB", flush=True)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "images", "recover"])
    parser.add_argument("--kinds", nargs="+", choices=["stylegan1", "stylegan2"], default=["stylegan1", "stylegan2"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[64, 256], help="image sizes in pixels")
    add_batch(parser, "step")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of steps")
    parser.add_argument("--count", action="store_true", help="step: count floating-point operations instead of timing")
    parser.add_argument("--digits", type=int, default=48, help="test digits to project")
    parser.add_argument("--sides", nargs="+", choices=["published", "cached", "fast"], default=["published", "cached", "fast"])
    parser.add_argument("--group", type=int, default=16, help="digits that one side projects before the other does")
    parser.add_argument("--batch-size", type=int, default=16, help="digits optimised together, on both sides")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the published loop on digits")
    parser.add_argument("--option", nargs="*", default=[], metavar="KEY=VALUE", help="settings of projection over preset fast")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one operation")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile for ours (step: as sides of their own)")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    prepared(arguments)
    rows = {"step": compare_steps, "images": compare_images, "recover": recover}[arguments.what](arguments)
    record(arguments, rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
