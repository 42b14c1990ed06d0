"""Make a classifier of somebody else's file, to be attacked, compared and exported like one that was trained here.

    python jobs/import_model.py --checkpoint resnet50.pth --classifier.name resnet50 --model theirs --output runs/x
    python jobs/import_model.py --checkpoint model.pt2 --model theirs --output runs/x

FILE is a state dict (.safetensors, or what torch.save writes) of a network that --classifier.name names, or a program
(TorchScript, torch.export). Classes and image shape are those of the on-manifold set of OUTPUT, and images are read for the
model as for the set; with --classes, a JSON list of names, no set is needed, the shape is that of --data.channels and
--data.resolution, and images are read as --data.resize and --data.grey_levels say. Without --classifier.mean and
--classifier.std (or a YAML file of yours that says them) the network gets what its file says, or images in [0, 1] as they are;
those of the presets that ship with the package are for networks that are trained here.
"""

import argparse

from dmat_ray import cli, presets
from dmat_ray.config import Config
from dmat_ray.errors import UserError
from dmat_ray.storage import set_folder
from dmat_ray.storage.folders import fetched_input, replace_folder
from dmat_ray.validated import validate


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="the file to import")
    parser.add_argument("--model", required=True, metavar="NAME", help="name of the model, under OUTPUT/models")
    parser.add_argument("--classes", metavar="FILE", help="JSON list of class names (default: those of the on-manifold set)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model of this name")


def given_normalisation(config: Config, arguments: argparse.Namespace) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The normalisation that the command line names, or a YAML file of the user's; None if neither does.

    That of a preset that ships with the package is of the preset's own network.
    """
    layers = {"classifier": presets.load(arguments.preset, shipped=False).get("classifier", {})}
    found = []
    for key in ("mean", "std"):
        if vars(arguments).get(f"classifier.{key}") is not None:
            found.append(getattr(config.classifier, key))
        elif key in layers["classifier"]:
            found.append(getattr(validate(layers).classifier, key))
    if len(found) == 1:
        raise UserError("give both, --classifier.mean and --classifier.std, or neither")
    return (found[0], found[1]) if found else None


def main() -> None:
    config, arguments = cli.parse(str(__doc__), add=add)
    config = validate({**config.to_json(), "name": arguments.model})
    if not config.name:
        raise UserError("--model needs a name")
    from dmat_ray.exchange import model_import
    from dmat_ray.training.trained_models import model_folder

    folder = model_folder(config)
    if (folder.is_dir() or folder.is_file()) and not arguments.overwrite:
        raise UserError(f"'{folder}' is there already; give another --model, or --overwrite")
    from dmat_ray.data import set_reader, sources
    from dmat_ray.models import trained_settings

    channels, resolution = config.data.channels, config.data.resolution
    if arguments.classes:
        class_names = model_import.read_class_names(fetched_input(arguments.classes, "file of class names"))
    else:
        if not set_folder(config).is_dir():
            raise UserError(
                f"there is no on-manifold set at '{set_folder(config)}' to take classes from; give --classes FILE.json"
            )
        manifest = set_reader.read_manifest(set_folder(config))
        class_names, (channels, resolution, _) = tuple(manifest["class_names"]), manifest["shapes"]["on_manifold"]
        # as the manifest says: where a later version, or another program, wrote it `of_set` may have what nobody said of the set
        how, source = set_reader.decoding_of(manifest), str(manifest["data"].get("source"))
        how["resize"] = sources.resize_like(source, how["resize"])
        config = config.model_copy(update={"data": trained_settings.of_set(config, manifest).data.model_copy(update=how)})
    path, given = fetched_input(arguments.checkpoint, "checkpoint"), given_normalisation(config, arguments)
    found = model_import.read_model(path, config.classifier, given, channels, resolution, len(class_names))
    replace_folder(folder, lambda fresh: model_import.save_model(found, path, config, class_names, channels, resolution, fresh))
    shape = f"{resolution}x{resolution} images with {channels} channel(s)"
    print(f"{path.name}: {found.format} of {found.config.name}; {shape}, {len(class_names)} classes")
    for note in found.notes:
        print(f"  note: {note}")
    print(f"model in {folder}; attack it with jobs/evaluate.py --models {config.name} --output {config.output}")


if __name__ == "__main__":
    cli.run(main)
