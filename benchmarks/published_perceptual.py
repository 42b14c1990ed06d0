"""Record how many digits stand under the perceptual attacks of arXiv 2006.12655 as their authors wrote them.

    python benchmarks/published_perceptual.py --perceptual-advex DIR [--output tests/published]

DIR is a clone of cassidylaidlaw/perceptual-advex. Its attacks are imported and run in this process, on the network that ours
judge by: they are the reader's own, no part of dmat_ray. What they end with is put into the budget by our projection, for theirs
ends a little outside. tests/threats/test_published_attacks.py holds ours against perceptual.json.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from published_code import TESTS, digit_network, digits
from torch import nn

from dmat_ray import threats
from dmat_ray.config import PerceptualThreat, Row
from dmat_ray.config.evaluation import ROWS
from dmat_ray.errors import UserError
from dmat_ray.threats.perceptual import PerceptualBall, _judge
from dmat_ray.types import Batch

PerceptualRow = ROWS["perceptual"]
COUNT, STEPS = 40, 10
# which leave a part of one network's digits at least
EPS = {"pgd": 0.12, "lagrange": 0.18, "lpa": 0.12}
ATTACKS = {"pgd": "PerceptualPGDAttack", "lagrange": "FastLagrangePerceptualAttack", "lpa": "LagrangePerceptualAttack"}


def published(root: Path) -> ModuleType:
    """Their attacks, without what else their package imports: models, data sets and a library for training."""
    package = root / "perceptual_advex"
    if not (package / "perceptual_attacks.py").is_file():
        raise UserError(f"'{root}' is no clone of cassidylaidlaw/perceptual-advex")
    outer, models, utilities = (ModuleType(f"perceptual_advex{name}") for name in ("", ".models", ".utilities"))
    outer.__path__ = [str(package)]
    for name in ("AlexNetFeatureModel", "CifarAlexNet", "FeatureModel"):
        setattr(models, name, object)
    text = (package / "utilities.py").read_text()
    margin = text[text.index("class MarginLoss") :].split("\ndef ")[0]
    exec("import torch\nfrom torch import nn\n" + margin, vars(utilities))  # the reader's own clone, named on the command line
    outer.utilities = utilities  # type: ignore[attr-defined]  # as an import would
    sys.modules |= {module.__name__: module for module in (outer, models, utilities)}
    return importlib.import_module("perceptual_advex.perceptual_attacks")


class Features(nn.Module):
    """Our network, as their attacks ask for it."""

    def features(self, x_BCHW: torch.Tensor) -> Any:
        return _judge("alex", "random", torch.float32, torch.device("cpu")).maps(x_BCHW)


def standing(code: ModuleType, network: nn.Module, batch: Batch, method: str) -> int:
    """How many digits the network gets right under theirs."""
    torch.manual_seed(0)
    how: dict[str, Any] = {"num_iterations": STEPS, "lpips_model": Features()}
    attack = getattr(code, ATTACKS[method])(network, bound=EPS[method], projection="bisection", **how).eval()
    images = attack(batch.x_BCHW.clone(), batch.y_B).clamp(0, 1)
    ball = threats.build(PerceptualThreat(eps=EPS[method], weights="random"), None)
    assert isinstance(ball, PerceptualBall)
    with torch.no_grad():
        images = ball.render(batch, ball.project(batch, images - batch.x_BCHW))
        return int((network(images).argmax(dim=1) == batch.y_B).sum())


def row_of(method: str) -> Row:
    """Ours; theirs counts the steps of a round."""
    steps = 5 * STEPS if method == "lpa" else STEPS
    step = EPS[method] * 2 / STEPS if method == "pgd" else None  # their default
    return PerceptualRow(name=ATTACKS[method], eps=EPS[method], steps=steps, step_size=step, method=method, weights="random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perceptual-advex", type=Path, required=True, help="clone of cassidylaidlaw/perceptual-advex")
    parser.add_argument("--output", type=Path, default=TESTS / "published", help="folder to write to")
    arguments = parser.parse_args()
    code, batch, rows = published(arguments.perceptual_advex), digits(COUNT), []
    for name in ("standard", "robust"):
        network = digit_network(name).requires_grad_(False)
        for method in ATTACKS:
            left = standing(code, network, batch, method)
            print(f"{ATTACKS[method]}: {left} of {COUNT} stand on {name}", flush=True)
            rows.append({"network": name, "row": row_of(method).model_dump(), "standing": left})
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "perceptual.json").write_text(json.dumps({"ids": list(batch.id), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
