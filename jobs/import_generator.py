"""Make a generator of somebody else's checkpoint: weights in safetensors, a card, a grid of samples.

    python jobs/import_generator.py --checkpoint FILE --output runs/x

Reads StyleGAN 1 of InterFaceGAN, HiGAN and GenForce (.pth), StyleGAN 2 of rosinality (.pt) and of NVlabs (.pkl), a folder
of dmat_ray, and a decoder exported as a program (TorchScript, torch.export), whose shapes --card describes. The format is
recognised by content. Nothing in a checkpoint is executed; of a program, only arithmetic is.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmat_ray import cli
from dmat_ray.errors import UserError
from dmat_ray.storage import local_output
from dmat_ray.storage.folders import fetched_input, replace_folder
from dmat_ray.storage.lease import sole


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="the file or folder to import")
    parser.add_argument("--card", metavar="FILE", help="JSON card of a decoder that is an exported program")
    parser.add_argument("--overwrite", action="store_true", help="replace a generator that is already in the output folder")


def import_weights(path: Path, folder: Path) -> None:
    """Write the generator in `path`, a checkpoint or a folder of ours, into `folder`."""
    from dmat_ray.manifold import exported, foreign, generators
    from dmat_ray.manifold.samples import sample_grid
    from dmat_ray.models.checkpoint import versions
    from dmat_ray.storage.files import sha256

    if path.is_dir():
        card = generators.read_card(str(path))
        if card["kind"] in exported.FILES:
            raise UserError(f"checkpoint '{path}' is a folder with a program: use it as --generator.path {path}")
        generator = generators.load_generator(str(path))
        found, notes = "folder of dmat_ray", []
    else:
        imported = foreign.import_checkpoint(path)
        generator, found, notes = imported.generator, imported.format, imported.notes
        source = {"file": path.name, "sha256": sha256(path), "format": found}
        card = {"source": source, "notes": notes, "versions": versions()}
    classes = f", {generator.num_classes} classes" if generator.num_classes else ""
    print(
        f"{path.name}: {found}; {generator.resolution}x{generator.resolution} images with {generator.channels} channel(s)"
        f"{classes}, z of {generator.z_dim}, W+ of {generator.num_ws}x{generator.w_dim}"
    )
    for note in notes:
        print(f"  note: {note}")
    folder.mkdir(parents=True)
    (folder / "samples.png").write_bytes(sample_grid(generator))
    generators.save_generator(folder, generator, card)
    if path.is_dir():
        copy_companions(path, card, folder)


def copy_companions(path: Path, card: dict[str, Any], folder: Path) -> None:
    """Copy what lies beside the weights in `path`, a folder of ours with this card, and is still true of those in `folder`: the
    table of the images that they were trained on, and their encoder.
    """
    from dmat_ray.manifold import encoder, generators, trained_on

    if trained_on.read(path, card) is not None:
        shutil.copyfile(path / trained_on.IMAGES, folder / trained_on.IMAGES)
    if not (path / encoder.CARD).is_file():
        return
    try:
        encoder.load_encoder(path, generators.fingerprint(str(folder)))
    except UserError as error:
        print(f"  note: its encoder is left out: {error}")
        return
    for name in (encoder.WEIGHTS, encoder.CARD):
        shutil.copyfile(path / name, folder / name)


def import_program(path: Path, card: Path | None, folder: Path) -> None:
    """Write the program in `path` and its card into `folder`."""
    from dmat_ray.manifold import exported, generators
    from dmat_ray.manifold.samples import sample_grid

    exported.import_program(path, card, folder)
    decoder = generators.load_generator(str(folder))
    (folder / "samples.png").write_bytes(sample_grid(decoder))
    shape = f"{decoder.resolution}x{decoder.resolution} images with {decoder.channels} channel(s)"
    print(f"{path.name}: {generators.read_card(str(folder))['kind']}; {shape}, W+ of {decoder.num_ws}x{decoder.w_dim}")


def require_free(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError for a folder that holds what is not to be replaced."""
    if (folder / "card.json").exists() and not overwrite:
        raise UserError(f"'{folder}' holds a generator already; give another --output, or --overwrite")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; give another --output")
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        raise UserError(f"'{folder}' is not empty; give another --output, or --overwrite to remove what is in it")


def writer_of(path: Path, card: str | None) -> Callable[[Path], None]:
    """What writes the generator in `path`, a program with its card or a checkpoint, into a fresh folder."""
    from dmat_ray.manifold import exported

    is_program = path.is_file() and exported.is_program(path)
    if card and not is_program:
        raise UserError(
            f"--card describes exported programs only, and '{path}' is none, or a damaged one; export it again, or leave "
            "--card away for a checkpoint"
        )
    described = fetched_input(card, "card") if card else None

    def write(fresh: Path) -> None:
        if is_program:
            import_program(path, described, fresh)
        else:
            import_weights(path, fresh)

    return write


def main() -> None:
    config, arguments = cli.parse(str(__doc__), add=add)
    folder = local_output(config, "jobs/import_generator.py") / "generator"
    path = fetched_input(arguments.checkpoint, "checkpoint")
    require_free(folder, overwrite=arguments.overwrite)
    write = writer_of(path, arguments.card)
    from dmat_ray.manifold.gan_folder import trunk_of

    with sole(folder):
        require_free(folder, overwrite=arguments.overwrite)  # still
        replace_folder(folder, write)
        # that of the generator before, only now: until this one is there that one is trained for longer from it
        shutil.rmtree(trunk_of(folder), ignore_errors=True)
    print(f"generator in {folder}; use it with --generator.path {folder}")


if __name__ == "__main__":
    cli.run(main)
