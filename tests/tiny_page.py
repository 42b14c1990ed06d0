"""An evaluation of small networks that has everything a page can show, for tests of the page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from galleries import gallery_here

from dmat_ray.config import Config
from dmat_ray.data.manifold_set import open_set
from dmat_ray.evaluation import checks, evaluation, probes
from dmat_ray.evaluation.checks import Finding
from dmat_ray.evaluation.evaluation import Evaluator
from dmat_ray.evaluation.metrics import Results
from dmat_ray.manifold import generators
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.reports import report

PGD, GROUP, WORST = "PGD [fast] <5>", "one|two & <more>", "worst *of* `two`"
EVALUATION: dict[str, Any] = {
    "attacks": [
        {"threat": "clean", "name": "clean"},
        {"threat": "image", "name": PGD, "eps": 0.03, "steps": 3, "curve": [0.01, 0.06]},
        {"threat": "image", "name": "PGD L2", "norm": "l2", "eps": 0.2, "steps": 3},
        {"threat": "image", "name": "one", "eps": 0.02, "steps": 2, "group": GROUP},
        {"threat": "image", "name": "two", "eps": 0.04, "steps": 2, "group": GROUP},
        {"threat": "latent", "name": "OM-PGD", "eps": 0.3, "steps": 2},
    ],
    "summaries": [
        {"name": WORST, "how": "worst", "of": [PGD, "OM-PGD"]},
        {"name": "mean", "how": "mean", "of": [PGD, GROUP, "OM-PGD"]},
    ],
    "transfer": [PGD, "OM-PGD"],
}
MODELS = ["at", "dmat & <more>"]
TITLE = "tiny <page>"
WARNING = Finding(MODELS[0], "noise", "warning", "<PGD> leaves 50.0%, mere noise & luck 40.0%")
HISTORY = [{"epoch": e, "train_loss": 1 / e, "val_clean": 0.5, "val_image": 0.1 * e} for e in (1.0, 2.0, 3.0)]


@dataclass(frozen=True)
class Written:
    """A page, and what it was made of."""

    path: Path
    results: Results
    findings: list[Finding]
    measurements: list[dict[str, Any]]
    models: dict[str, Path]

    @property
    def html(self) -> str:
        return self.path.read_text()


def save_models(root: Path, config: Config, set_folder: Path, names: list[str], *, history: bool) -> dict[str, Path]:
    """Networks that know most of the set, each a little less than the one before, saved as if trained."""
    data = open_set(set_folder, "test")
    batch = data.batch(np.arange(len(data)), "natural")
    run = checkpoint.describe_run(config, data.class_names, 1, 8, data.manifest["generator_sha256"], data.sha256)
    for seed in range(len(names)):
        torch.manual_seed(seed)
        network = classifiers.build(config.classifier, 1, 3)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
        for _ in range(60 // (1 + seed)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(batch.x_BCHW), batch.y_B).backward()
            optimizer.step()
        checkpoint.save(root / str(seed), network, {**run, "history": HISTORY} if history else run)
    return {name: root / str(seed) for seed, name in enumerate(names)}


def write_page(
    folder: Path, config: Config, set_folder: Path, names: list[str], *, history: bool = True, check: bool = True
) -> Written:
    """Evaluate such networks, check them, and write their page to `folder`."""
    models = save_models(folder / "models", config, set_folder, names, history=history)
    data, generator = open_set(set_folder, "test"), generators.load_configured(config.generator)
    evaluator = Evaluator(
        config.evaluation, data, generator, lambda name: checkpoint.load_classifier(models[name])[0], names, torch.device("cpu")
    )
    results = Results(evaluation.evaluate_here(evaluator), config.evaluation)
    looks = probes.units(names, config.evaluation, np.arange(len(data))) if check else []
    measurements = probes.joined((unit, probes.probe(evaluator, unit)) for unit in looks)
    findings = [WARNING, *checks.judge(results, measurements)] if check else []
    path = folder / "page" / "report.html"
    report.write(config, set_folder, models, results, (measurements, findings), path, gallery_here(config, set_folder, models))
    return Written(path, results, findings, measurements, models)
