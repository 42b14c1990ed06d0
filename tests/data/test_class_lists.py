"""Classes made of a source's own: Mixed-10 of a tree and of Parquet files in the shape of ImageNet, and what may be wrong."""

import io
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import packed_files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image

from dmat_ray import presets
from dmat_ray.config import DataConfig
from dmat_ray.data import class_lists
from dmat_ray.data.reading import read, read_pixels
from dmat_ray.data.sources import Listing, list_examples
from dmat_ray.errors import UserError
from dmat_ray.validated import validate

ENCODED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# ImageNet-1k's indices of Mixed-10 by label (docs of the robustness library, and the paper's code)
NAMES = ["dog", "bird", "insect", "monkey", "car", "feline", "truck", "fruit", "fungus", "boat"]
INDICES = [
    *([*range(151, 157)], [*range(7, 13)], [*range(300, 306)], [*range(370, 376)], [407, 436, 468, 511, 609, 627]),
    *([*range(286, 292)], [555, 569, 675, 717, 734, 864], [*range(948, 954)], [*range(991, 997)]),
    [472, 554, 576, 625, 814, 914],
]
OTHERS = {"feline": [*range(281, 287)], "truck": [555, 569, 656, 675, 717, 734], "fruit": [984, 987, 988, 989, 990, 998]}
MIXED10 = presets.load(["mixed10_classes"])["data"]["classes"]
EACH = 8  # images of a synset in the tree, one more of every synset of the first class


@pytest.fixture(scope="module")
def synsets() -> list[str]:
    """ImageNet-1k's WordNet ids in the order of their indices, as timm ships them."""
    timm = pytest.importorskip("timm")
    lines = (Path(timm.__file__).parent / "data/_info/imagenet_synsets.txt").read_text().split()
    assert len(lines) == 1000
    return lines


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, synsets: list[str]) -> Path:
    """train/ with the sixty synsets of Mixed-10, and with two and a file that are none of them."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for index in [k for ks in INDICES for k in ks] + [0, 999]:
        folder = root / "train" / synsets[index]
        folder.mkdir(parents=True)
        for i in range(EACH + (index in INDICES[0])):
            (folder / f"{synsets[index]}_{i}.JPEG").write_bytes(jpeg(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)))
    (root / "train" / "meta.txt").write_text("text")
    return root


def jpeg(pixels: np.ndarray, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def listed(source: object, classes: Any = MIXED10, **settings: Any) -> tuple[Listing, DataConfig]:
    values = {"source": str(source), "resolution": 16, "channels": 3, "classes": classes, **settings}
    config = validate({"data": values}).data
    return list_examples(config), config


def refused(message: str, source: object, classes: Any = MIXED10, **settings: Any) -> None:
    with pytest.raises(UserError, match=message) as told:
        listed(source, classes, **settings)
    assert "\n" not in str(told.value)


def test_mixed10_is_what_is_published_by_index_and_by_synset(synsets: list[str]) -> None:
    assert list(MIXED10) == NAMES
    assert [[index for _, index in members] for members in MIXED10.values()] == INDICES
    other = presets.load(["mixed10_classes", "mixed10_classes_b"])["data"]["classes"]
    assert {name: [index for _, index in other[name]] for name in OTHERS} == OTHERS
    assert list(other) == NAMES
    assert {name: other[name] for name in NAMES if name not in OTHERS} == {n: MIXED10[n] for n in NAMES if n not in OTHERS}
    for members in (*MIXED10.values(), *other.values()):
        assert all(synsets[index] == synset for synset, index in members)


def test_an_imagenet_tree_gives_ten_classes(tree: Path, synsets: list[str]) -> None:
    listing, _ = listed(tree)
    assert list(listing.class_names) == NAMES
    assert listing.table.num_rows == listing.found == 60 * EACH + 6
    label_of = {synsets[k]: label for label, ks in enumerate(INDICES) for k in ks}
    for row in listing.table.to_pylist():
        assert row["id"].startswith("train/n")
        assert row["label"] == label_of[row["id"].split("/")[1]]
    assert listing.ignored == (
        "16 images of 2 classes that data.classes does not name; "
        "1 file of no extension of images, or beside the class folders, the first: 'train/meta.txt'"
    )
    within, _ = listed(tree / "train")
    assert [f"train/{id}" for id in within.table["id"].to_pylist()] == listing.table["id"].to_pylist()
    assert within.table["split"].equals(listing.table["split"])


def test_every_synset_gives_its_share_to_the_test_split(tree: Path) -> None:
    """The published split takes the last of a list in the order of synsets: one synset a class."""
    listing, _ = listed(tree, test_share=0.25)
    tested = Counter(id.split("/")[1] for id in listing.rows("test")["id"].to_pylist())
    assert len(tested) == 60
    assert set(tested.values()) == {2}
    again, _ = listed(tree, test_share=0.25, seed=1)
    assert set(again.rows("test")["id"].to_pylist()) != set(listing.rows("test")["id"].to_pylist())


def test_balanced_classes_are_of_the_size_of_the_smallest_in_each_split(tree: Path) -> None:
    whole, _ = listed(tree)
    assert set(Counter(whole.rows("train")["label"].to_pylist()).values()) == {42, 36}
    listing, _ = listed(tree, balanced=True)
    for split, each in (("train", 36), ("test", 12)):
        rows = listing.rows(split)
        assert set(Counter(rows["label"].to_pylist()).values()) == {each}
        assert set(rows["id"].to_pylist()) <= set(whole.rows(split)["id"].to_pylist()), "the split does not depend on it"
        assert set(Counter(id.split("/")[1] for id in rows["id"].to_pylist()).values()) == {each // 6}, "every synset alike"
    assert listing.found == 486
    limits, _ = listed(tree, balanced=True, train_limit=100, test_limit=50)
    assert set(Counter(limits.rows("train")["label"].to_pylist()).values()) == {10}
    assert set(Counter(limits.rows("test")["label"].to_pylist()).values()) == {5}


def shards(tree: Path, synsets: list[str], folder: Path, *, part: str = "train", named: bool = True) -> Path:
    """The images of a tree as Hugging Face has ImageNet: encoded bytes and numbers of classes, whose names the metadata give."""
    files = sorted((tree / part).rglob("*.JPEG"), key=lambda path: path.relative_to(tree).parts)
    columns = {
        "image": pa.array([{"bytes": p.read_bytes(), "path": p.name} for p in files], ENCODED),
        "label": pa.array([synsets.index(p.parent.name) for p in files], pa.int64()),
    }
    features = {"image": {"_type": "Image"}, "label": {"names": [f"name {k}" for k in range(1000)], "_type": "ClassLabel"}}
    table = pa.table(columns)
    if named:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir(parents=True, exist_ok=True)
    for k, start in enumerate(range(0, table.num_rows, 200)):
        pq.write_table(table.slice(start, 200), folder / f"{part}-{k:05d}-of-00003.parquet")
    return folder


@pytest.mark.parametrize("named", [True, False])
def test_parquet_files_give_the_same_as_the_tree(tree: Path, synsets: list[str], tmp_path: Path, named: bool) -> None:
    here, config_here = listed(tree)
    there, config = listed(shards(tree, synsets, tmp_path / "data", named=named))
    assert there.class_names == here.class_names
    for column in ("label", "split"):
        assert there.table[column].to_pylist() == here.table[column].to_pylist()
    assert read(there.table, config) == read(here.table, config_here)
    assert there.ignored == "16 images of 2 classes that data.classes does not name"


def test_names_in_metadata_and_text_labels_will_do_as_well(tree: Path, synsets: list[str], tmp_path: Path) -> None:
    source = shards(tree, synsets, tmp_path)
    numbers, _ = listed(source, {"a": [151, 152], "b": [7]})
    names, _ = listed(source, {"a": ["name 151", "name 152"], "b": ["name 7"]})
    assert names.table.equals(numbers.table)
    refused(r"class 'name 7' \(7\) of '.*' is named in 'a' and in 'b'", source, {"a": [7], "b": ["name 7", 151]})


@pytest.mark.parametrize(
    ("names", "classes", "told"),
    [
        (sorted(map(str, range(12))), {"a": ["2"], "b": ["1"]}, "'2' is the name of class 4 and the number of class '10' of '"),
        (["crane", "dog", "crane"], {"a": ["crane"], "b": ["dog"]}, "'crane' is the name of classes 0 and 2 of '"),
        (["crane", "dog", "crane"], {"a": [["n02012849", "crane"]], "b": [1]}, "'crane' is the name of classes 0 and 2 of '"),
        (["1", "dog", "1"], {"a": ["1"], "b": [2]}, "'1' is the name of classes 0 and 2 and the number of class 'dog' of '"),
    ],
)
def test_what_two_classes_are_called_is_refused(tmp_path: Path, names: list[str], classes: Any, told: str) -> None:
    """Hugging Face's imagefolder numbers folders in the order of text; ImageNet's names are not all different."""
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table({"image": [b"x"] * (4 * len(names)), "label": [*range(len(names))] * 4})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "x.parquet")
    refused(f"data.classes: {told}", tmp_path, classes)
    # a number that is the name of the same class, or of no other, will do
    numbers, _ = listed(tmp_path, {"a": [0], "b": ["dog"]} if "dog" in names else {"a": [0], "b": [1]})
    assert {int(id.split("#")[1]) % len(names) for id in numbers.table["id"].to_pylist()} == {0, 1}


def test_parts_of_the_source(tree: Path, synsets: list[str], tmp_path: Path) -> None:
    """ImageNet's validation images are the test split, unless they are to be left aside, as the paper does."""
    root = tmp_path / "imagenet"
    root.mkdir()
    (root / "train").symlink_to(tree / "train")
    for index in (151, 7, 0):
        folder = root / "val" / synsets[index]
        folder.mkdir(parents=True)
        (folder / "ILSVRC2012_val_1.JPEG").write_bytes(jpeg(np.zeros((20, 20, 3), np.uint8)))
    (root / "test").mkdir()
    (root / "test" / "ILSVRC2012_test_1.JPEG").write_bytes(jpeg(np.zeros((20, 20, 3), np.uint8)))
    two = {"dog": [[synsets[151], 151]], "bird": [[synsets[7], 7]]}
    official, _ = listed(root, two)
    assert official.rows("test")["id"].to_pylist() == [f"val/{synsets[k]}/ILSVRC2012_val_1.JPEG" for k in (7, 151)]
    assert Counter(official.rows("train")["label"].to_pylist()) == {0: EACH + 1, 1: EACH}
    assert "the folder 'test' (data.official_split)" in official.ignored
    own, _ = listed(root, two, official_split=False)
    assert {id.split("/")[0] for id in own.table["id"].to_pylist()} == {"train"}
    assert "the folder 'val' (data.official_split)" in own.ignored
    refused("data.official_split is true, but '.*' has no folder 'test' or 'val'", tree, official_split=True)
    # the same of Parquet files, whose test labels are kept secret; these of a tree without classes of its own
    for part in ("train", "val"):
        shards(root, synsets, tmp_path / "data", part=part)
    secret = pa.table({"image": pa.array([{"bytes": b"", "path": ""}]), "label": pa.array([-1], pa.int64())})
    pq.write_table(secret, tmp_path / "data" / "test-00000-of-00001.parquet")
    there, _ = listed(tmp_path / "data", two)
    assert there.table["split"].to_pylist().count("test") == 2
    assert there.ignored.endswith(
        "1 Parquet files of other parts, the first: 'test-00000-of-00001.parquet' (data.official_split)"
    )
    for classes in (two, ()):
        own, _ = listed(tmp_path / "data", classes, official_split=False)
        assert {name[:6] for name in own.table["file"].to_pylist()} == {b"train-"}


def test_a_tree_with_parts_needs_no_class_lists_when_asked(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("test", 3)):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / part / name / f"{i}.png").write_bytes(jpeg(np.full((20, 20, 3), i, np.uint8), kind="PNG"))
    listing, _ = listed(tmp_path, (), official_split=True)
    assert listing.class_names == ("a", "b")
    assert Counter(listing.table["split"].to_pylist()) == {"train": 12, "test": 6}
    refused("has the folders 'test', 'train', which look like parts of a data set", tmp_path, ())
    own, _ = listed(tmp_path, (), official_split=False)
    assert own.class_names == ("a", "b")
    assert {id.split("/")[0] for id in own.table["id"].to_pylist()} == {"train"}
    assert "the folder 'test' (data.official_split)" in own.ignored
    refused("has no folders 'train' and 'test' or 'val'", tmp_path / "train", (), official_split=True)


def test_what_is_missing_is_all_told(tree: Path, tmp_path: Path, synsets: list[str]) -> None:
    for name in sorted(p.name for p in (tree / "train").iterdir() if p.is_dir()):
        if name not in (synsets[152], synsets[814]):
            (tmp_path / name).symlink_to(tree / "train" / name)
    (tmp_path / synsets[152]).mkdir()  # there, and empty
    refused(
        rf"lacks 2 of the 60 that data\.classes names: '{synsets[152]}' \(of 'dog'\), '{synsets[814]}' \(of 'boat'\); ", tmp_path
    )
    unknown = {**MIXED10, "dog": [*MIXED10["dog"], "n02085621"]}
    refused(r"lacks 1 of the 61 .*: 'n02085621' \(of 'dog'\); 'n02085621' may be meant for 'n02085620'", tree, unknown)
    refused(r"lacks 60 of the 60 .*; it has 'val'$", make_one(tmp_path / "wrong"))


def make_one(root: Path) -> Path:
    (root / "val").mkdir(parents=True)
    (root / "val" / "x.JPEG").write_bytes(jpeg(np.zeros((20, 20, 3), np.uint8)))
    return root


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        ({"a": ["x", "y"], "b": ["y"]}, r"data: classes: 'y' is in class 'a' and in class 'b'; an image has one label"),
        ({"a": ["x", ["z", "x"]], "b": ["y"]}, r"'x' is twice in class 'a'"),
        ({"a": [], "b": ["y"]}, r"data\.classes\.0\.members"),
        ({"a": [[]], "b": ["y"]}, r"data: classes: an entry of 'a' is empty; give the name of a class"),
        ({"a": ["x", ["z", ""]], "b": ["y"]}, r"an entry of 'a' is empty"),
        ({"a": "x", "b": ["y"]}, r"class 'a' must be a list of folders or labels, not 'x'"),
        ([{"name": "a", "members": [["x"]]}, {"name": "a", "members": [["y"]]}], r"two are called 'a'"),
        *(
            ({"a": ["x"], **classes}, rf"data\.classes: {found} is no name of a class; .* in quotes")
            for classes, found in (
                ({True: ["y"]}, "True"),
                ({None: ["y"]}, "None"),
                ({"b": [False]}, "False"),
                ({"b": [["y", 1.0]]}, r"1\.0"),
                ({"b": [{"y": "z"}]}, r"\{'y': 'z'\}"),
            )
        ),
    ],
)
def test_lists_that_cannot_be(classes: Any, told: str, tmp_path: Path) -> None:
    refused(told, tmp_path, classes)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_are_the_same_apart_from_their_letters(tmp_path: Path, form: Any) -> None:
    """As a folder has them that was copied from a Mac."""
    for name in ("caf\u00e9", "dog"):
        (tmp_path / unicodedata.normalize(form, name)).mkdir()
        for i in range(4):
            (tmp_path / unicodedata.normalize(form, name) / f"{i}.jpg").write_bytes(jpeg(np.full((24, 24, 3), i, np.uint8)))
    for written in ("caf\u00e9", "cafe\u0301"):
        listing, _ = listed(tmp_path, {"drink": [written], "pet": ["dog"]})
        assert Counter(listing.table["label"].to_pylist()) == {0: 4, 1: 4}


def test_one_class_is_still_too_few(tree: Path) -> None:
    refused(r"has one class only \('dog'\)", tree, {"dog": MIXED10["dog"]})


@pytest.mark.slow
def test_classes_of_cifar_and_of_digits(tmp_path: Path) -> None:
    packed_files.cifar10_binary(tmp_path, packed_files.arrays(100, 10), packed_files.arrays(20, 10, seed=1))
    listing, _ = listed(tmp_path, {"cats and dogs": ["cat", 5], "ships": ["ship"]})
    assert Counter(listing.rows("train")["label"].to_pylist()) == {0: 20, 1: 10}
    assert Counter(listing.rows("test")["label"].to_pylist()) == {0: 4, 1: 2}
    digits, _ = listed("mnist5k", {"odd": [1, 3, 5, 7, 9], "even": [0, 2, 4, 6, 8]}, resolution=28)
    assert Counter(digits.table["label"].to_pylist()) == {0: 2500, 1: 2500}


def test_lists_keep_their_order_through_sorted_json(tree: Path) -> None:
    """Checkpoints and manifests sort the keys of what they hold."""
    config = validate({"data": {"source": str(tree), "classes": MIXED10}})
    again = validate(json.loads(json.dumps(config.to_json(), sort_keys=True)))
    assert again == config
    assert [one.name for one in again.data.classes] == NAMES


def test_the_odd_files_of_imagenet_are_read(tmp_path: Path) -> None:
    """One is a PNG in spite of its name, and 22 are CMYK; torchvision's way to read and to scale is the published one."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((50, 40), Image.Resampling.BICUBIC)
    )
    kinds = {"rgb": jpeg(smooth), "cmyk": jpeg(smooth, "CMYK"), "png": jpeg(smooth, kind="PNG"), "grey": jpeg(smooth, "L")}
    for name in "ab":
        (tmp_path / name).mkdir()
        for kind, content in kinds.items():
            (tmp_path / name / f"{kind}.JPEG").write_bytes(content)
    (tmp_path / "a" / "broken.JPEG").write_bytes(kinds["rgb"][:200])
    listing, config = listed(tmp_path, (), resolution=32, resize="stretch")
    found = dict(zip(listing.table["id"].to_pylist(), read_pixels(listing.table, config), strict=True))
    assert str(found.pop("a/broken.JPEG")).startswith("cannot be read as an image: damaged JPEG")
    published = torchvision.transforms.Resize((32, 32))
    for id, pixels in found.items():
        theirs = np.asarray(published(Image.open(tmp_path / id).convert("RGB"))).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels, theirs)
        plain = np.asarray(published(Image.fromarray(smooth))).transpose(2, 0, 1).astype(int)
        if not id.endswith("grey.JPEG"):
            assert np.abs(np.asarray(pixels, int) - plain).mean() < 8, "the colours are those that were saved"


def parts(values: Sequence[str]) -> Counter[str]:
    return Counter(value.split("-")[0] for value in values)


def test_hugging_face_cifar(tmp_path: Path) -> None:
    """`img` and `label`, or `fine_label`; the official test set when it is asked for."""
    for part, count in (("train", 20), ("test", 10)):
        contents = [jpeg(np.full((32, 32, 3), i, np.uint8), kind="PNG") for i in range(count)]
        table = pa.table(
            {
                "img": pa.array([{"bytes": c, "path": None} for c in contents], ENCODED),
                "fine_label": pa.array([i % 4 for i in range(count)]),
                "coarse_label": pa.array([i % 2 for i in range(count)]),
            }
        )
        pq.write_table(table, tmp_path / f"{part}-00000-of-00001.parquet")
    cifar = {"resolution": 32, "official_split": True}
    refused("has no column 'image' .data.image_column.; it has 'img', 'fine_label', 'coarse_label'", tmp_path, (), **cifar)
    refused("has no column 'label' .data.label_column.; it has 'img', 'fine_label'", tmp_path, (), image_column="img", **cifar)
    columns = {"image_column": "img", "label_column": "fine_label", **cifar}
    listing, config = listed(tmp_path, (), **columns)
    assert listing.class_names == ("0", "1", "2", "3")
    assert parts(listing.rows("test")["id"].to_pylist()) == {"test": 10}
    assert parts(listing.rows("train")["id"].to_pylist()) == {"train": 20}
    assert all(not isinstance(p, str) for p in read_pixels(listing.table, config))
    told = "has Parquet files of parts .*, such as 'train-00000-of-00001.parquet' and 'test-00000-of-00001.parquet'; give --data"
    refused(told, tmp_path, (), **{**columns, "official_split": None})


def test_the_names_of_many_classes_are_looked_up_in_linear_time() -> None:
    """Each is compared with those of its own name alone."""
    compared = 0

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    names = [Name(f"class {i}") for i in range(500)]
    class_lists._require_one_class_each(names, [(Name(name), "") for name in names], "x")
    assert compared < 10 * len(names)
