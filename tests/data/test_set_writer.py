"""How a set comes to be: what counts as finished, what is still to be done, and that no image is there twice or missing."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3
from hypothesis import given
from hypothesis import strategies as st

from dmat_ray.config import ProjectionConfig
from dmat_ray.data import set_format, set_reader, set_writer
from dmat_ray.data.set_settings import are_of, begin
from dmat_ray.data.set_writer import Shard, finish, is_finished, plan, read_records, unfinished, write_shard
from dmat_ray.data.sources import Listing
from dmat_ray.errors import StorageError, UserError
from dmat_ray.storage import Location, at

SETTINGS = {"projection": {"lr": 0.1, "steps": 5}, "class_names": ["a", "b"]}


def listing(count: int = 10) -> Listing:
    """Images of two classes by turns, every fifth a test image."""
    columns = {
        "id": [f"{i:03d}" for i in range(count)],
        "split": ["test" if i % 5 == 4 else "train" for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    return Listing(pa.table(columns), ("a", "b"))


def write(folder: Location, shard: Shard, rejected: Sequence[str] = ()) -> None:
    """What a projection of the shard writes, with these images unreadable."""
    rows = [r for r in shard.rows.to_pylist() if r["id"] not in rejected]
    rng = np.random.default_rng(len(rows))
    columns = {
        "id": [r["id"] for r in rows],
        "split": [r["split"] for r in rows],
        "label": [r["label"] for r in rows],
        "image": [{"bytes": b"x", "path": r["id"]} for r in rows],
        "on_manifold": set_format.to_netpbm(rng.integers(0, 256, (len(rows), 1, 4, 4), dtype=np.uint8)),
        "w": set_format.fixed_list(rng.standard_normal((len(rows), 2, 3)).astype(np.float32), pa.float32()),
        **{name: np.full(len(rows), 0.25, np.float32) for name in ("lpips", "l1", "l2")},
        "steps": [5] * len(rows),
        "status": ["poor" if r["id"] == "003" else "ok" for r in rows],
    }
    write_shard(
        folder, shard.name, pa.table(columns, schema=set_format.schema(1, 4, 2, 3, ["a", "b"])), dict.fromkeys(rejected, "why")
    )


def finished(folder: Location, shards: Sequence[Shard], **described: object) -> dict[str, Any]:
    shapes = {"on_manifold": [1, 4, 4], "w": [2, 3]}
    whole = {"data": {}, "generator_sha256": "0", "shapes": shapes, "versions": {"x": "0"}, **described}
    return finish(folder, SETTINGS, shards, read_records(folder), whole)


def todo(folder: Location, shards: Sequence[Shard]) -> dict[str, list[str]]:
    return {s.name: s.rows["id"].to_pylist() for s in unfinished(shards, read_records(folder))}


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return at(tmp_path / "set")


@pytest.fixture
def shards() -> list[Shard]:
    return plan(listing(), 4)


def test_the_plan_cuts_the_listing_in_its_order(shards: list[Shard]) -> None:
    assert [(s.name, s.rows["id"].to_pylist()) for s in shards] == [
        ("part-000000.parquet", ["000", "001", "002", "003"]),
        ("part-000001.parquet", ["004", "005", "006", "007"]),
        ("part-000002.parquet", ["008", "009"]),
    ]


def test_what_is_written_is_not_done_again(folder: Location, shards: list[Shard]) -> None:
    assert list(todo(folder, shards)) == [s.name for s in shards]
    write(folder, shards[1])
    assert list(todo(folder, shards)) == ["part-000000.parquet", "part-000002.parquet"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    pq.write_table(pa.table({"id": ["004"]}), path)


@pytest.mark.parametrize("damage", [_cut, _empty, _foreign, Path.unlink])
def test_a_damaged_shard_is_done_again(folder: Location, shards: list[Shard], damage: object) -> None:
    for shard in shards:
        write(folder, shard)
    assert todo(folder, shards) == {}
    damage(Path(folder.key) / "shards" / "part-000001.parquet")  # type: ignore[operator]
    assert list(todo(folder, shards)) == ["part-000001.parquet"]


def test_only_what_could_not_be_read_is_tried_again(folder: Location, shards: list[Shard]) -> None:
    write(folder, shards[0], rejected=["001", "002"])
    write(folder, shards[1])
    write(folder, shards[2], rejected=["008", "009"])
    first = todo(folder, shards)
    assert first == {"part-000000-1.parquet": ["001", "002"], "part-000002-1.parquet": ["008", "009"]}
    again = {s.name: s for s in unfinished(shards, read_records(folder))}
    write(folder, again["part-000002-1.parquet"], rejected=["008", "009"])
    assert todo(folder, shards) == first, "a supplement without an image is no file"
    write(folder, again["part-000000-1.parquet"], rejected=["002"])
    assert todo(folder, shards)["part-000000-2.parquet"] == ["002"]
    manifest = finished(folder, shards)
    assert manifest["rejected"] == {"002": "why", "008": "why", "009": "why"}
    assert manifest["count"] == 7
    assert manifest["shards"] == {
        "part-000000.parquet": 2, "part-000000-1.parquet": 1, "part-000001.parquet": 4, "part-000002.parquet": 0,
    }  # fmt: skip
    found = pa.concat_tables(pq.read_table(Path(folder.key) / "shards" / name) for name in manifest["shards"])
    assert sorted(found["id"].to_pylist()) == ["000", "001", "003", "004", "005", "006", "007"]


@given(st.data())
def test_whatever_is_lost_the_rest_makes_the_set_whole(data: st.DataObject) -> None:
    """Runs that are cut short, images that come and go, files that vanish or rot: what is left to do is just what is missing."""
    shards, ids = plan(listing(), 4), [f"{i:03d}" for i in range(10)]
    with tempfile.TemporaryDirectory() as name:
        folder, files = at(name), Path(name) / "shards"
        for _ in range(data.draw(st.integers(1, 5))):
            unreadable = data.draw(st.sets(st.sampled_from(ids)))
            work = data.draw(st.permutations(unfinished(shards, read_records(folder))))
            for shard in work[: data.draw(st.integers(0, len(work)))]:
                write(folder, shard, [id for id in shard.rows["id"].to_pylist() if id in unreadable])
            for path in sorted(files.glob("*.parquet")):
                if data.draw(st.integers(0, 3)) == 0:
                    data.draw(st.sampled_from([_cut, _empty, _foreign, Path.unlink]))(path)
        held = [id for path in files.glob("*.parquet") for id in _readable(path)]
        assert len(set(held)) == len(held)
        work = unfinished(shards, read_records(folder))
        assert sorted(held + [id for s in work for id in s.rows["id"].to_pylist()]) == ids, "all that is missing, and no more"
        lost = set(data.draw(st.sets(st.sampled_from(ids)))) - set(held)
        for shard in work:
            write(folder, shard, [id for id in shard.rows["id"].to_pylist() if id in lost])
        manifest = finished(folder, shards)
        assert manifest["rejected"].keys() == lost
        assert {path.name for path in files.iterdir()} == manifest["shards"].keys()
        found = pq.read_table(files)["id"].to_pylist()
        assert sorted(found) == sorted(set(ids) - lost)
        assert is_finished(folder, SETTINGS)


def test_a_lost_shard_is_made_again_though_its_images_came_in_supplements(folder: Location, shards: list[Shard]) -> None:
    """Two images that could not be read, one repaired, then the other as well, and then the shard is lost."""
    one = shards[:1]
    write(folder, one[0], rejected=["000", "001"])
    (supplement,) = unfinished(one, read_records(folder))
    write(folder, supplement, rejected=["001"])
    (Path(folder.key) / "shards" / "part-000000.parquet").unlink()
    assert todo(folder, one) == {"part-000000.parquet": ["001", "002", "003"]}
    write(folder, unfinished(one, read_records(folder))[0])
    assert todo(folder, one) == {}, "though the supplement says that 001 could not be read"
    manifest = finished(folder, one)
    assert (manifest["count"], manifest["rejected"]) == (4, {})
    # the shard now knows nothing of 000, which only the supplement has
    (Path(folder.key) / "shards" / "part-000000-1.parquet").unlink()
    assert todo(folder, one) == {"part-000000-1.parquet": ["000"]}
    write(folder, unfinished(one, read_records(folder))[0])
    assert finished(folder, one)["count"] == 4


def _readable(path: Path) -> list[str]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError):
        return []
    return table["id"].to_pylist() if "w" in table.column_names else []


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_no_reason_to_project_again(tmp_path: Path, shards: list[Shard]) -> None:
    with s3.serving(tmp_path) as server:
        server.put("bucket", {})
        folder = at("s3://bucket/set")
        for shard in shards:
            write(folder, shard)
        finished(folder, shards)
        with s3.environment(AWS_ENDPOINT_URL="http://127.0.0.1:9"), s3.asked_once():
            for ask in (lambda: read_records(folder), lambda: is_finished(folder, SETTINGS)):
                with pytest.raises(StorageError, match=r"127\.0\.0\.1:9 cannot be reached"):
                    ask()
            with pytest.raises(StorageError, match=r"127\.0\.0\.1:9 cannot be reached"):
                set_writer.read_record(folder, shards[0].name)
        assert is_finished(folder, SETTINGS)


def test_the_manifest_says_what_the_rows_say(folder: Location, shards: list[Shard]) -> None:
    for shard in shards:
        write(folder, shard)
    manifest = finished(folder, shards, versions={"x": "1"})
    assert manifest == set_reader.read_manifest(folder)
    assert manifest["splits"] == {"test": 2, "train": 8}
    assert manifest["status"] == {"ok": 9, "poor": 1}
    assert manifest["usable"] == {"test": 2, "train": 7}
    assert manifest["means"] == {"l1": 0.25, "l2": 0.25, "lpips": 0.25}
    assert (manifest["projection"], manifest["versions"]) == (SETTINGS["projection"], {"x": "1"})


def test_classes_that_have_lost_all_their_images_are_named(folder: Location) -> None:
    """003 is poor, 001 and 005 to 009 are unreadable: class b is left with a test image only."""
    shards = plan(listing(), 4)
    write(folder, shards[0], rejected=["001"])
    write(folder, shards[1], rejected=["005", "006", "007"])
    write(folder, shards[2], rejected=["008"])
    manifest = finished(folder, shards)
    assert manifest["usable"] == {"test": 2, "train": 2}
    assert manifest["classes_without_usable"] == {"train": ["b"]}
    assert is_finished(folder, SETTINGS)
    few = {"train": ["b"], "test": [*"cdefghi"]}
    assert set_reader.warnings_of_lost({"classes_without_usable": few}, "train", "test") == [
        f"warning: no usable {split} image of {names}: all were rejected, or are poor (projection.poor_l1, "
        "projection.poor_lpips); give more images, a generator that can make these, or higher limits"
        for split, names in (("training", "'b'"), ("test", "'c', 'd', 'e', 'f', 'g' and 2 more classes"))
    ]
    # a class that a limit leaves without images is not lost
    one = plan(Listing(listing().table.filter(pa.array([i % 2 == 0 for i in range(10)])), ("a", "b")), 10)
    other = at(f"{folder.key}2")
    write(other, one[0])
    assert "classes_without_usable" not in finished(other, one)


def test_an_image_that_is_missing_or_there_twice_is_no_finished_set(folder: Location, shards: list[Shard]) -> None:
    write(folder, shards[0])
    write(folder, shards[1])
    with pytest.raises(RuntimeError, match=r"part-000002\.parquet' is missing"):
        finished(folder, shards)
    write(folder, Shard(shards[2].name, shards[2].rows.slice(0, 1)))
    with pytest.raises(RuntimeError, match="hold 9 images, 1 of 10 are missing"):
        finished(folder, shards)
    write(folder, Shard(shards[2].name, pa.concat_tables([shards[2].rows, shards[0].rows.slice(0, 1)])))
    with pytest.raises(RuntimeError, match="hold 11 images, 0 of 10 are missing"):
        finished(folder, shards)
    assert not (folder / "manifest.json").is_file()


def test_a_set_is_finished_under_its_own_settings_only(folder: Location, shards: list[Shard]) -> None:
    for shard in shards:
        write(folder, shard)
    assert not is_finished(folder, SETTINGS)
    finished(folder, shards)
    assert is_finished(folder, SETTINGS)
    assert not is_finished(folder, {**SETTINGS, "class_names": ["a", "c"]})
    manifest = json.loads((Path(folder.key) / "manifest.json").read_text())
    manifest["projection"]["lpips_weights"] = "a.pth"
    (folder / "manifest.json").write_json(manifest)
    by_path = {**SETTINGS, "projection": manifest["projection"]}
    moved = {**SETTINGS, "projection": {**manifest["projection"], "lpips_weights": "b.pth"}}
    assert [is_finished(folder, {**made, "lpips_sha256": "1"}) for made in (by_path, moved)] == [True, False]
    (folder / "manifest.json").write_json({**manifest, "lpips_sha256": "1"})
    assert [is_finished(folder, {**moved, "lpips_sha256": digest}) for digest in ("1", "2")] == [True, False]
    (folder / "manifest.json").write_json({**manifest, "projection": SETTINGS["projection"]})
    _cut(Path(folder.key) / "shards" / "part-000001.parquet")
    assert not is_finished(folder, SETTINGS)


def test_other_settings_are_named(folder: Location) -> None:
    begin(folder, SETTINGS)
    begin(folder, SETTINGS)
    with pytest.raises(UserError, match=r"was begun with projection\.lr = 0\.1, now it is 0\.2; .*--output"):
        begin(folder, {**SETTINGS, "projection": {"lr": 0.2, "steps": 5}})
    with pytest.raises(UserError, match=r"projection\.new = None, now it is 1"):
        begin(folder, {**SETTINGS, "projection": {"lr": 0.1, "steps": 5, "new": 1}})
    with pytest.raises(UserError, match=r"generator = None, now it is x"):
        begin(folder, {**SETTINGS, "generator": "x"})
    with pytest.raises(UserError, match=r"class_names = \['a', 'b'\], now it is None"):
        begin(folder, {"projection": SETTINGS["projection"]})
    both = r"with projection\.lr = 0\.1, now it is 0\.2, and with projection\.steps = 5, now it is 9; give the old values, "
    with pytest.raises(UserError, match=both):
        begin(folder, {**SETTINGS, "projection": {"lr": 0.2, "steps": 9}})
    assert json.loads((Path(folder.key) / "settings.json").read_text()) == SETTINGS
    few, more = ({**SETTINGS, "data": {"max_pixels": pixels}} for pixels in (100, 200))
    (folder / "settings.json").write_json(few)
    begin(folder, more)
    assert json.loads((Path(folder.key) / "settings.json").read_text()) == more
    with pytest.raises(UserError, match=r"with data\.max_pixels = 200, now it is 100"):
        begin(folder, few)
    (folder / "settings.json").write_json([1])
    with pytest.raises(UserError, match=r"settings\.json' is damaged: it holds a list"):
        begin(folder, SETTINGS)


def test_a_setting_of_the_projection_that_came_later_is_at_its_default(folder: Location) -> None:
    begin(folder, SETTINGS)
    default = ProjectionConfig().l1_smooth
    with pytest.raises(UserError, match=rf"projection\.l1_smooth = {default}, now it is {default + 1}"):
        begin(folder, {**SETTINGS, "projection": {**SETTINGS["projection"], "l1_smooth": default + 1}})
    now = {**SETTINGS, "projection": {**SETTINGS["projection"], "l1_smooth": default}}
    begin(folder, now)
    assert json.loads((Path(folder.key) / "settings.json").read_text()) == now
    assert are_of({**SETTINGS}, now)


IMAGES = {**SETTINGS, "data": {"seed": 0}, "examples": 8, "listing_sha256": "aa"}


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (
            {"examples": 9, "listing_sha256": "bb", "class_names": ["a", "b", "c"]},
            "8 images of its source, now it would have 9, and a set cannot be extended; restore the images, "
            "give another --output",
        ),
        (
            {"listing_sha256": "bb"},
            "8 images of its source, now it would have as many, but others, or of other splits or classes, and a set "
            "cannot be extended; restore the images, give another --output",
        ),
        (
            {"listing_sha256": "bb", "projection": {"lr": 0.1, "steps": 9}},
            "projection.steps = 5, now it is 9, and with 8 images of its source, now it would have as many, but others, or of "
            "other splits or classes, and a set cannot be extended; give the old value and restore the images, "
            "another --output",
        ),
        (
            {"examples": 7, "listing_sha256": "bb", "data": {"seed": 1}},
            "data.seed = 0, now it is 1; give the old value, another --output",
        ),
        ({"class_names": ["a", "c"]}, "class_names = ['a', 'b'], now it is ['a', 'c']; give the old value, another --output"),
    ],
)
def test_other_images_are_told_by_their_number(folder: Location, now: dict[str, Any], told: str) -> None:
    begin(folder, IMAGES)
    with pytest.raises(UserError) as raised:
        begin(folder, IMAGES | now)
    assert str(raised.value) == f"the on-manifold set '{folder}' was begun with {told}, or remove the folder"


def test_shards_are_not_taken_for_those_of_other_settings_when_the_file_of_theirs_is_lost(
    folder: Location, shards: list[Shard]
) -> None:
    for shard in shards:
        write(folder, shard)
    told = r"has shards, but no settings\.json that says how they were made; give another --output, or remove the folder"
    with pytest.raises(UserError, match=told):
        begin(folder, SETTINGS)
    assert not (folder / "settings.json").is_file()
    finished(folder, shards)
    with pytest.raises(
        UserError, match=r"was begun with projection\.steps = 5, now it is 300; give the old value, another --out"
    ):
        begin(folder, {**SETTINGS, "projection": {"lr": 0.1, "steps": 300}})
    begin(folder, SETTINGS)
    assert (folder / "settings.json").read_json() == SETTINGS, "as the manifest says"
    (folder / "settings.json").unlink()
    (folder / "manifest.json").write_json([1])
    with pytest.raises(UserError, match=r"manifest\.json' is damaged: it holds a list"):
        begin(folder, SETTINGS)


def test_a_supplement_without_images_is_no_file(folder: Location, shards: list[Shard]) -> None:
    nothing = set_format.schema(1, 4, 2, 3, ["a", "b"]).empty_table()
    assert not write_shard(folder, "part-000000-1.parquet", nothing, {"003": "why"})
    assert write_shard(folder, "part-000000.parquet", nothing, {"003": "why"})
    assert read_records(folder).keys() == {"part-000000.parquet"}


def test_other_files_are_left_alone(folder: Location, shards: list[Shard]) -> None:
    for shard in shards:
        write(folder, shard)
    (folder / "shards" / "notes.txt").write_bytes(b"mine")
    (folder / "shards" / "part-000007.parquet.bak").write_bytes(b"mine")
    assert todo(folder, shards) == {}
    assert set(read_records(folder)) == {s.name for s in shards}


def test_raw_columns_are_compressed_and_compressed_ones_are_not(folder: Location, shards: list[Shard]) -> None:
    write(folder, shards[0])
    metadata = pq.read_metadata(Path(folder.key) / "shards" / shards[0].name).row_group(0)
    codecs = {metadata.column(i).path_in_schema: metadata.column(i).compression for i in range(metadata.num_columns)}
    assert codecs["on_manifold.bytes"] == "ZSTD"
    assert codecs["image.bytes"] == "UNCOMPRESSED"
    assert codecs["w.list.element"] == "UNCOMPRESSED"
    assert set_writer.REJECTED in pq.read_schema(Path(folder.key) / "shards" / shards[0].name).metadata
