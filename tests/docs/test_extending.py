"""The code of docs/extending.md is put where it says, in a copy of the package, and does what it says there."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from documents import ROOT, Block, blocks
from installed import install

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "extending.md"
FILES = {block.name: block for block in blocks(PAGE) if block.name and block.language in ("python", "yaml")}
DIFFS = blocks(PAGE, "diff")


def applied(text: str, hunk: list[str]) -> str:
    """A file with what a hunk adds and takes away; its lines must stand there once, the last one may be cut short."""
    before = "\n".join(line[1:] for line in hunk if line[0] != "+")
    after = "\n".join(line[1:] for line in hunk if line[0] != "-")
    assert text.count(before) == 1, f"{text.count(before)} times in the file:\n{before}"
    return text.replace(before, after)


def patch(block: Block, root: Path) -> None:
    first, *lines = block.text.splitlines()
    path = root / first.removeprefix(" # ")
    text = path.read_text()
    hunks: list[list[str]] = [[]]
    for line in lines:
        if line == "@@":
            hunks.append([])
        else:
            hunks[-1].append(line or " ")
    for hunk in hunks:
        text = applied(text, hunk)
    path.write_text(text)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with all that the page adds."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("dmat_ray", "jobs", "tests", "pyproject.toml"):
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, root / name, ignore=ignored) if source.is_dir() else shutil.copy(source, root / name)
    for name, block in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(block.text)
    for block in DIFFS:
        patch(block, root)
    return root


def run(root: Path, *arguments: str) -> str:
    """What a Python of the copy prints."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_what_it_promises() -> None:
    assert FILES.keys() >= {
        "mine/my_networks.py",
        "dmat_ray/threats/shade.py",
        "digit_decoder.py",
        "dmat_ray/data/small_digits.py",
        "my_space.py",
    }
    assert len(DIFFS) == 3
    longest = max(len(block.text.splitlines()) for block in FILES.values())
    assert longest <= 50, "short files"


def test_the_threat_passes_the_tests_of_all_threats(copy: Path) -> None:
    """Its budget under any gradient, its slope against finite differences, starts of parts of a batch."""
    path = copy / "tests" / "threats" / "test_threats.py"
    text = path.read_text()
    for old, new in (
        ('    "filter": FilterThreat(eps=0.2),', '    "filter": FilterThreat(eps=0.2),\n    "shade": ShadeThreat(eps=0.2),'),
        (
            "from dmat_ray.errors import UserError",
            "from dmat_ray.config.threats import ShadeThreat\nfrom dmat_ray.errors import UserError",
        ),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    told = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), "-k", "shade and not latent")
    passed = int(told.split(" passed")[0].split()[-1])
    assert passed >= 5, told


def test_the_network_is_trained_and_attacked(copy: Path) -> None:
    """Per-term batch norm and attacks take it like any other."""
    (project,) = blocks(PAGE, "toml")
    (module,) = tomllib.loads(project.text)["tool"]["setuptools"]["py-modules"]
    install(copy / "installed", project.text, **{module: FILES[f"mine/{module}.py"].text})
    found = json.loads(run(copy, "-c", NETWORK))
    assert found["name"] == "own/residual"
    assert all(0 < loss < 10 for loss in found["losses"])
    assert found["folded"] > 0, "the copy that attacks see has batch norm folded"
    assert found["away"] < 1e-4, "and is the network"
    assert found["apart"] > 1e-4, "terms have statistics of their own"
    assert found["attacked"] > found["clean"]


NETWORK = """
import json, sys
from pathlib import Path
sys.path[:0] = ["tests", "installed"]
import conftest, numpy as np, torch
from dmat_ray import build_threat, attack_images, cli
from dmat_ray.models import checkpoint
from dmat_ray.training import trainer
from dmat_ray.networks.attack_view import AttackView
from dmat_ray.data.manifold_set import open_set
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators

folder = Path("network")
generators.save_generator(folder / "generator", conftest.random_generator(16), {"name": "tiny"})
conftest.write_set(folder / "set", folder / "generator")
config, _ = cli.parse("", ["--preset", "demo", "dmat", "--classifier.name", "own/residual", "--objective.batch_norm", "per_term"])
short = {"epochs": 2, "batch_size": 8, "lr_epochs": (0, 2), "lr_values": (0.05, 0.01), "val_examples": 0}
training = config.training.model_copy(update=short)
config = config.model_copy(update={"training": training})
losses = []
generator = generators.load_generator(str(folder / "generator"))
data = open_set(folder / "set", "train")
sha = generators.fingerprint(str(folder / "generator"))
trainer.train(config, data, generator, sha, LocalContext(folder, lambda found: losses.append(found["train_loss"])))
network, run = checkpoint.load_classifier(folder / "checkpoint")
state = checkpoint.load_state(folder / "checkpoint")
view, batch = AttackView(network), data.batch(np.arange(8), "natural")
away = (view(batch.x_BCHW) - network(batch.x_BCHW)).abs().max().item()
apart = max((one[0] - one[1]).abs().max().item() for one in state["step"]["apart"])
found = attack_images(network, build_threat("image", eps=0.1), batch.x_BCHW, batch.y_B, steps=3)
clean = torch.nn.functional.cross_entropy(network(batch.x_BCHW), batch.y_B).item()
told = {"losses": losses, "folded": len(view.folded), "away": away, "apart": apart, "clean": clean}
print(json.dumps({**told, "name": run["config"]["classifier"]["name"], "attacked": found.loss_B.mean().item()}))
"""


ROWS = """
import json, sys
import numpy as np, torch
from pathlib import Path
sys.path.insert(0, "tests")
import conftest
from dmat_ray import cli
from dmat_ray.networks import classifiers
from dmat_ray.training import objectives
from dmat_ray.config import ClassifierConfig
from dmat_ray.data.manifold_set import open_set
from dmat_ray.evaluation.evaluation import Evaluator, evaluate_here
from dmat_ray.manifold import generators

config, _ = cli.parse("", ["--preset", "demo", "shade.yaml", "--evaluation.sets", "natural"])
folder = Path("tiny")
generators.save_generator(folder / "generator", conftest.random_generator(16), {"name": "tiny"})
conftest.write_set(folder / "set", folder / "generator")
generator = generators.load_generator(str(folder / "generator"))
attacks = tuple(row for row in config.evaluation.attacks if row.name.startswith(("clean", "shade")))
suite = config.evaluation.model_copy(update={"attacks": attacks, "summaries": (), "transfer": ()})
data = open_set(folder / "set", "test")
torch.manual_seed(0)
network = classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=3).eval()
rows = evaluate_here(Evaluator(suite, data, generator, lambda name: network, ["tiny"], torch.device("cpu")))
objective = objectives.build(config.objective, generator)
batch = data.batch(np.arange(6), "on_manifold")
images = objective.worst(network, batch, objective.drawn(0, "step"), seed=0, purpose="step")
change = (images["shade"] - batch.x_BCHW).abs()
assert (change <= 0.3 * batch.x_BCHW + 1e-6).all() and change.max() > 0.05
print(json.dumps({"rows": rows.select(["attack", "distance", "loss"]).to_pylist(), "weights": objective.weights}))
"""


def test_the_threat_is_a_row_and_a_term(copy: Path) -> None:
    found = json.loads(run(copy, "-c", ROWS))
    assert found["weights"]["shade"] == 0.5
    losses: dict[str, list[float]] = {}
    for row in found["rows"]:
        losses.setdefault(row["attack"], []).append(row["loss"])
        name, _, at = row["attack"].partition(" @ ")
        eps = 0.0 if name == "clean" else float(at or 0.3)
        assert row["distance"] <= eps * (1 + 1e-5)
    assert len(losses) == 6
    assert sum(losses["shade"]) > sum(losses["clean"])


@pytest.mark.exhaustive
def test_the_decoder_is_a_manifold(copy: Path) -> None:
    """It is trained, exported and imported by the page's commands; projection finds digits on it, and w has a gradient."""
    told = run(copy, "digit_decoder.py")
    assert float(told.split()[-1]) < 0.03, "a manifold that digits are near to"
    run(copy, "jobs/import_generator.py", "--checkpoint", "decoder.pt2", "--card", "card.json", "--output", "runs/decoder")
    found = json.loads(run(copy, "-c", PROJECTED))
    assert found["l1"] < 0.06
    assert found["l1"] < 0.6 * found["start"]
    assert found["slope"] == pytest.approx(found["measured"], rel=0.02)
    assert found["attacked"] > found["clean"]


PROJECTED = """
import json
import numpy as np, torch
from dmat_ray import threats
from dmat_ray.networks import classifiers
from dmat_ray.attack import attack
from dmat_ray.config import ClassifierConfig, DataConfig, ImageRow, LatentRow, ProjectionConfig
from dmat_ray.data.reading import read_pixels
from dmat_ray.data.sources import list_examples
from dmat_ray.manifold import generators
from dmat_ray.manifold.projection import Projector
from dmat_ray.types import Batch

generator = generators.load_generator("runs/decoder/generator")
data = DataConfig(resolution=32, test_limit=10)
rows = list_examples(data).rows("test")
x = torch.from_numpy(np.stack(read_pixels(rows, data))).float() / 255
settings = ProjectionConfig(steps=60, lpips=0, start="nearest", noise=0, candidates=512)
ids = rows["id"].to_pylist()
w = Projector(generator, settings, torch.device("cpu")).project(x, ids).w_BLD
errors = lambda codes: (generator.synthesis(codes) - x).abs().mean().item()
mean = generator.w_mean.expand_as(w)
direction = torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
value = lambda codes: (generator.synthesis(codes) * weights).double().sum()
point = w.detach().clone().requires_grad_(True)
(gradient,) = torch.autograd.grad(value(point), point)
with torch.no_grad():
    measured = (value(w + 1e-2 * direction) - value(w - 1e-2 * direction)).item() / 2e-2
torch.manual_seed(0)
network = classifiers.build(ClassifierConfig(name="digits_cnn"), channels=1, num_classes=10).eval()
batch = Batch(ids, generator.synthesis(w).detach(), torch.zeros(len(w), dtype=torch.int64), w)
row = LatentRow(name="OM", eps=0.5, scale="std", steps=5)
found = attack(network, threats.build(row, generator), batch, row, seed=0, purpose="test")
clean = torch.nn.functional.cross_entropy(network(batch.x_BCHW), batch.y_B).item()
slope = (gradient * direction).sum().item()
told = {"l1": errors(w), "start": errors(mean), "slope": slope, "measured": measured}
print(json.dumps({**told, "clean": clean, "attacked": found.loss_B.mean().item()}))
"""


def test_the_sources_are_read(copy: Path) -> None:
    run(copy, "to_parquet.py")
    for source, count in (("digits.parquet", 1797), ("small", 1797)):
        found = json.loads(run(copy, "-c", LISTED.format(source=source)))
        assert found == {"found": count, "classes": 10, "shape": [1, 32, 32], "unreadable": 0, "unique": count}


LISTED = """
import json
from dmat_ray.config import DataConfig
from dmat_ray.data.reading import read_pixels
from dmat_ray.data.sources import list_examples
data = DataConfig(source="{source}", resolution=32)
listing = list_examples(data)
images = read_pixels(listing.table, data)
good = [image for image in images if not isinstance(image, str)]
told = dict(found=listing.found, classes=len(listing.class_names), shape=list(good[0].shape), unreadable=len(images) - len(good))
print(json.dumps(dict(told, unique=len(set(listing.table["id"].to_pylist())))))
"""


def test_the_space_is_one(copy: Path) -> None:
    told = run(copy, "-c", SPACE)
    found = json.loads(told.splitlines()[-1])
    assert sum(found["weights"]) == pytest.approx(1)
    assert 0.5 <= found["l2"] <= 3


SPACE = """
import json
import numpy as np
from dmat_ray import cli
from dmat_ray.cluster import spaces
from dmat_ray.config import TuneConfig
config, _ = cli.parse("", ["--preset", "demo"])
space, base = spaces.load("my_space.py", config)
rng = np.random.RandomState(0)
sample = {n: d.sample(random_state=rng) for n, d in space.variables(TuneConfig(searcher="random")).items()}
trial = spaces.trial_config(base, space.settings(sample), "trial", 1).objective
weights = [term.weight for term in (trial.image, trial.latent, trial.more["l2"])]
print(json.dumps({"weights": weights, "l2": trial.more["l2"].eps}))
"""
