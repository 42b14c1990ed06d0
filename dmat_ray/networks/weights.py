"""Weights that dmat_ray uses and does not carry: what each is called, how to recognise it, and how to get it.

Nothing is ever downloaded here. A file is looked for where the settings say, or in the torch cache (`TORCH_HOME`); if it
is not there, the error says how to get it, and a file with another content than its name promises is refused.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from dmat_ray.errors import UserError
from dmat_ray.storage import Location, at
from dmat_ray.storage.files import sha256
from dmat_ray.storage.folders import fetched

SHIPPED_GENERATORS = ("mnist32",)
HOW_TO_GET_A_GENERATOR = (
    f"give {' or '.join(map(repr, SHIPPED_GENERATORS))}, or a folder written by jobs/train_generator.py or "
    "jobs/import_generator.py (which reads checkpoints of StyleGAN 1 and 2 by others)"
)


@dataclass(frozen=True)
class Weights:
    """One file: `sha256` is the whole digest, or the start of it where only that is published; None if neither is."""

    file: str
    sha256: str | None
    what: str
    how: str


def _torchvision(model: str, file: str) -> Weights:
    # torchvision names its files by the first eight digits of their sha256
    prefix = file.rsplit("-", 1)[1].removesuffix(".pth")
    command = f"python -c \"import torchvision; torchvision.models.{model}(weights='DEFAULT')\""
    return Weights(file, prefix, f"torchvision's pretrained {model}", f"run {command}")


KNOWN = {
    "lpips_alex": _torchvision("alexnet", "alexnet-owt-7be5be79.pth"),
    "lpips_vgg": _torchvision("vgg16", "vgg16-397923af.pth"),
    "lpips_squeeze": _torchvision("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"),
    "inception": Weights(
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d",
        "the Inception v3 of FID, as torch-fidelity publishes it",
        "take the file of that name from the releases of github.com/toshas/torch-fidelity",
    ),
}


def locate(name: str, path: str, setting: str, alternative: str = "") -> Path:
    """The file of `KNOWN[name]`: at `path`, which may be a URL, or in the torch cache where `path` is 'pretrained'.

    `setting` is what the user would set, `alternative` ends the message. Raises UserError if the file is not there, or
    (in the torch cache, where the name is a promise) is another one.
    """
    weights = KNOWN[name]
    if path != "pretrained":
        if not at(path).is_file():
            rest = f"; {alternative}" if alternative else ""
            raise UserError(f"{setting} '{path}' is no file; give 'pretrained' or a file with {weights.what}{rest}")
        return fetched(path)
    found = Path(torch.hub.get_dir()) / "checkpoints" / weights.file
    if not found.is_file():
        raise UserError(
            f"{weights.what} is needed, and '{found}' is not there. On a machine with a network, {weights.how}; then copy "
            f"the file here, set TORCH_HOME, or give its path as {setting}" + (f"; {alternative}" if alternative else "")
        )
    if weights.sha256 and not (digest := sha256(found)).startswith(weights.sha256):
        raise UserError(
            f"'{found}' is not {weights.what}: its sha256 begins with {digest[:8]}, not {weights.sha256[:8]}; get it anew"
        )
    return found


def locate_lpips(net: str, path: str, setting: str = "projection.lpips_weights") -> Path:
    """The file of the backbone `net` of LPIPS, like `locate`."""
    return locate(f"lpips_{net}", path, setting, f"{setting}=random does without")


def generator_place(path: str) -> Location:
    """Folder of a shipped generator's name, or the user's path or URL."""
    return at(Path(str(resources.files("dmat_ray") / "assets" / path)) if path in SHIPPED_GENERATORS else path)


def generator_folder(path: str) -> Path:
    """The same on this machine; raises FileNotFoundError for a URL where nothing is."""
    return fetched(generator_place(path))
