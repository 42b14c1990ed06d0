"""How many examples a second does an evaluation attack, beside public attack code at equal settings?

    python benchmarks/evaluation.py --advex-uar DIR [--peers DIR] [--networks resnet50 digits] [--size 96] [--batch 16]
        [--steps 10] [--attacks fog snow ...] [--device cuda] [--threads 1] [--rounds 7] [--json FILE]

Attacks: PGD in L-infinity and L2, and the unseen attacks of arXiv 1908.08016. Sides, each attacking the same images of the same
network, with the same budget, steps and length of a step, and judging at the end which images stand:

- ours: `attack` on `AttackView`, which is made once for all batches of a network, as evaluation does.
- advex-uar: the authors' code (--advex-uar, a clone of ddkang/advex-uar, imported by path).
- foolbox and torchattacks: PGD only; torchattacks comes from a folder of its own (--peers, see benchmarks/attack.py).

Peers run as a user gets them, with the network's parameters as they are after loading (requires_grad on); advex-uar is spared the
normalisation that its call undoes and redoes. Its fog fits images of 32, 96 and 224 pixels alone.

Networks: torchvision's names, with random weights and the predictions on random images as labels, so that all of these stand
before an attack; or `digits`, the robust classifier under tests/classifiers with 32x32 test digits.

Ratios are a peer's time by ours, medians over rounds with quartiles, above 1 where ours is faster; how times are taken and why
the script starts itself again is said in benchmarks/generator.py. "A/A" is our side once more, and shows the noise. "Standing" is
the share of the examples that the network itself still gets right on the images of a side.
"""

import argparse
import copy
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from attack import settled
from generator import alternate, prepared, quartiles, record, stopwatch
from published_code import ElasticRow, GaborRow, JpegRow, SnowRow, advex_attack, advex_uar, digit_network, digits, run_advex
from torch import Tensor, nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.config import FogRow, ImageRow, Row
from dmat_ray.errors import UserError
from dmat_ray.networks.attack_view import AttackView
from dmat_ray.types import Batch

GOAL = 1.5
Side = Callable[[], Tensor]


def rows_of(steps: int) -> dict[str, Row]:
    """The attacks, with budgets as published; steps that cross their budgets 2.5 times over, but for snow's: its published last
    step is not projected, and long ones would end far outside.
    """
    how: dict[str, Any] = {"steps": steps}
    far = 2.5 / steps
    return {
        "linf": ImageRow(name="PGD Linf", eps=4 / 255, step_size=4 / 255 * far, **how),
        "l2": ImageRow(name="PGD L2", norm="l2", eps=600 / 255, step_size=600 / 255 * far, **how),
        "fog": FogRow(name="Fog", step_size=far, **how),
        "snow": SnowRow(name="Snow", step_size=math.sqrt(0.001 / steps), **how),
        "elastic": ElasticRow(name="Elastic", step_size=0.5 * far, **how),
        "gabor": GaborRow(name="Gabor", density=13 / 14, step_size=far, **how),  # as many places as theirs moves
        "jpeg": JpegRow(name="JPEG Linf", step_size=0.125 * far, **how),
    }


def subject(name: str, size: int, count: int) -> tuple[nn.Module, Batch]:
    """A network in eval mode with parameters as after loading, and images that it gets right."""
    if name == "digits":
        return digit_network("robust"), digits(count)
    draws = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, size, size, generator=draws)
    network = settled(name, x)
    with torch.no_grad():
        y = network(x).argmax(dim=1)
    return network, Batch([f"example-{i}" for i in range(count)], x, y)


def ours(network: nn.Module, batch: Batch, row: Row) -> Side:
    """As evaluation does."""
    view, threat = AttackView(network), threats.build(row, None)
    return lambda: attack(view, threat, batch, row, seed=0, purpose="benchmark").x_BCHW


def judged(network: nn.Module, make: Side) -> Side:
    """A side that puts its images through its network, as an evaluation must."""

    def run() -> Tensor:
        images = make()
        with torch.no_grad():
            network(images)
        return images

    return run


def by_foolbox(network: nn.Module, batch: Batch, row: ImageRow) -> Side:
    import foolbox

    model = foolbox.PyTorchModel(network, bounds=(0, 1), device=batch.x_BCHW.device)
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[row.norm]
    pgd = kind(steps=row.steps, abs_stepsize=row.step_size, random_start=True)
    return lambda: pgd(model, batch.x_BCHW, batch.y_B, epsilons=row.eps)[1]


def by_torchattacks(network: nn.Module, batch: Batch, row: ImageRow) -> Side:
    code = importlib.import_module("torchattacks")
    kind = {"linf": code.PGD, "l2": code.PGDL2}[row.norm]
    pgd = kind(network, eps=row.eps, alpha=row.step_size, steps=row.steps, random_start=True)
    return judged(network, lambda: pgd(batch.x_BCHW, batch.y_B))


def by_advex(code: ModuleType, network: nn.Module, batch: Batch, row: Row) -> Side:
    theirs = advex_attack(code, row, batch.x_BCHW.shape[-1])
    return judged(network, lambda: run_advex(theirs, network, batch).detach())


def sides_of(network: nn.Module, batch: Batch, row: Row, code: ModuleType | None) -> dict[str, Side]:
    """Ours and the peers that have such an attack and are here, each on its own copy of the network."""
    sides = {"ours": ours(network, batch, row)}
    if code is not None:
        sides["advex-uar"] = by_advex(code, copy.deepcopy(network), batch, row)
    if isinstance(row, ImageRow):
        for name, make in {"foolbox": by_foolbox, "torchattacks": by_torchattacks}.items():
            try:
                sides[name] = make(copy.deepcopy(network), batch, row)
            except ImportError as error:
                print(f"{name} is left out: {error}")
    return sides


def standing(network: nn.Module, batch: Batch, images: Tensor) -> float:
    with torch.no_grad():
        return float((network(images.detach().to(batch.x_BCHW)).argmax(dim=1) == batch.y_B).float().mean())


def compare(name: str, arguments: argparse.Namespace, code: ModuleType | None) -> list[dict[str, Any]]:
    """A row for every attack and side, printed."""
    device = torch.device(arguments.device)
    network, batch = subject(name, arguments.size, arguments.batch)
    network, batch = network.to(device), batch.to(device)
    size, count = batch.x_BCHW.shape[-1], len(batch)
    print(f"\n{name}, {size}x{size}, batch {count}, {arguments.steps} steps")
    print(f"{'attack':10} {'side':18} {'examples/s':>10}   {'by our time (quartiles)':26} standing")
    rows = []
    for row in (row for key, row in rows_of(arguments.steps).items() if key in arguments.attacks):
        sides = sides_of(network, batch, row, code)
        seconds = alternate({**sides, "ours again (A/A)": sides["ours"]}, arguments.rounds, stopwatch(device))
        for side, times in seconds.items():
            ratio, stand = quartiles(times / seconds["ours"]), None
            if side in sides:
                torch.manual_seed(0)
                stand = standing(network, batch, sides[side]())
            rate = count / float(np.median(times))
            shown = f"{ratio[1]:.3f} ({ratio[0]:.3f} to {ratio[2]:.3f})"
            print(f"{row.name:10} {side:18} {rate:10.2f}   {shown:26} {'' if stand is None else f'{stand:.1%}'}", flush=True)
            case = {"network": name, "size": size, "batch": count, "attack": row.model_dump(), "rounds": arguments.rounds}
            rows.append({**case, "side": side, "examples_per_second": rate, "ratio": ratio, "standing": stand})
        peers = [side for side in sides if side != "ours"]
        if peers:
            least = min(float(np.median(seconds[side] / seconds["ours"])) for side in peers)
            print(f"goal: {GOAL} times as fast as the fastest peer: {least:.2f}, {'reached' if least >= GOAL else 'missed'}")
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "digits"], help="torchvision's names, or digits")
    parser.add_argument("--size", type=int, default=96, help="side of an image in pixels (digits have 32)")
    parser.add_argument("--batch", type=int, default=16, help="images an attack")
    parser.add_argument("--steps", type=int, default=10, help="steps of an attack")
    parser.add_argument("--attacks", nargs="+", choices=list(rows_of(1)), default=list(rows_of(1)))
    parser.add_argument("--advex-uar", type=Path, help="clone of ddkang/advex-uar")
    parser.add_argument("--peers", type=Path, help="folder with the packages of the peers")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of one operation")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.peers and not arguments.peers.is_dir():
        raise UserError(f"--peers '{arguments.peers}' is no folder")
    prepared(arguments)
    if arguments.peers:
        sys.path.append(str(arguments.peers.resolve()))
    code = advex_uar(arguments.advex_uar, arguments.device) if arguments.advex_uar else None
    record(arguments, [row for name in arguments.networks for row in compare(name, arguments, code)])


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
