"""Is an on-manifold set whole, and what does it look like? Checks a finished set and writes a page. Needs no Ray.

    python jobs/inspect_set.py --output runs/mine
    python jobs/inspect_set.py --manifold_set s3://bucket/set --generator.path runs/mine/generator --images 10000

Exit code: 0 if the set is sound, 1 if a check failed (a line for each defect), 2 if nothing could be inspected.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from dmat_ray import cli
from dmat_ray.config import Config
from dmat_ray.data.set_format import MANIFEST, SHARDS
from dmat_ray.data.set_settings import SETTINGS
from dmat_ray.errors import UserError
from dmat_ray.storage import at, set_folder


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of images, 0 or more")
    return int(text)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=_count, default=64, metavar="N", help="images rendered again (default: 64)")
    parser.add_argument(
        "--images", type=_count, metavar="N", help="decode and compare about so many, in whole shards (default: all)"
    )
    parser.add_argument("--page", metavar="PATH", help="where the page goes (default: OUTPUT/inspection.html)")
    parser.add_argument("--no-render", action="store_true", help="leave out what needs the generator")


def _loader(config: Config) -> Callable[[str], Any]:
    import torch

    from dmat_ray.manifold import generators

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return lambda precision: generators.load_generator(config.generator.path, device, precision)


def main() -> None:
    config, arguments = cli.parse(str(__doc__), preset=["demo"], add=add)
    folder = set_folder(config)
    page = at(arguments.page) if arguments.page else at(config.output) / "inspection.html"
    if not folder.is_dir():
        raise UserError(f"there is no on-manifold set at '{folder}'; give --output or --manifold_set")
    if not ((folder / MANIFEST).is_file() or (folder / SETTINGS).is_file() or (folder / SHARDS).is_dir()):
        inner = folder / "on_manifold_set"
        hint = f"give --manifold_set {inner}" if inner.is_dir() else "give --output or --manifold_set"
        raise UserError(f"'{folder}' holds no on-manifold set; {hint}")
    from dmat_ray.data.inspection import inspect_set
    from dmat_ray.manifold import generators
    from dmat_ray.manifold.set_maker import warning_of_poor
    from dmat_ray.reports import set_page

    render = not arguments.no_render
    found = inspect_set(
        folder,
        generator_sha256=generators.fingerprint(config.generator.path) if render else None,
        load=_loader(config) if render else None,
        samples=arguments.samples,
        images=arguments.images,
    )
    for check in found.checks:
        print(f"{check.state:<8}  {check.name:<9}  {check.detail}".rstrip())
        for defect in check.defects:
            print(f"          - {defect}")
        if check.more:
            print(f"          - and {check.more} more")
    for warning in found.warnings:
        print(warning)
    try:
        set_page.write(found, page)
    except OSError as error:
        raise UserError(f"the page '{page}' cannot be written: {error.strerror or error}; give another --page") from None
    print(f"page: {page}")
    partly = arguments.images is not None or any(check.state == "not made" for check in found.checks)
    if not found.sound:
        print(f"the set is not sound: {found.defects} defect(s)")
        sys.exit(1)
    manifest = found.manifest
    if manifest is not None and manifest.count:
        usable = sum(manifest.usable.values())
        print(f"{usable} of {manifest.count} images are usable, the others poor")
        if warning := warning_of_poor(manifest.count - usable, manifest.count):
            print(warning)
    print("the set is sound" + (", as far as it was checked" if partly else ""))


if __name__ == "__main__":
    cli.run(main)
