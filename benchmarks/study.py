"""A study: generator, on-manifold set, every method with several seeds, evaluation; what docs/results/ is made of.

    python benchmarks/study.py --preset demo benchmarks/studies/mnist.yaml --processes 2
    python benchmarks/study.py --preset cifar10 benchmarks/studies/cifar5.yaml --data.source DIR --processes 2
    python benchmarks/study.py --preset cifar10 benchmarks/studies/cifar10.yaml --data.source DIR --processes 8

DIR holds CIFAR-10's own binary files. Needs no Ray: one machine, with or without a GPU, on which `--processes` trainings or
evaluations run at a time. Whatever is finished is kept, so the same command goes on where it was stopped. OUTPUT then holds the
generator, on_manifold_set, models/METHOD-SEED, rows/METHOD-SEED.parquet (the format of an evaluation's rows), clean/ (the same of
all test images without an attack), with --worst-case worst/ (of all test images, what stands every attack), with --autoattack
SUITE autoattack/ (of the first seed's models), and study.json with versions and run times. A method is a preset of the package or
an entry of benchmarks/studies/methods.yaml, or of the file that `--more-methods` names, which wins.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from study_methods import ABLATIONS, KINDS, METHODS, OF_MODEL, OF_SET, OF_VERSION, are_kept, told_by, worst_case

from dmat_ray import cli, suites, yaml_file
from dmat_ray.config import Config
from dmat_ray.data import manifold_set, set_reader
from dmat_ray.data.reading import read_pixels
from dmat_ray.data.set_format import MANIFEST
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import UserError
from dmat_ray.evaluation import evaluation
from dmat_ray.evaluation.units import VERSION
from dmat_ray.local import LocalContext
from dmat_ray.manifold import generators, set_maker
from dmat_ray.manifold.gan_progress import result_of
from dmat_ray.manifold.gan_trainer import train_generator
from dmat_ray.manifold.samples import sample_grid
from dmat_ray.models import checkpoint, trained_settings
from dmat_ray.storage import at, set_folder
from dmat_ray.storage.files import read_json, write_json
from dmat_ray.validated import validate

HERE = Path(__file__).resolve().parent
STAGES = ("generator", "projection", "models")
BEGAN = time.monotonic()


def main() -> None:
    config, given = cli.parse(str(__doc__), add=_arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(config.cluster.threads_per_worker if device.type == "cpu" else 4)
    if given.evaluate is not None:
        for kind, settings in evaluations(config, given, given.evaluate).items():
            _evaluate(config, kind, settings, given.evaluate, device)
        return
    study = _Study(config, given, device)
    for name in STAGES:
        study.stage(name, getattr(study, name))
        if name == given.until:
            return


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trained", nargs="+", default=list(METHODS), metavar="PRESET", help="methods; by default the main table's"
    )
    parser.add_argument("--more-methods", metavar="FILE", help="more entries as those of studies/methods.yaml")
    parser.add_argument("--ablations", action="store_true", help="instead, those that only tables of ablations have")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every method")
    parser.add_argument("--first-seed", type=int, default=0, help="that of the first of them; the others follow")
    parser.add_argument("--processes", type=int, default=1, help="trainings or evaluations at a time")
    parser.add_argument("--worst-case", action="store_true", help="also what stands every attack, of all test images")
    parser.add_argument(
        "--autoattack", metavar="SUITE", help="of AutoAttack, run on the natural images of the first seed's models"
    )
    parser.add_argument("--autoattack-limit", type=int, default=100, help="test images of AutoAttack")
    parser.add_argument("--until", choices=STAGES, help="where to stop")
    parser.add_argument("--evaluate", help=argparse.SUPPRESS)  # a model's name: what this script tells its own processes


class _Study:
    def __init__(self, config: Config, given: argparse.Namespace, device: torch.device) -> None:
        self.config, self.given, self.device = resolved(config), given, device
        if given.ablations:
            given.trained = sorted({method for table in ABLATIONS.values() for method in table} - set(METHODS))
        self.folder = Path(config.output).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        files = [HERE / "studies" / "methods.yaml", *([Path(given.more_methods)] if given.more_methods else [])]
        self.own_methods: dict[str, Any] = {k: v for file in files for k, v in yaml_file.read(file, f"'{file}'").items()}
        self.settings = self.folder / "settings.yaml"  # for the processes of this study
        values = {key: value for key, value in self.config.to_json().items() if key not in ("cluster", "tracking", "tune")}
        if self.settings.is_file() and (others := _differences(yaml.safe_load(self.settings.read_text()), values)):
            told = f"the study in '{self.folder}' was begun with other settings ({', '.join(others)}); give another --output"
            if all(name.startswith("evaluation.") for name in others):
                told = (
                    f"the study in '{self.folder}' was evaluated by other attacks or settings; remove its settings.yaml, rows, "
                    "clean, worst and autoattack to have its models evaluated anew, or give another --output"
                )
            raise UserError(told)
        self.settings.write_text(yaml.safe_dump(values))

    def stage(self, name: str, work: Callable[[], Any]) -> None:
        """Do the work, and note what it says of itself, unless nothing was to be done."""
        began = time.monotonic()
        say(f"{name} ...")
        if (told := work()) is not None:
            self.note(name, {"seconds": round(time.monotonic() - began, 1), **told})

    def note(self, name: str, told: dict[str, Any], kinds: Collection[str] = ()) -> None:
        """Keep a fact in study.json, with the machine that it is of; of evaluations instead of what was told of these kinds."""
        card = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        with self.lock:
            path = self.folder / "study.json"
            notes = read_json(path) if path.is_file() else {}
            model = name.split(" ")[0]
            void = [k for k in notes if k.startswith(f"{model} ") and not set(kinds).isdisjoint(k.split(" ")[1].split("+"))]
            notes = {key: value for key, value in notes.items() if key not in void}
            write_json(path, {**notes, name: {"machine": card, "versions": checkpoint.versions(), **told}})

    def note_autoattack(self, asked: dict[str, Any]) -> None:
        """What its rows are of, which is one suite on one number of images."""
        path = self.folder / "study.json"
        noted = (read_json(path) if path.is_file() else {}).get("autoattack", {})
        if any((self.folder / "autoattack").glob("*.parquet")) and {key: noted.get(key) for key in asked} != asked:
            raise UserError(f"'{self.folder}/autoattack' has rows of {noted}, not of {asked}; remove them, or ask for the same")
        self.note("autoattack", asked)

    def generator(self) -> dict[str, Any] | None:
        """Train the generator that the settings name, if it is one of this study's own."""
        folder = Path(self.config.generator.path).resolve()
        if not folder.is_relative_to(self.folder) or (folder / "generator.safetensors").is_file():
            return None
        rows = list_examples(self.config.data).rows("train")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            starts = range(0, rows.num_rows, 500)
            parts = pool.map(lambda start: read_pixels(rows.slice(start, 500), self.config.data), starts)
            pixels = np.stack([image for part in parts for image in part])
        images, labels = torch.from_numpy(pixels), torch.tensor(rows["label"].to_pylist())
        history: list[dict[str, float]] = []

        def told(metrics: Any) -> None:
            history.append(dict(metrics))
            say(", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))

        context = LocalContext(self.folder / "gan", told)
        generator = train_generator(self.config.gan, images, labels, context)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "samples.png").write_bytes(sample_grid(generator, self.config.gan.seed))
        _, best = result_of(context.checkpoints()[0], self.config.gan)
        about = {"training": self.config.gan.model_dump(mode="json"), "data": self.config.data.model_dump(mode="json")}
        generators.save_generator(folder, generator, {**about, "quality": best, "versions": checkpoint.versions()})
        return {"images": len(images), "history": history, "kept": best}

    def projection(self) -> dict[str, Any] | None:
        """Make the on-manifold set, a shard at a time."""
        config, folder = self.config, set_folder(self.config)
        if (folder / MANIFEST).is_file():
            return None
        threads = torch.get_num_threads()
        torch.set_num_threads(max(threads, self.given.processes))
        manifest = set_maker.make(config, self.device, say)
        torch.set_num_threads(threads)
        return {key: manifest[key] for key in ("splits", "usable", "means")}

    def models(self) -> None:
        """Train every method with every seed by jobs/train_local.py, and evaluate it in a process of its own."""
        folder = self.folder
        for name in ("logs", "methods"):
            (folder / name).mkdir(exist_ok=True)
        for method, settings in self.own_methods.items():
            path, text = folder / "methods" / f"{method}.yaml", yaml.safe_dump(settings)
            if path.is_file() and path.read_text() != text and list((folder / "models").glob(f"{method}-*")):
                there = [kind for kind in ("models", *KINDS) if list((folder / kind).glob(f"{method}-*"))]
                told = f"remove {method}-* from its folders {', '.join(there)}"
                raise UserError(f"method '{method}' of the study in '{folder}' was trained with other settings; {told}")
            path.write_text(text)

        def one(name: str) -> None:
            model = folder / "models" / name
            if (model / checkpoint.RUN).is_file():
                config, _ = cli.parse(str(__doc__), self._training(name)[1:])
                trained_settings.require_same_config(checkpoint.read_run(at(model))["config"], config, at(model))
            else:
                trained = self._run(self._training(name), f"{name}-training")
                self.note(f"{name} training", {"seconds": trained, "processes": self.given.processes})
                say(f"{name}: trained in {trained:.0f} s")
            if not (kinds := evaluations(self.config, self.given, name)):
                return
            asked = ["--autoattack", self.given.autoattack] if self.given.autoattack else []
            asked += ["--worst-case"] if self.given.worst_case else []
            asked += ["--first-seed", str(self.given.first_seed), "--autoattack-limit", str(self.given.autoattack_limit)]
            asked += ["--evaluate", name]
            evaluated = self._run([str(HERE / "study.py"), "--preset", str(self.settings), *asked], f"{name}-evaluation")
            told = {"seconds": evaluated, "processes": self.given.processes, "rows_version": VERSION}
            self.note(f"{name} {'+'.join(kinds)}", told, kinds)
            say(f"{name}: evaluated in {evaluated:.0f} s")

        if self.given.autoattack:
            self.note_autoattack({"suite": self.given.autoattack, "limit": self.given.autoattack_limit})
        with ThreadPoolExecutor(self.given.processes) as pool:
            work = [pool.submit(one, name) for name in self.names()]
            for found in as_completed(work):
                if found.exception():
                    pool.shutdown(cancel_futures=True)
                found.result()

    def names(self) -> list[str]:
        """Of models: a seed's methods before the next seed's."""
        first = self.given.first_seed
        return [f"{method}-{seed}" for seed in range(first, first + self.given.seeds) for method in self.given.trained]

    def _training(self, name: str) -> list[str]:
        method, seed = name.rsplit("-", 1)
        preset = str(self.folder / "methods" / f"{method}.yaml") if method in self.own_methods else method
        layers = ["--preset", str(self.settings), preset]
        # as published, one step is a fifth longer than the radius
        step = ["--objective.latent.step_size", str(1.2 * self.config.objective.latent.eps)] if method == "om_at_fgsm" else []
        return [str(HERE.parent / "jobs" / "train_local.py"), *layers, "--name", name, "--training.seed", seed, *step]

    def _run(self, command: list[str], log: str) -> float:
        """A process of this study; returns its seconds. Raises UserError if it fails."""
        began, place = time.monotonic(), self.folder / "logs" / f"{log}.txt"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, *command, "--cluster.threads_per_worker", str(self.config.cluster.threads_per_worker)]
        with place.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=file, check=False, env=environment)
        if done.returncode:
            raise UserError(f"a process failed; '{place}' ends with: {' '.join(place.read_text().splitlines()[-1:])}")
        return round(time.monotonic() - began, 1)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings by their dotted names that differ; what `before` does not say has its default. Where the study and its generator
    lie is none: the set knows its generator by the content.
    """
    flat = [trained_settings.flatten_config(validate(values)) for values in (before, now)]
    names = [name for name in dict.fromkeys([*flat[1], *flat[0]]) if name not in ("output", "generator.path")]
    return [name for name in names if flat[0].get(name, "absent") != flat[1].get(name, "absent")]


def resolved(config: Config) -> Config:
    """With absolute paths also of what is not there yet, so that the same command is the same settings later."""
    path, place = config.generator.path, config.manifold_set
    generator = config.generator.model_copy(update={"path": str(Path(path).resolve())}) if "/" in path else config.generator
    return config.model_copy(update={"generator": generator, "manifold_set": str(Path(place).resolve()) if place else place})


def evaluations(config: Config, given: argparse.Namespace, name: str) -> dict[str, Any]:
    """Folder of rows -> settings over the study's, of what a model has not gone through yet, or by attacks mended since.

    Also of what another model of this name or another set has gone through, where rows say of which they are.
    """
    kinds: dict[str, Any] = {
        "rows": {},
        "clean": {"suites": [], "attacks": [{"threat": "clean", "name": "clean"}], "limit": None},
    }
    if given.worst_case:
        kinds["worst"] = {**kinds["clean"], "attacks": worst_case(config.evaluation)}
    if given.autoattack and name.endswith(f"-{given.first_seed}"):
        suite = {"suites": [given.autoattack], "sets": ["natural"], "limit": given.autoattack_limit}
        kinds["autoattack"] = {**kinds["clean"], **suite}
    folder = Path(config.output).resolve()
    return {kind: settings for kind, settings in kinds.items() if not _is_kept(config, folder / kind / f"{name}.parquet", name)}


def _is_kept(config: Config, rows: Path, name: str) -> bool:
    """Whether rows are of these attacks, this model and this set; those that say of no model are taken for this one's."""
    told = told_by(rows)
    return are_kept(rows) and (OF_MODEL not in told or told.items() >= _digests(config, name).items())


def _digests(config: Config, name: str) -> dict[str, str]:
    """Of a model and of the set that it is evaluated on, as files of rows say them."""
    model = checkpoint.digest(at(Path(config.output).resolve() / "models" / name))
    return {OF_MODEL: model, OF_SET: set_reader.digest(set_reader.read_manifest(set_folder(config)))}


def _evaluate(config: Config, kind: str, settings: dict[str, Any], name: str, device: torch.device) -> None:
    """The rows of one model."""
    folder = Path(config.output).resolve()
    if settings:
        rows = {**config.evaluation.model_dump(mode="json"), "summaries": [], "transfer": [], **settings}
        config = validate({**config.to_json(), "evaluation": rows})
        config = config.model_copy(update={"evaluation": suites.resolved(config.evaluation)})
    data = manifold_set.open_set(set_folder(config), "test")
    generator = generators.load_configured(config.generator, device)

    def load(model: str) -> torch.nn.Module:
        return checkpoint.load_classifier(folder / "models" / model, device)[0]

    about = {OF_VERSION: str(VERSION), **_digests(config, name)}
    evaluator = evaluation.Evaluator(config.evaluation, data, generator, load, [name], device)
    rows = evaluation.evaluate_here(evaluator).replace_schema_metadata(about)
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd")
    (folder / kind).mkdir(exist_ok=True)
    at(folder / kind / f"{name}.parquet").write_bytes(sink.getvalue())


def say(text: str) -> None:
    """A line with the seconds since the start."""
    print(f"{time.monotonic() - BEGAN:6.0f} s  {text}", flush=True)


if __name__ == "__main__":
    cli.run(main)
