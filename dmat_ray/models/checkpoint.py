"""Classifiers as folders: `model.safetensors`, `run.json`, while training `state.pt`, and of imported programs the program.

`run.json` holds the whole config, class names, image shape, the generator's sha256, progress, metrics, and digests of the
files beside it: resume and evaluation read it, nothing is typed twice. It is written last, so that a folder without it is no
checkpoint.
"""

import json
import pickle
import platform
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dmat_ray
from dmat_ray.config import Config
from dmat_ray.devices import device_of
from dmat_ray.errors import UserError, first_line
from dmat_ray.models.agreement import seen_by_all
from dmat_ray.networks import classifiers
from dmat_ray.rng import kept_apart
from dmat_ray.storage import Location, Place, at
from dmat_ray.storage.files import is_full, read_json, sha256, text_digest, write_json
from dmat_ray.storage.folders import fetched
from dmat_ray.storage.processes import own_temporary_folder
from dmat_ray.types import RunContext
from dmat_ray.validated import validate

MODEL, RUN, STATE = "model.safetensors", "run.json", "state.pt"
PROGRAMS = {"torchscript": "program.pt", "torch_export": "program.pt2"}  # files of imported programs, by kind
DIGEST = "program_sha256"  # a tensor in MODEL of 32 bytes, which ties a program to it
UNSEEN = "classes_without_images"  # key of run.json, if there are any: classes of whose images the training had none
VERSION = 2


def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    return {
        "dmat_ray": dmat_ray.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyarrow": pyarrow.__version__,
    }


def describe_run(
    config: Config,
    class_names: tuple[str, ...],
    channels: int,
    resolution: int,
    generator_sha256: str | None,
    set_sha256: str | None,
) -> dict[str, Any]:
    """The part of run.json that does not change while training; of an imported model no generator or set is known."""
    own = classifiers.origin(config.classifier.name)
    return {
        "version": VERSION,
        "config": config.to_json(),
        **({"network": own} if own else {}),
        "class_names": list(class_names),
        "channels": channels,
        "resolution": resolution,
        "generator_sha256": generator_sha256,
        "set_sha256": set_sha256,
        "versions": versions(),
    }


def save(folder: Path, network: nn.Module | dict[str, Tensor], run: dict[str, Any], state: dict[str, Any] | None = None) -> None:
    """Write a checkpoint of a network, or of its state; run.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN).unlink(missing_ok=True)
    weights = network.state_dict() if isinstance(network, nn.Module) else network
    tensors, stored = {}, set()
    for key, value in weights.items():
        tensor = value.detach().cpu().contiguous()
        where = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if where in stored else tensor  # of layers that share their weights each has them
        stored.add(where)
    save_file(tensors, folder / MODEL)
    if state is not None:
        torch.save(state, folder / STATE)
    seal(folder, RUN, run)


def seal(folder: Path, name: str, description: dict[str, Any]) -> None:
    """Write the JSON file `name`, which makes a folder a checkpoint, with digests of the files that are there."""
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != name}
    write_json(folder / name, {**description, "sha256": digests})


def require_whole(folder: Place, name: str) -> dict[str, Any]:
    """What `seal` described; raises UserError if a file is missing or is not what was written."""
    if not (at(folder) / name).is_file():
        raise UserError(f"the checkpoint '{folder}' has no {name}")
    here = fetched(folder)
    description: dict[str, Any] = read_json(here / name)
    if "sha256" not in description:
        raise UserError(f"the checkpoint '{folder}' is of an older version, whose trainings this one cannot go on with")
    for file, digest in description["sha256"].items():
        if not (here / file).is_file():
            raise UserError(f"the checkpoint '{folder}' has no {file}")
        if sha256(here / file) != digest:
            raise UserError(f"the checkpoint '{folder}' is damaged: its {file} is not what was written")
    return description


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint, of whatever kind, is what was written."""
    try:
        return bool([require_whole(folder, description.name) for description in folder.glob("*.json")])
    except UserError:
        return False


def newest(context: RunContext, name: str) -> Location | None:
    """The newest checkpoint of a run that is whole, to go on from: see `newest_of`. The same on all workers, which must all ask.

    Raises UserError as well if workers find different ones (see `agreement.seen_by_all`).
    """
    return seen_by_all(lambda say: newest_of(context.checkpoints(), name, say), name, context)


def newest_of(folders: Iterable[Place], name: str, say: Callable[[str], None]) -> Location | None:
    """The first of a run's checkpoints, the newest first, that is whole; None if there are none.

    Says which ones are damaged; raises UserError if all of them are, StorageError if they cannot be looked at.
    """
    damaged = None
    for folder in map(at, folders):
        try:
            require_whole(folder, name)
        except UserError as error:
            damaged = error
            say(f"warning: {error}; going back to the one before")
            continue
        return folder
    if damaged is not None:
        raise UserError(f"{damaged}, and there is none before it; remove it to train anew")
    return None


def hand_over(context: RunContext, metrics: dict[str, float], write: Callable[[Path], None], *, wait: bool = False) -> None:
    """Report metrics, and on rank 0 the checkpoint that `write` puts into an empty folder, which the context then owns.

    `wait` until it is where it will be kept. Raises UserError if it cannot be written.
    """
    if context.rank != 0:
        context.report(metrics)
        return
    folder = own_temporary_folder()
    place = f"'{folder.parent}'"
    try:
        write(folder)
        place = "the output folder"
        context.report(metrics, folder, wait=wait)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not is_full(error):
            raise  # what may pass, such as a fault of a GPU, is for whoever starts the training anew
        raise UserError(no_space(error, place, context.checkpoints())) from error


def hand_over_state(
    context: RunContext, metrics: dict[str, float], name: str, progress: dict[str, Any], state: dict[str, Any], *, wait: bool
) -> None:
    """`hand_over` of what `write_state` writes."""
    hand_over(context, metrics, partial(write_state, name=name, progress=progress, state=state), wait=wait)


def write_state(folder: Path, name: str, progress: dict[str, Any], state: dict[str, Any]) -> None:
    """Put a checkpoint into an empty folder: tensors, and the JSON file `name`, which makes it whole."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / STATE)
    seal(folder, name, progress)


def no_space(error: BaseException, place: str, kept: Sequence[Path | str]) -> str:
    """What the user is told when a checkpoint cannot be written to a place."""
    said = f"a checkpoint cannot be written to {place} ({first_line(error)}): is the disk full?"
    if not kept:
        return f"{said} There is none before it"
    return f"{said} The last good one is '{kept[0]}'; free space and run again to go on from it"


def read_run(folder: Place) -> dict[str, Any]:
    """run.json of a checkpoint; raises UserError if there is none or it is of another version."""
    path = at(folder) / RUN
    if not path.is_file():
        raise UserError(f"there is no trained model at '{folder}' (no {RUN}); train one with jobs/train.py")
    run: dict[str, Any] = path.read_json()
    if run.get("version") != VERSION:
        raise UserError(f"the checkpoint '{folder}' has format version {run.get('version')}, this program reads {VERSION}")
    return run


def digest(folder: Place) -> str:
    """Names a model by its files and by how it is built from them."""
    run = read_run(folder)
    weights = sha256(fetched(folder) / MODEL)  # of a program it holds the digest of its file
    built = {key: run[key] for key in ("channels", "resolution", "class_names")}
    own = classifiers.origin(run["config"]["classifier"]["name"])  # as it is now, which is what will be computed
    return text_digest(json.dumps([weights, built, run["config"]["classifier"], *([own] if own else [])], sort_keys=True))


def load_weights(folder: Place, network: nn.Module) -> None:
    """Fill `network`; raises UserError if the weights are another architecture's or damaged."""
    try:
        missing, unexpected = network.load_state_dict(load_file(fetched(folder) / MODEL), strict=False)
    except FileNotFoundError:
        raise UserError(f"the checkpoint '{folder}' has no {MODEL}") from None
    except (RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(f"the weights in '{folder}' do not fit the network: {lines[min(1, len(lines) - 1)].strip()}") from None
    if missing or unexpected:
        what = f"it lacks {missing[0]}" if missing else f"it has {unexpected[0]}, which the network has not"
        raise UserError(f"the weights in '{folder}' are of another architecture: {what}")


def load_state(folder: Place) -> dict[str, Any]:
    """Optimiser state and progress of a checkpoint made while training."""
    path = fetched(folder) / STATE
    if not path.is_file():
        raise UserError(f"the checkpoint '{folder}' has no {STATE}: it can be evaluated, but training cannot go on from it")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        damaged = at(folder) / STATE
        raise UserError(f"'{damaged}' is damaged ({type(error).__name__}); remove the checkpoint to train anew") from None
    return state


def load_classifier(folder: Place, device: torch.device | str = "cpu") -> tuple[classifiers.Classifier, dict[str, Any]]:
    """A classifier, trained here or imported, in eval mode, and its run.json.

    It takes x_BCHW float in [0, 1], which it normalises itself, and puts out logits_BK; run.json has class_names, channels,
    resolution, config, metrics, history. Raises UserError for a folder that holds none, or whose files do not fit together, and
    for a device that is not here.

    >>> from dmat_ray import load_classifier, load_images, make_set, settings, train
    >>> config = settings("demo", "dmat", "small", output="runs/small")
    >>> _ = make_set(config)
    >>> network, run = load_classifier(train(config))
    >>> digits, _ = load_images("mnist5k", limit=50)
    >>> run["class_names"][:3], run["metrics"]["epoch"], network(digits.x_BCHW).shape
    (['0', '1', '2'], 8.0, torch.Size([50, 10]))
    """
    device, run = device_of(device), read_run(folder)
    config = settings_of(run)
    if "program" in run:
        network = _load_program(fetched(folder), run["program"], config, device)
    else:
        require_network_of(run, folder)
        with kept_apart():  # initial weights
            network = classifiers.build(config.classifier, run["channels"], len(run["class_names"]))
        load_weights(folder, network)
    return network.to(device).eval(), run


def settings_of(run: dict[str, Any]) -> Config:
    """The settings by which a run.json's network was trained. How it was to be evaluated, searched for and tracked is left out: a
    later version may refuse a row of these, or an address, that it once had.
    """
    return validate({name: section for name, section in run["config"].items() if name not in ("evaluation", "tune", "tracking")})


def save_program(folder: Path, content: bytes, kind: str, network: classifiers.Classifier, run: dict[str, Any]) -> None:
    """Write an imported program, already looked through: its file, the normalisation around it, run.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRAMS[kind]).write_bytes(content)
    digest = torch.tensor(list(bytes.fromhex(sha256(folder / PROGRAMS[kind]))), dtype=torch.uint8)
    save(folder, {"mean": network.mean, "std": network.std, DIGEST: digest}, {**run, "program": kind})


def _load_program(folder: Path, kind: Any, config: Config, device: torch.device) -> classifiers.Classifier:
    from dmat_ray.formats.programs import load_program

    if kind not in PROGRAMS:
        raise UserError(f"'{folder / RUN}' names a program of kind '{kind}'; this version knows {', '.join(PROGRAMS)}")
    path = folder / PROGRAMS[kind]
    try:
        tensors = load_file(folder / MODEL)
        digest = bytes(tensors[DIGEST].tolist()).hex()
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"the checkpoint '{folder}' has no whole {MODEL} ({type(error).__name__}); import it again") from None
    if not path.is_file() or sha256(path) != digest:
        raise UserError(f"'{path}' is not the program that was imported; import it again with jobs/import_model.py")
    program = classifiers.Program(load_program(path, kind, device))
    return classifiers.Classifier(program, config.classifier.mean, config.classifier.std)


def require_network_of(run: dict[str, Any], folder: Place, *, unchanged: bool = False) -> None:
    """Raise UserError if a network of a package is another package's now, or with `unchanged` of another source."""
    name = run["config"]["classifier"]["name"]
    before, now = run.get("network"), classifiers.origin(name)
    if not before or not now:
        return
    for key in ("package", "entry", "sha256") if unchanged else ("package", "entry"):
        if before[key] != now[key]:
            what = f"of package {before['package']} {before['version']}, '{before['entry']}'"
            differs = "whose source has changed" if key == "sha256" else f"which here is '{now['entry']}' of {now['package']}"
            raise UserError(f"'{folder}' has the network {name} {what}, {differs}; train under another --name")
