"""What a job writes lies apart from the images that it lists."""

from pathlib import Path

import packed_files
import pytest
import torch
from set_photos import Make, parted_photos, settings_maker

from dmat_ray.data import sources
from dmat_ray.data.apart import require_apart
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import UserError
from dmat_ray.manifold import gan_images, set_maker


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return parted_photos(tmp_path / "photos")


@pytest.fixture
def make(photos: Path, tmp_path: Path, generator_folder: Path) -> Make:
    return settings_maker(photos, tmp_path, generator_folder)


def test_an_output_among_the_images_is_refused(make: Make, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next job would list what this one has written."""
    config = make(None, official_split=True)
    checks = (lambda c: set_maker.prepare(c, print), lambda c: gan_images.prepare_images(c, tmp_path / "train"))
    (tmp_path / "link").symlink_to(photos)
    for name, place in (
        *((name, str(photos / inside)) for name in ("output", "manifold_set") for inside in ("out", "train/class0/out")),
        ("output", str(photos)),
        ("output", str(tmp_path / "link" / "out")),
    ):
        changed = config.model_copy(update={name: place})
        for check in checks if name == "output" else checks[:1]:
            with pytest.raises(
                UserError, match=rf"^{name} '{photos}.*' is in data\.source '{photos}', .*; give another --{name}$"
            ):
                check(changed)
    monkeypatch.setitem(sources.NAMED, "photos", sources.NAMED["mnist5k"])
    monkeypatch.chdir(tmp_path)
    named = config.model_copy(update={"output": "photos/out", "data": config.data.model_copy(update={"source": "photos"})})
    require_apart(named, makes_set=True)
    require_apart(config.model_copy(update={"output": f"{photos}2"}), makes_set=True)
    for source, output in (("s3://b/photos", "s3://b/photos2"), ("s3://b/photos/out", "/photos"), ("s3://b/photos", "s3://b")):
        data = config.data.model_copy(update={"source": source})
        require_apart(config.model_copy(update={"output": output, "data": data}), makes_set=True)
    with pytest.raises(UserError, match=r"output 's3://b/photos/out' is in data\.source 's3://b/photos', "):
        require_apart(
            config.model_copy(
                update={"output": "s3://b/photos/out", "data": config.data.model_copy(update={"source": "s3://b/photos/"})}
            ),
            makes_set=False,
        )
    set_maker.make(config, torch.device("cpu"), print)
    again = config.data.model_copy(update={"source": f"{config.output}/on_manifold_set", "official_split": None})
    with pytest.raises(UserError, match=r"data\.source '.*' is in '.*/on_manifold_set', where the set that is made of it goes; "):
        set_maker.prepare(config.model_copy(update={"data": again}), print)
    require_apart(config.model_copy(update={"data": again}), makes_set=False)  # a generator of the set's images makes no set


@pytest.mark.slow
def test_an_output_that_no_listing_takes_may_lie_among_the_images(make: Make, photos: Path) -> None:
    """The next job lists what this one has listed, and finds that it is done."""
    train, test = (packed_files.arrays(count, 2, (8, 8), seed=count) for count in (8, 4))
    mnist = packed_files.idx(photos.parent / "mnist", train, test)
    for source, place in ((photos, ".runs"), (photos, "train/.runs/out"), (mnist, "runs"), (mnist, "."), (mnist, ".runs")):
        config = make(None, source=str(source), official_split=True).model_copy(update={"output": str(source / place)})
        before = list_examples(config.data).table
        made = set_maker.make(config, torch.device("cpu"), print)
        assert made["count"] == len(before)
        lines: list[str] = []
        assert set_maker.make(config, torch.device("cpu"), lines.append) == made
        known = " and unchanged," if source == mnist else ", of images of the same names (their content is not compared, "
        assert lines[-1].startswith(f"the on-manifold set is whole{known}")
        assert lines[-1].endswith(", nothing to do")
        assert list_examples(config.data).table == before
        if ".runs" in place:
            require_apart(config, makes_set=False)
    with pytest.raises(UserError, match=r"^output '.*/mnist/runs' is in data\.source '.*/mnist', "):
        # a generator has its images' digests in Parquet beside it
        require_apart(config.model_copy(update={"output": str(mnist / "runs")}), makes_set=False)
    with pytest.raises(UserError, match=r"^data\.source '.*/mnist' is in '.*/mnist', where the set "):
        require_apart(config.model_copy(update={"manifold_set": str(mnist)}), makes_set=True)
    (mnist / "class").mkdir()
    (mnist / "class" / "0.png").touch()
    with pytest.raises(UserError, match=r"^output '.*/mnist/runs' is in data\.source '.*/mnist', "):
        require_apart(config.model_copy(update={"output": str(mnist / "runs")}), makes_set=True)
