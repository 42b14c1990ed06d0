"""Train the two classifiers of digits that the tests attack: `python tests/classifiers/make.py`, some minutes on a CPU.

`standard` sees plain digits, `robust` digits under PGD in an L-infinity ball of 0.1. Both see the natural training split of the
embedded digits. Each folder holds model.safetensors and card.json, which says how it was made and what it reaches.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from dmat_ray import threats
from dmat_ray.attack import attack
from dmat_ray.config import AttackConfig, ClassifierConfig, Config, DataConfig, ImageThreat
from dmat_ray.data.reading import read_pixels
from dmat_ray.data.sources import list_examples
from dmat_ray.local import LocalContext
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.storage.files import write_json
from dmat_ray.training.schedules import learning_rate
from dmat_ray.training.step import TrainingStep
from dmat_ray.types import Batch

SEED = 0
EPS = 0.1
OBJECTIVES = {
    "standard": {"clean": {"weight": 1}},
    "robust": {"clean": {"weight": 0}, "image": {"weight": 1, "eps": EPS, "steps": 7, "step_size": 0.025}},
}
TRAINING = {
    "standard": {"epochs": 10},
    "robust": {"epochs": 30},
}
SHARED = {"batch_size": 100, "schedule": "one_cycle", "lr": 0.2, "weight_decay": 5e-4, "images": "natural", "seed": SEED}


def digits(split: str) -> Batch:
    """All digits of a split, 32x32."""
    config = DataConfig()
    rows = list_examples(config).rows(split)
    pixels = np.stack(read_pixels(rows, config))
    x = torch.from_numpy(pixels).float() / 255
    return Batch(rows["id"].to_pylist(), x, torch.from_numpy(rows["label"].to_numpy().copy()))


def trained(config: Config, data: Batch) -> nn.Module:
    """A classifier after all epochs of adversarial or plain training."""
    settings = config.training
    torch.manual_seed(SEED)
    network = classifiers.build(config.classifier, channels=1, num_classes=10)
    with TemporaryDirectory() as folder:
        step = TrainingStep(config, network, None, LocalContext(Path(folder)))
    rng, count = np.random.default_rng(SEED), len(data) // settings.batch_size
    for epoch in range(settings.epochs):
        network.train()
        order = torch.from_numpy(rng.permutation(len(data)))
        losses = []
        for k, rows in enumerate(order.tensor_split(count)):
            metrics = step(data.take(rows), epoch, k, learning_rate(settings, epoch + k / count))
            losses.append(float(metrics["loss"]))
        print(f"epoch {epoch + 1} of {settings.epochs}: loss {np.mean(losses):.4f}", flush=True)
    return network.eval()


def accuracies(network: nn.Module, data: Batch) -> dict[str, float]:
    """On test digits: clean, and under PGD-50."""
    found = attack(
        network,
        threats.build(ImageThreat(eps=EPS), None),
        data,
        AttackConfig(steps=50, step_size=0.01),
        seed=SEED,
        purpose="make",
    )
    with torch.no_grad():
        clean = network(data.x_BCHW).argmax(dim=1) == data.y_B
    return {"clean": float(clean.float().mean()), "pgd_50": float((~found.broken_B).float().mean())}


def main() -> None:
    """Train, measure and write both."""
    train, test = digits("train"), digits("test")
    for name, objective in OBJECTIVES.items():
        training = {**SHARED, **TRAINING[name]}
        config = Config.model_validate(
            {"classifier": ClassifierConfig(name="digits_cnn"), "objective": objective, "training": training}
        )
        network = trained(config, train)
        metrics = accuracies(network, test)
        print(f"{name}: {metrics}", flush=True)
        folder = Path(__file__).parent / name
        folder.mkdir(exist_ok=True)
        # training lays weights out channels last, which no file knows of
        weights = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(weights, folder / checkpoint.MODEL)
        write_json(
            folder / "card.json",
            {
                "command": f"python {' '.join(sys.argv)}",
                "seed": SEED,
                "classifier": "digits_cnn",
                "objective": objective,
                "training": training,
                "training_images": len(train),
                "test_images": len(test),
                "accuracy": metrics,
                "versions": checkpoint.versions(),
            },
        )


if __name__ == "__main__":
    main()
