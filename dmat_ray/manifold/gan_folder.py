"""Whether a folder holds the generator that settings and images make, and what is kept there for a longer training."""

import shutil
from pathlib import Path
from typing import Any

from dmat_ray.config import Config, GanConfig
from dmat_ray.errors import UserError
from dmat_ray.manifold import trained_on
from dmat_ray.manifold.gan_images import listed, training_name
from dmat_ray.manifold.gan_progress import PROGRESS, is_shorter
from dmat_ray.manifold.generators import CARD, WEIGHTS
from dmat_ray.storage.files import read_json, sha256, write_json
from dmat_ray.storage.folders import remove_folder
from dmat_ray.wording import number_of

TRUNK = "trunk"  # within the folder of an unfinished training, see `gan_trainer.train_generator`
OF = "weights_sha256"  # key of its JSON, once it lies beside the generator: whose it is


def is_trained(config: Config, folder: Path) -> bool:
    """True if `folder` holds the generator that these settings and this data make; False if training makes it, of another too.

    Raises UserError that says what differs if it holds one that training would replace without going on from it.
    """
    if not folder.exists() or extends(config, folder):
        return False
    card = _card(folder)
    if why := _different(config, folder, card):
        raise UserError(f"'{folder}' holds another generator ({why}); give another --output, or --overwrite")
    return True


def settle(config: Config, folder: Path, storage: Path) -> None:
    """Keep of the training of the generator in `folder` what a longer one goes on from, and remove the rest of it.

    Under the lease of the generator's folder.
    """
    training = storage / training_name(config, str(_card(folder).get("images_sha256")))
    if (training / TRUNK).is_dir():
        shutil.rmtree(trunk_of(folder), ignore_errors=True)
        noted = {**read_json(training / TRUNK / PROGRESS), OF: sha256(folder / WEIGHTS)}
        write_json(training / TRUNK / PROGRESS, noted)
        (training / TRUNK).rename(trunk_of(folder))
    elif _is_of_another(trunk_of(folder), folder) or not (trunk_of(folder) / PROGRESS).is_file():
        # whoever put this one in the place of that was killed before it was removed, or meanwhile
        shutil.rmtree(trunk_of(folder), ignore_errors=True)
    remove_folder(training)


def trunk_of(folder: Path) -> Path:
    """Where the training of the generator in `folder` keeps the state that a longer one goes on from."""
    return folder.with_name(f"{folder.name}_training")


def _is_of_another(trunk: Path, folder: Path) -> bool:
    """Whether a kept state says that it is of another generator than that in `folder`; older ones do not say whose they are."""
    progress = read_json(trunk / PROGRESS) if (trunk / PROGRESS).is_file() else {}
    return OF in progress and not ((folder / WEIGHTS).is_file() and progress[OF] == sha256(folder / WEIGHTS))


def extends(config: Config, folder: Path) -> bool:
    """Whether these settings train the generator in `folder`, on the same images, for longer, and what it takes is there."""
    trunk, card = trunk_of(folder) / PROGRESS, _card(folder)
    progress = read_json(trunk) if trunk.is_file() else {}
    before = progress.get("config")
    if before is None or before != card.get("training") or not is_shorter(before, config.gan):
        return False
    if _is_of_another(trunk_of(folder), folder):
        return False
    return not _different(config, folder, {**card, "training": config.gan.model_dump(mode="json")})


def _card(folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = read_json(folder / CARD) if (folder / CARD).is_file() else {}
    return card


def _first_difference(was: Any, now: Any, name: str) -> str:
    """The first setting under `name` that differs, in words; empty if none does."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*now, *was])
        return next(filter(None, (_first_difference(was.get(k), now.get(k), f"{name}.{k}") for k in keys)), "")
    return "" if was == now else f"{name} was {was}, now it is {now}"


def _different(config: Config, folder: Path, card: dict[str, Any]) -> str:
    """What of a generator's training, of which `card` tells, is not what it would be now; empty if nothing is."""
    if "training" not in card or not (folder / WEIGHTS).is_file():
        return "it was not trained here, or is not whole"
    if other := _first_difference(GanConfig.recorded(card["training"]), config.gan.model_dump(mode="json"), "gan"):
        return other
    rows, digest, _ = listed(config)
    if card.get("images_sha256") == digest:
        return ""
    data = config.data.model_dump(mode="json")
    then = data | (card["data"] if isinstance(card.get("data"), dict) else {})
    others = [f"data.{name} was {then[name]}, now it is {value}" for name, value in data.items() if then[name] != value]
    decoded = [other for other in others if other.split()[0].removeprefix("data.") in trained_on.DECODING]
    if decoded:
        return decoded[0]
    if (known := trained_on.read(folder, card)) is None:
        return "; ".join(["its images have changed since, or their files", *others])
    changes = trained_on.changes(known, rows, config.data)
    words = ", ".join(f"{number_of(count, 'image')} {word}" for word, count in changes.items())
    return "; ".join([f"{words} since", *others]) if changes else ""
