"""How fast are the generators, forward and with the gradient to w, beside the published PyTorch code?

    python benchmarks/generator.py [--kinds stylegan1 stylegan2] [--resolutions 64 256] [--batch 64:16 256:4]
        [--stylegan1-code DIR] [--nvlabs-code DIR] [--device cuda] [--compile] [--json FILE]

Sides: ours as in the papers (reference), fast in float32 and in bfloat16, and a peer where its code is given by path:
--stylegan1-code, the root of a clone of genforce/higan or genforce/interfacegan (StyleGAN 1), and --nvlabs-code, a
clone of NVlabs/stylegan2-ada-pytorch (StyleGAN 2, as its own scripts evaluate it: noise_mode="const", here in float32).

In each round every side runs once, in random order; a ratio is the median over the rounds of this side's time by the
first side's (the peer, or the reference), with its quartiles. The first side runs twice a round, and the ratio of the
two ("A/A") shows the noise. With one thread on a CPU the time is that of the processor, which the load of other
processes disturbs less than the wall clock. FLOPs are counted of matrix products and convolutions as each side does
them (for NVlabs' code those of our reference: the work needed, without the weight gradients that it computes besides),
and set against the fastest of the products and convolutions that this machine was seen to do in the same run.

On a CPU the script starts itself again with MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=20000000000. Else glibc
returns large buffers to the kernel after each use, and taking them again costs a page fault every 4 KiB, up to a fifth
of the time, in proportions that depend on what ran before.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dmat_ray.config import StyleGAN1Config, StyleGAN2Config
from dmat_ray.errors import UserError
from dmat_ray.manifold import fast
from dmat_ray.manifold.stylegan1 import StyleGAN1
from dmat_ray.manifold.stylegan2 import StyleGAN2

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}
WARM_UP = 2  # rounds until the heap has grown to what all sides need
Synthesis = Callable[[Tensor], Tensor]


def restart_with(environment: dict[str, str]) -> None:
    """Run this script again, in this process, unless the environment is already as wanted."""
    if any(os.environ.get(key) != value for key, value in environment.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **environment})


def prepared(arguments: argparse.Namespace) -> None:
    """The allocator, the threads and the order of rounds that all times are taken with."""
    if arguments.device == "cpu":
        restart_with({**ALLOCATOR, "OMP_NUM_THREADS": str(arguments.threads)})
    torch.set_num_threads(arguments.threads)
    random.seed(0)


def record(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write rows, command and machine where --json says."""
    if arguments.json:
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
        machine = {"device": device, "threads": arguments.threads, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"command": sys.argv, **machine, "rows": rows}, indent=1) + "\n")


def build(kind: str, resolution: int, base: int | None) -> StyleGAN1 | StyleGAN2:
    """An untrained generator of the published widths: as NVlabs' configurations have them, StyleGAN 2 halves below 512."""
    torch.manual_seed(0)
    if kind == "stylegan1":
        return StyleGAN1(StyleGAN1Config(resolution=resolution, channel_base=base or 16384))
    return StyleGAN2(
        StyleGAN2Config(
            resolution=resolution,
            channels=3,
            z_dim=512,
            w_dim=512,
            mapping_layers=8,
            channel_base=base or (32768 if resolution >= 512 else 16384),
            channel_max=512,
            noise=True,
        )
    )


def published_stylegan1(code: Path, config: StyleGAN1Config) -> nn.Module:
    """The synthesis network of genforce's StyleGAN 1."""
    path = code / "models" / "stylegan_generator_network.py"
    if not path.is_file():
        raise UserError(f"--stylegan1-code '{code}' has no models/{path.name}; give the root of a clone of genforce/higan")
    spec = importlib.util.spec_from_file_location("published_stylegan1", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.StyleGANGeneratorNet(
        resolution=config.resolution, fmaps_base=config.channel_base, fmaps_max=config.channel_max
    )
    return network.synthesis


def published_stylegan2(code: Path, config: StyleGAN2Config) -> Synthesis:
    """The synthesis network of NVlabs' StyleGAN 2, in eval mode with its stored noise."""
    if not (code / "training" / "networks.py").is_file():
        raise UserError(f"--nvlabs-code '{code}' has no training/networks.py; give a clone of NVlabs/stylegan2-ada-pytorch")
    sys.path.insert(0, str(code))
    from training.networks import Generator  # type: ignore[import-not-found]

    widths = {"channel_base": config.channel_base, "channel_max": config.channel_max}
    network = Generator(config.z_dim, 0, config.w_dim, config.resolution, config.channels, synthesis_kwargs=widths)
    network.synthesis.requires_grad_(False).eval()
    return network.synthesis


def sides_of(kind: str, resolution: int, arguments: argparse.Namespace) -> tuple[dict[str, Synthesis], int, int]:
    """What is compared, the first side being the measure of the others; and the shape (L, D) of one W+ code."""
    generator = build(kind, resolution, arguments.channel_base)
    device, sides = torch.device(arguments.device), dict[str, Synthesis]()
    if kind == "stylegan1" and arguments.stylegan1_code:
        network = published_stylegan1(arguments.stylegan1_code, generator.config)
        sides["peer"] = network.to(device).eval().requires_grad_(False)
    if kind == "stylegan2" and arguments.nvlabs_code:
        network = published_stylegan2(arguments.nvlabs_code, generator.config).to(device)
        sides["peer"] = lambda w: network(w, noise_mode="const", force_fp32=True)
    quick = {"fast": fast.accelerate(generator, torch.float32), "bf16": fast.accelerate(generator, torch.bfloat16)}
    for name, part in {"reference": generator, **quick}.items():
        sides[name] = part.to(device).eval().requires_grad_(False).synth
    if arguments.compile:
        sides |= {f"{name} compiled": torch.compile(sides[name]) for name in ("reference", "fast", "bf16")}
    return sides, generator.num_ws, generator.w_dim


def passes(side: Synthesis, w: Tensor, backward: bool) -> None:
    """One synthesis, and if `backward` the gradient of the sum of its pixels to w."""
    if not backward:
        with torch.no_grad():
            side(w)
        return
    # the weights are frozen
    side(w.detach().requires_grad_()).sum().backward()


def stopwatch(device: torch.device) -> Callable[[], float]:
    """Seconds: of the processor for one CPU thread, of the wall clock otherwise, the device's queue having run empty."""
    if device.type == "cuda":
        return lambda: (torch.cuda.synchronize(), time.perf_counter())[1]
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def alternate(runs: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, np.ndarray]:
    """Seconds of every run in every round, the runs of a round in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for round_ in range(-WARM_UP, rounds):
        random.shuffle(order)
        for name in order:
            began = clock()
            runs[name]()
            if round_ >= 0:
                seconds[name].append(clock() - began)
    return {name: np.array(values) for name, values in seconds.items()}


class Operations(TorchDispatchMode):
    """Counts floating-point operations of products and convolutions; FlopCounterMode does not know autograd.grad to a leaf."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def flops_of(run: Callable[[], None]) -> int:
    """Floating-point operations of a run's matrix products and convolutions."""
    with Operations() as counter:
        run()
    return counter.total


def machine_limit(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOP/s of the fastest among a square product and two wide convolutions, each the best of some tries."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    x = torch.randn(16, 512, 16, 16, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernels = [torch.randn(512, 512, n, n, device=device, dtype=dtype) for n in (1, 3)]
    runs: list[Callable[[], Any]] = [lambda: a @ b]
    runs += [lambda k=k: F.conv2d(x, k.contiguous(memory_format=torch.channels_last)) for k in kernels]
    best = 0.0
    with torch.no_grad():
        for run in runs:
            flops = flops_of(run)
            for _ in range(6):
                began = clock()
                run()
                best = max(best, flops / (clock() - began))
    return best


def compare(kind: str, resolution: int, batch: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every pass and side."""
    device = torch.device(arguments.device)
    clock = stopwatch(device)
    sides, layers, width = sides_of(kind, resolution, arguments)
    w = torch.randn(batch, layers, width, generator=torch.Generator().manual_seed(1)).to(device)
    limits = {dtype: machine_limit(device, dtype, clock) for dtype in (torch.float32, torch.bfloat16)}
    first = next(iter(sides))
    rows = []
    for backward in (False, True):
        runs = {name: lambda side=side, b=backward: passes(side, w, b) for name, side in sides.items()}
        flops = {name: flops_of(run) for name, run in runs.items() if "compiled" not in name}
        if kind == "stylegan2" and "peer" in flops:
            # the counter takes the weight gradients of its grouped convolutions for as many times the work as there are images
            flops["peer"] = flops["reference"]
        seconds = alternate({**runs, f"{first} again (A/A)": runs[first]}, arguments.rounds, clock)
        for name, times in seconds.items():
            plain = name.split()[0]
            rate = flops[plain] / float(np.median(times))
            low, middle, high = quartiles(times / seconds[first])
            rows.append(
                {
                    "kind": kind,
                    "resolution": resolution,
                    "batch": batch,
                    "pass": "forward + backward to w" if backward else "forward",
                    "side": name,
                    "seconds": float(np.median(times)),
                    "images_per_second": batch / float(np.median(times)),
                    "gflop_per_image": flops[plain] / batch / 1e9,
                    "tflop_per_second": rate / 1e12,
                    "share_of_limit": rate / limits[torch.bfloat16 if plain == "bf16" else torch.float32],
                    "ratio_to": first,
                    "ratio": middle,
                    "ratio_quartiles": [low, high],
                    "rounds": arguments.rounds,
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows of one comparison as a table."""
    top = rows[0]
    print(f"\n{top['kind']} {top['resolution']}x{top['resolution']}, batch {top['batch']}; ratios to: {top['ratio_to']}")
    print(f"{'pass':24} {'side':24} {'images/s':>9} {'GFLOP/image':>12} {'TFLOP/s':>8} {'of limit':>8}  ratio (quartiles)")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"{row['pass']:24} {row['side']:24} {row['images_per_second']:9.2f} {row['gflop_per_image']:12.1f} "
            f"{row['tflop_per_second']:8.3f} {row['share_of_limit']:8.0%}  {row['ratio']:.3f} ({low:.3f} to {high:.3f})",
            flush=True,
        )


def quartiles(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.quantile(values, (0.25, 0.5, 0.75))]


def add_batch(parser: argparse.ArgumentParser, what: str) -> None:
    """The option that `batch_at` reads."""
    parser.add_argument("--batch", nargs="+", default=["16", "256:4"], help=f"images a {what}; RESOLUTION:IMAGES for one size")


def batch_at(resolution: int, arguments: argparse.Namespace) -> int:
    """Images of this resolution at a time."""
    sizes = dict(entry.split(":") for entry in arguments.batch if ":" in entry)
    common = next((entry for entry in arguments.batch if ":" not in entry), "16")
    return int(sizes.get(str(resolution), common))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=["stylegan1", "stylegan2"], default=["stylegan1", "stylegan2"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[64, 256], help="image sizes in pixels")
    add_batch(parser, "pass")
    parser.add_argument("--channel-base", type=int, help="feature channels at resolution r are this / r; default as published")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one operation")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of our sides too")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--stylegan1-code", type=Path, help="clone of genforce/higan or genforce/interfacegan")
    parser.add_argument("--nvlabs-code", type=Path, help="clone of NVlabs/stylegan2-ada-pytorch")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    prepared(arguments)
    rows = []
    for kind in arguments.kinds:
        for resolution in arguments.resolutions:
            part = compare(kind, resolution, batch_at(resolution, arguments), arguments)
            show(part)
            rows += part
    record(arguments, rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
