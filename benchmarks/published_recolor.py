"""Record what the authors' ReColorAdv makes of given knots, how far it moves uniform greys, and how strong their StAdv is.

    python benchmarks/published_recolor.py --recoloradv DIR [--output tests/published]

DIR is a clone of cassidylaidlaw/ReColorAdv (the code of arXiv 1906.00001). It is imported and run in this process: it is the
reader's own, no part of dmat_ray. tests/threats/test_published_attacks.py holds ours against recolor.npz, and against stadv.json:
how many of 200 digits stand under its StAdv as arXiv 2006.12655 calls it, a margin of the logits less a share of the flow's
roughness.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published_code import TESTS, digit_network, digits, published
from torch import Tensor, nn

from dmat_ray.config.evaluation import ROWS
from dmat_ray.errors import UserError
from dmat_ray.types import Batch

EPS, GRID = 0.06, (4, 5, 6)
GREYS, STARTS, STEPS, STEP = (0.0, 0.01, 0.02, 0.05, 0.1, 0.3, 0.6), 4, 30, 0.02
COUNT, STADV_STEPS = 200, 20
STADV = {"standard": 0.02, "robust": 0.035}  # radii that leave a part of a network's digits


def transform(code: Callable[[str], Any], x: Tensor, grid: tuple[int, int, int]) -> Any:
    """Their map of colours, which moves none yet."""
    space = code("recoloradv.color_spaces").CIELUVColorSpace()
    sides = dict(zip(("resolution_x", "resolution_y", "resolution_z"), grid, strict=True))
    found = code("recoloradv.color_transformers").FullSpatial(shape=x.shape, cspace=space, manual_gpu=False, **sides)
    found.use_gpu = False
    return found


def images(one: Any, x: Tensor) -> Tensor:
    """Those of a map."""
    found: Tensor = one.cspace.to_rgb(one.forward(one.cspace.from_rgb(x)))
    return found


def rise(code: Callable[[str], Any], grey: float, channel: int) -> float:
    """How far their search raises a channel of a uniform image, of some starts the best."""
    x, best = torch.full((1, 3, 2, 2), grey), -1.0
    for seed in range(STARTS):
        one = transform(code, x, (16, 32, 32))
        start = torch.rand(one.xform_params.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        one.xform_params.data += EPS * start
        one.project_params("inf", [EPS] * 3)
        for _ in range(STEPS):
            moved = (images(one, x) - x)[:, channel].mean()
            best = max(best, moved.item())
            (gradient,) = torch.autograd.grad(moved, one.xform_params)
            one.xform_params.data += STEP * torch.nan_to_num(gradient).sign()
            one.project_params("inf", [EPS] * 3)
    return best


def standing(code: Callable[[str], Any], network: nn.Module, batch: Batch, eps: float) -> int:
    """How many digits the network gets right under their StAdv."""
    losses, shift = code("recoloradv.mister_ed.loss_functions"), code("recoloradv.mister_ed.spatial_transformers").FullSpatial
    moves = code("recoloradv.mister_ed.adversarial_perturbations")
    flow = {"lp_style": "inf", "lp_bound": eps, "xform_class": shift, "use_stadv": True}
    margin = losses.CWLossF6(network, nn.Identity(), kappa=float("inf"))
    parts = {"margin": margin, "roughness": losses.PerturbationNormLoss(lp=2)}
    loss = losses.RegularizedLoss(parts, {"margin": 1.0, "roughness": 0.0025 / eps}, negate=True)
    threat = moves.ThreatModel(moves.ParameterizedXformAdv, flow)
    attack = code("recoloradv.mister_ed.adversarial_attacks").PGD(network, nn.Identity(), threat, loss, manual_gpu=False)
    found = attack.attack(
        batch.x_BCHW, batch.y_B, num_iterations=STADV_STEPS, signed=False, verbose=False, optimizer_kwargs={"lr": 0.01}
    )
    with torch.no_grad():
        return int((network(found(batch.x_BCHW).clamp(0, 1)).argmax(dim=1) == batch.y_B).sum())


def strength(code: Callable[[str], Any]) -> dict[str, Any]:
    """Our rows, each with its classifier and the number of digits that stand under theirs."""
    batch, rows = digits(COUNT), []
    for name, eps in STADV.items():
        left = standing(code, digit_network(name).requires_grad_(False), batch, eps)
        print(f"stadv {eps}: {left} of {COUNT} stand on {name}", flush=True)
        row = ROWS["stadv"](name=f"stadv {name}", eps=eps, steps=STADV_STEPS)
        rows.append({"network": name, "row": row.model_dump(), "standing": left})
    return {"ids": list(batch.id), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recoloradv", type=Path, required=True, help="clone of cassidylaidlaw/ReColorAdv")
    parser.add_argument("--output", type=Path, default=TESTS / "published", help="folder to write to")
    arguments = parser.parse_args()
    code = published(arguments.recoloradv, ["recoloradv"])
    rng = torch.Generator().manual_seed(0)
    # colours whose moves stay in sRGB: others are clipped in another way here
    x = 0.35 + 0.3 * torch.rand(2, 3, 16, 16, generator=rng)
    theta = EPS * (torch.rand(2, 3, *GRID, generator=rng) * 2 - 1)
    one = transform(code, x, GRID)
    one.xform_params.data += theta.permute(0, 2, 3, 4, 1)
    with torch.no_grad():
        found = {"x": x.numpy(), "theta": theta.numpy(), "images": images(one, x).numpy()}
    found |= {"greys": np.array(GREYS), "rises": np.array([[rise(code, grey, c) for c in range(3)] for grey in GREYS])}
    print(found["rises"].round(3))
    np.savez_compressed(arguments.output / "recolor.npz", **found)
    (arguments.output / "stadv.json").write_text(json.dumps(strength(code), indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
