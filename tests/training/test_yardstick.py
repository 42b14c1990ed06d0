"""What trials are judged by: the suite's own numbers, shared out over workers, and the same whatever a trial trains on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dmat_ray.config import ClassifierConfig, Config, EvaluationConfig, TrainingConfig
from dmat_ray.data.epochs import InMemory, held_out_positions
from dmat_ray.data.manifold_set import ManifoldSet, open_set
from dmat_ray.evaluation.evaluation import Evaluator, evaluate_here
from dmat_ray.evaluation.metrics import Results
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators
from dmat_ray.manifold.stylegan2 import StyleGAN2
from dmat_ray.models import checkpoint
from dmat_ray.networks import classifiers
from dmat_ray.training import trainer, yardstick
from dmat_ray.training.yardstick import PREFIX, Yardstick

MakeConfig = Callable[..., Config]
SUITE = EvaluationConfig.model_validate(
    {
        "attacks": [
            {"threat": "clean", "name": "clean"},
            {"threat": "image", "name": "linf", "eps": 0.1, "steps": 3},
            {"threat": "latent", "name": "latent", "eps": 0.5, "steps": 2},
            {"threat": "image", "name": "one", "eps": 0.03, "steps": 1, "group": "both"},
            {"threat": "image", "name": "two", "eps": 0.05, "steps": 2, "group": "both"},
        ],
        "summaries": [
            {"name": "mean", "how": "mean", "of": ["linf", "latent"]},
            {"name": "worst", "how": "worst", "of": ["linf", "latent", "both"]},
        ],
        "sets": ["on_manifold"],
        "batch_size": 7,
    }
)


class Worker(LocalContext):
    """One of several, whose sums are taken by hand."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        super().__init__(folder)
        self.rank, self.world_size = rank, world_size
        self.sums = torch.zeros(0)

    def average_(self, tensors):
        self.sums = tensors[0].clone()


@pytest.fixture(scope="module")
def data(set_folder: Path) -> ManifoldSet:
    return open_set(set_folder, "train")


@pytest.fixture(scope="module")
def network(data: ManifoldSet) -> nn.Module:
    torch.manual_seed(0)
    return classifiers.build(ClassifierConfig(name="digits_cnn"), data.natural.shape[1], len(data.class_names)).eval()


def test_columns_are_those_of_the_suites_table() -> None:
    assert yardstick.columns(SUITE) == ["clean", "linf", "latent", "both", "mean", "worst"]


def test_its_numbers_are_those_of_an_evaluation(data, network, generator, tmp_path) -> None:
    found = Yardstick(SUITE, data, generator)(network, LocalContext(tmp_path))
    evaluator = Evaluator(SUITE, data, generator, lambda _: network, ["m"], torch.device("cpu"))
    results = Results(evaluate_here(evaluator), SUITE)
    assert found == pytest.approx(
        {f"{PREFIX}{c}": results.accuracy("m", "on_manifold", c).value for c in yardstick.columns(SUITE)}
    )
    assert found[f"{PREFIX}worst"] <= min(found[f"{PREFIX}linf"], found[f"{PREFIX}latent"], found[f"{PREFIX}both"])


@pytest.mark.parametrize("count", [2, 3])
def test_workers_share_it_out(data, network, generator, tmp_path, count) -> None:
    source = InMemory(data, TrainingConfig(val_examples=len(data) - 1))
    held_out = source.held_out(0, 1)
    assert held_out is not None
    alone = Yardstick(SUITE, held_out, generator)(network, LocalContext(tmp_path))
    workers = [Worker(tmp_path, rank, count) for rank in range(count)]
    for worker in workers:
        part = source.held_out(worker.rank, count)
        assert part is not None
        Yardstick(SUITE, part, generator)(network, worker)
    total = torch.stack([worker.sums for worker in workers]).sum(dim=0)
    assert total[-1] == len(held_out) == len(data) - 1
    assert dict(zip(alone, (total / total[-1]).tolist(), strict=False)) == pytest.approx(alone)


def test_a_worker_without_examples_adds_nothing(data, network, generator, tmp_path) -> None:
    worker = Worker(tmp_path, 2, 3)
    part = InMemory(data, TrainingConfig(val_examples=2)).held_out(worker.rank, worker.world_size)
    assert part is not None
    Yardstick(SUITE, part, generator)(network, worker)
    assert worker.sums.tolist() == [0.0] * len(worker.sums)


def test_a_training_is_judged_on_its_held_out_examples(
    data: ManifoldSet, generator: StyleGAN2, generator_folder: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """What the last epoch reports is what an evaluation of the saved model gives; and training is the same without."""
    config = make_config(training={"val_examples": 9})
    sha = generators.fingerprint(str(generator_folder))
    for name, suite in (("judged", SUITE), ("plain", None)):
        (tmp_path / name).mkdir()
        metrics = trainer.train(config, data, generator, sha, LocalContext(tmp_path / name), judged_by=suite)
        if suite is not None:
            judged = {key.removeprefix(PREFIX): found for key, found in metrics.items() if key.startswith(PREFIX)}
    models = {name: checkpoint.load_classifier(tmp_path / name / "checkpoint")[0] for name in ("judged", "plain")}
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models.values()), strict=True))
    held_out = data.take(held_out_positions(len(data), config.training)[1])
    evaluator = Evaluator(SUITE, held_out, generator, lambda _: models["judged"], ["m"], torch.device("cpu"))
    results = Results(evaluate_here(evaluator), SUITE)
    assert judged == pytest.approx({c: results.accuracy("m", "on_manifold", c).value for c in yardstick.columns(SUITE)})


@pytest.mark.slow
def test_a_branch_goes_on_from_anothers_weights_with_its_own_settings(
    data: ManifoldSet, generator: StyleGAN2, generator_folder: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    """The same as if the settings had been changed in the middle of one training."""
    sha = generators.fingerprint(str(generator_folder))

    def config(name: str, eps: float, epochs: int, decay: float = 0.0, ema: float = 0.0) -> Config:
        values = make_config(name=name).to_json()
        values["objective"]["image"]["eps"] = eps
        values["training"] |= {"epochs": epochs, "lr_epochs": [0, 4], "lr_values": [0.05, 0.05]}
        values["training"] |= {"weight_decay": decay, "ema_decay": ema}
        return Config.model_validate(values)

    def train(one: Config, folder: str, branch_from: Path | None = None) -> dict[str, torch.Tensor]:
        (tmp_path / folder).mkdir(exist_ok=True)
        context = LocalContext(tmp_path / folder)
        trainer.train(one, data, generator, sha, context, branch_from=branch_from)
        return dict(checkpoint.load_classifier(tmp_path / folder / "checkpoint")[0].state_dict())

    train(config("donor", 0.1, 2), "donor")
    donor = tmp_path / "donor" / "checkpoint"
    run = checkpoint.read_run(donor)
    branched = train(config("heir", 0.02, 4), "heir", donor)
    heir = checkpoint.read_run(tmp_path / "heir" / "checkpoint")
    assert [m["epoch"] for m in heir["history"]] == [1, 2, 3, 4]
    assert heir["history"][:2] == run["history"]
    (ancestor,) = heir["lineage"]
    assert (ancestor["name"], ancestor["epoch"], ancestor["settings"]["objective.image.eps"]) == ("donor", 2, 0.1)

    # by hand: the donor's checkpoint, said to be of the new settings from the start, and unfinished
    by_hand = tmp_path / "by_hand" / "checkpoint"
    by_hand.mkdir(parents=True)
    for file in (checkpoint.MODEL, checkpoint.STATE):
        (by_hand / file).write_bytes((donor / file).read_bytes())
    settings = config("heir", 0.02, 4).to_json()
    checkpoint.seal(by_hand, checkpoint.RUN, {**run, "config": settings, "finished": False})
    same = train(config("heir", 0.02, 4), "by_hand")
    assert all(torch.equal(branched[key], same[key]) for key in branched)
    changes: dict[str, dict[str, float]] = {"eps": {"eps": 0.1}, "decay": {"decay": 0.1}, "average": {"ema": 0.9}}
    for name, changed in changes.items():
        other = train(config("heir", **{"eps": 0.02, "epochs": 4, **changed}), name, donor)
        assert any(not torch.equal(branched[key], other[key]) for key in branched), name
