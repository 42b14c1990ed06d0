"""What does PGD-5 on a ResNet cost beside its bare passes and beside published attack libraries?

    python benchmarks/attack.py [--networks resnet50 resnet18] [--sizes 128 64] [--batch 16] [--peers DIR]
        [--sides bare ours foolbox ...] [--device cuda] [--threads 1] [--rounds 7] [--json FILE]

L-infinity, radius 4/255, five steps of 1/255, random start, cross entropy to the label, in eval mode. The network has random
weights and the batch statistics of one pass over noise. Sides:

- bare: five times forward and gradient to the input, in float32, and nothing else: the bound all are held against. "bare
  channels_last" is the same in that layout, which says how much of a difference is the layout's.
- plain: `attack` on the network itself, as evaluation calls it (with the measurement of what was reached).
- ours float32, ours bf16: as training runs it: `AttackView`, refreshed once an attack, and no measurement.
- foolbox (its `run`, without the evaluation that a call adds), torchattacks, ART, advertorch: with the parameters as a user has
  them, requires_grad on, and "frozen". What a call of theirs does besides is in their times: ART goes through NumPy and measures
  success at the end.

All but foolbox come from a folder of their own, which takes its place behind the project's packages; they are installed without
what they depend on, most of which is here already, and those that are missing are left out:

    uv pip install --target DIR --no-deps torchattacks adversarial-robustness-toolbox advertorch

advertorch imports a function that torch has no longer, for an attack that is not used here: it gets a stand-in.

Ratios are medians over rounds, with quartiles; how they are taken and why the script starts itself again is said in
benchmarks/generator.py. "A/A" runs the first side twice and shows the noise. The best peer is the one with the smallest median.
The last columns say what the attacks did: the network's mean loss on their images, and how far these are from the originals.
"""

import argparse
import copy
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from generator import alternate, prepared, quartiles, record, stopwatch
from torch import Tensor, nn

from dmat_ray.attack import attack, frozen
from dmat_ray.config import ClassifierConfig, ImageTerm
from dmat_ray.errors import UserError
from dmat_ray.networks import classifiers
from dmat_ray.networks.attack_view import AttackView
from dmat_ray.threats.image import ImageBall
from dmat_ray.types import Batch

EPS, STEP, STEPS, CLASSES = 4 / 255, 1 / 255, 5, 10
TERM = ImageTerm(weight=1.0, eps=EPS, step_size=STEP, steps=STEPS)
PEERS = ("foolbox", "torchattacks", "ART", "advertorch")
# of the time of: the best peer, ART
GOALS = {("ours float32", "best peer"): 0.85, ("ours bf16", "best peer"): 0.53, ("ours float32", "ART"): 0.5}
Attack = Callable[[], Any]


def settled(name: str, x_BCHW: Tensor) -> nn.Module:
    """A network with random weights in eval mode, whose running statistics are those of these images."""
    torch.manual_seed(0)
    network = classifiers.build(ClassifierConfig(name=name), 3, CLASSES).to(x_BCHW.device).train()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network(x_BCHW)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    return network.eval()


def bare(network: nn.Module, batch: Batch, layout: torch.memory_format) -> Attack:
    """The passes of an attack."""
    network = copy.deepcopy(network).requires_grad_(False).to(memory_format=layout)
    x = batch.x_BCHW.contiguous(memory_format=layout)

    def run() -> None:
        for _ in range(STEPS):
            images = x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(network(images), batch.y_B, reduction="sum"), images)

    return run


def ours(network: nn.Module, batch: Batch, term: ImageTerm, dtype: torch.dtype | None) -> Attack:
    """`attack` on the network, or on a view of it in `dtype`."""
    threat = ImageBall(term)
    if dtype is None:
        return lambda: attack(network, threat, batch, term, seed=0, purpose="benchmark").x_BCHW
    view = AttackView(network, dtype)

    def run() -> Tensor:
        view.refresh()
        return attack(view, threat, batch, term, seed=0, purpose="benchmark", measure=False).x_BCHW

    return run


def by_foolbox(network: nn.Module, batch: Batch) -> Attack:
    import foolbox

    model = foolbox.PyTorchModel(network, bounds=(0, 1), device=batch.x_BCHW.device)
    pgd = foolbox.attacks.LinfPGD(steps=STEPS, abs_stepsize=STEP, random_start=True)
    criterion = foolbox.criteria.Misclassification(batch.y_B)
    return lambda: pgd.run(model, batch.x_BCHW, criterion, epsilon=EPS)


def by_torchattacks(network: nn.Module, batch: Batch) -> Attack:
    pgd = importlib.import_module("torchattacks").PGD(network, eps=EPS, alpha=STEP, steps=STEPS, random_start=True)
    return lambda: pgd(batch.x_BCHW, batch.y_B)


def by_art(network: nn.Module, batch: Batch) -> Attack:
    classification, evasion = (
        importlib.import_module(f"art.{part}") for part in ("estimators.classification", "attacks.evasion")
    )
    logging.getLogger("art").setLevel(logging.ERROR)
    classifier = classification.PyTorchClassifier(
        network,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(batch.x_BCHW.shape[1:]),
        nb_classes=CLASSES,
        clip_values=(0.0, 1.0),
        device_type="gpu" if batch.x_BCHW.device.type == "cuda" else "cpu",
    )
    pgd = evasion.ProjectedGradientDescent(
        classifier, eps=EPS, eps_step=STEP, max_iter=STEPS, num_random_init=1, batch_size=len(batch), verbose=False
    )
    x, y = batch.x_BCHW.cpu().numpy(), batch.y_B.cpu().numpy()
    return lambda: torch.from_numpy(pgd.generate(x, y))


def by_advertorch(network: nn.Module, batch: Batch) -> Attack:
    # the attribute of this name is a function
    gradcheck = importlib.import_module("torch.autograd.gradcheck")
    if not hasattr(gradcheck, "zero_gradients"):
        gradcheck.zero_gradients = None
    pgd = importlib.import_module("advertorch.attacks").LinfPGDAttack(network, eps=EPS, nb_iter=STEPS, eps_iter=STEP)
    return lambda: pgd.perturb(batch.x_BCHW, batch.y_B)


def peers_of(network: nn.Module, batch: Batch, wanted: Callable[[str], bool]) -> dict[str, Attack]:
    """The peers that can be imported, each on copies of the network."""
    makers = dict(zip(PEERS, (by_foolbox, by_torchattacks, by_art, by_advertorch), strict=True))
    sides: dict[str, Attack] = {}
    for name, make in makers.items():
        for side, learns in ((name, True), (f"{name} frozen", False)):
            if not wanted(side):
                continue
            try:
                sides[side] = make(copy.deepcopy(network).requires_grad_(learns), batch)
            except ImportError as error:
                print(f"{name} is left out: {error}")
                break
    return sides


def sides_of(network: nn.Module, batch: Batch, arguments: argparse.Namespace) -> dict[str, Attack]:
    """What is compared, bare passes first."""

    def wanted(side: str) -> bool:
        return side == "bare" or not arguments.sides or any(side.startswith(part) for part in arguments.sides)

    makers: dict[str, Callable[[], Attack]] = {
        "bare": lambda: bare(network, batch, torch.contiguous_format),
        "bare channels_last": lambda: bare(network, batch, torch.channels_last),
        "plain": lambda: ours(network, batch, TERM, None),
        "ours float32": lambda: ours(network, batch, TERM, torch.float32),
        "ours bf16": lambda: ours(network, batch, TERM, torch.bfloat16),
    }
    sides = {name: make() for name, make in makers.items() if wanted(name)}
    return sides | peers_of(network, batch, wanted)


def agreement(network: nn.Module, batch: Batch) -> dict[str, float]:
    """Share of the input's gradient whose sign a view has as the network has it."""
    found = {}
    with frozen(network):
        for name, model in {
            "network": network,
            "float32": AttackView(network, torch.float32),
            "bf16": AttackView(network, torch.bfloat16),
        }.items():
            x = batch.x_BCHW.detach().requires_grad_()
            (found[name],) = torch.autograd.grad(F.cross_entropy(model(x), batch.y_B, reduction="sum"), x)
    truth = found.pop("network").sign()
    return {name: float((gradient.sign() == truth).float().mean()) for name, gradient in found.items()}


def outcome(network: nn.Module, batch: Batch, side: Attack) -> tuple[float, float] | None:
    """The network's mean loss on a side's images, and their largest distance from the originals in radii."""
    images = side()
    if images is None:
        return None
    images = images.detach().to(batch.x_BCHW)
    with torch.no_grad():
        loss = F.cross_entropy(network(images), batch.y_B)
    return float(loss), float((images - batch.x_BCHW).abs().max()) / EPS


def compare(name: str, size: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every side, printed."""
    device, count = torch.device(arguments.device), arguments.batch
    network = settled(name, torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(2)).to(device))
    draws = torch.Generator().manual_seed(1)
    x, y = torch.rand(count, 3, size, size, generator=draws), torch.randint(CLASSES, (count,), generator=draws)
    batch = Batch([f"example-{i}" for i in range(count)], x, y).to(device)
    with torch.no_grad():
        clean = float(F.cross_entropy(network(batch.x_BCHW), batch.y_B))
    print(f"\nPGD-{STEPS} on {name}, {size}x{size}, batch {count}; mean loss of the images themselves {clean:.4f}")
    sides = sides_of(network, batch, arguments)
    seconds = alternate({**sides, "bare again (A/A)": sides["bare"]}, arguments.rounds, stopwatch(device))
    peers = [side for side in sides if side.startswith(PEERS)]
    bases = {"bare": "bare"}
    if peers:
        bases["best peer"] = min(peers, key=lambda side: np.median(seconds[side]))
        print(f"best peer: {bases['best peer']}")
    if "ART" in sides:
        bases["ART"] = "ART"
    titles = "".join(f"{f'to {base}':24}" for base in bases)
    print(f"{'side':20} {'ms an image':>11}   {titles}{'loss':>7} {'distance / eps':>15}")
    rows = []
    for side, times in seconds.items():
        ratios = {base: quartiles(times / seconds[of]) for base, of in bases.items()}
        reached = outcome(network, batch, sides[side]) if side in sides else None
        milliseconds = float(np.median(times)) / count * 1000
        shown = "".join(f"{f'{middle:.3f} ({low:.3f} to {high:.3f})':24}" for low, middle, high in ratios.values())
        end = f"{reached[0]:7.4f} {reached[1]:15.5f}" if reached else ""
        print(f"{side:20} {milliseconds:11.1f}   {shown}{end}".rstrip(), flush=True)
        case = {"network": name, "size": size, "batch": count, "rounds": arguments.rounds}
        rows.append({**case, "side": side, "ms": milliseconds, "ratios": ratios, "bases": bases, "outcome": reached})
    signs = agreement(network, batch)
    print("signs of the input's gradient as the network has them: " + ", ".join(f"{k} {v:.2%}" for k, v in signs.items()))
    for (side, base), goal in GOALS.items():
        if side in seconds and base in bases:
            found = next(row for row in rows if row["side"] == side)["ratios"][base][1]
            print(f"goal: {side} at most {goal} of {base}: {found:.3f}, {'reached' if found <= goal else 'missed'}")
    return [{**row, "signs": signs} for row in rows]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50"], help="torchvision's names")
    parser.add_argument("--sizes", nargs="+", type=int, default=[128], help="image sizes in pixels")
    parser.add_argument("--batch", type=int, default=16, help="images an attack")
    parser.add_argument("--sides", nargs="+", help="only sides whose names begin like these, and bare; default all")
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
    rows = []
    for name in arguments.networks:
        for size in arguments.sizes:
            rows += compare(name, size, arguments)
    record(arguments, rows)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
