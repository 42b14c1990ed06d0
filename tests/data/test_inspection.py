"""The inspection: a sound set passes, and each kind of damage is found and named."""

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from damaged_sets import DAMAGES, SHARD, edit_rows, inspect, manifest_of, shifted_w, states
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from set_rows import MakeSet, edit_manifest

from dmat_ray.data.inspection import CHECKS, inspect_set, pixels, rows
from dmat_ray.manifold import generators
from dmat_ray.reports import set_page
from dmat_ray.storage import at

pytestmark = pytest.mark.slow


def test_a_sound_set_passes_every_check(set_folder: Path, generator_folder: Path) -> None:
    found = inspect(set_folder, generator_folder)
    assert states(found) == dict.fromkeys(CHECKS, "ok")
    assert found.sound
    details = {check.name: check.detail for check in found.checks}
    assert details["counts"] == "12 test, 24 train; 36 ok"
    assert details["g(w)"] == details["natural"] == details["w"] == "36 of 36 images"
    assert re.match(r"36 images in reference arithmetic: 0\.\d+% of pixels differ, by [01] levels", details["rendering"])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(make_set: MakeSet, generator_folder: Path, damage: str) -> None:
    folder = make_set()
    change, check, message = DAMAGES[damage]
    change(folder)
    found = inspect(folder, generator_folder)
    failed = {c.name: c for c in found.checks if c.state == "failed"}
    assert check in failed, states(found)
    assert any(re.search(message, line) for line in failed[check].defects), failed[check].defects
    assert not found.sound
    assert found.defects == sum(len(c.defects) + c.more for c in failed.values())


def test_every_check_is_shown_to_fail() -> None:
    assert {check for _, check, _ in DAMAGES.values()} == set(CHECKS)


def test_what_was_not_looked_at_does_not_pass_for_sound(set_folder: Path, make_set: MakeSet, generator_folder: Path) -> None:
    found = states(inspect_set(set_folder))
    assert {name for name, state in found.items() if state != "ok"} == {"generator", "rendering"}
    assert found["generator"] == found["rendering"] == "not made"
    folder = make_set()
    (folder / "shards" / SHARD).unlink()
    found = states(inspect(folder, generator_folder))
    assert (found["shards"], found["counts"], found["means"]) == ("failed", "not made", "not made")
    edit_manifest(folder, version=1)
    assert set(states(inspect(folder, generator_folder)).values()) == {"failed", "not made"}


def test_many_defects_are_counted_and_some_shown(make_set: MakeSet) -> None:
    folder = make_set(train=300, test=30)
    edit_manifest(folder, projection={"poor_l1": 1e-6})
    found = inspect_set(folder)
    check = next(c for c in found.checks if c.name == "status")
    assert len(check.defects) == 20
    assert len(check.defects) + check.more == found.defects == 330


def test_repaired_images_and_empty_shards_are_sound(make_set: MakeSet, generator_folder: Path) -> None:
    """A shard may have rejected what a later one holds, and shards may be without rows."""
    folder = make_set()
    rows = pq.read_table(folder / "shards" / SHARD)
    first = rows["id"][0].as_py()
    edit_rows(folder, lambda r: r.pop(0), dmat_ray_rejected=json.dumps({first: "bad", "lost": "bad"}))
    metadata = {**rows.schema.metadata, b"dmat_ray_rejected": b'{"lost": "bad"}'}
    pq.write_table(rows[:1].replace_schema_metadata(metadata), folder / "shards" / "part-000001-1.parquet")
    pq.write_table(rows[:0].replace_schema_metadata(metadata), folder / "shards" / "part-000007.parquet")
    more = {SHARD: 11, "part-000001-1.parquet": 1, "part-000007.parquet": 0}
    edit_manifest(folder, shards=manifest_of(folder)["shards"] | more, rejected={"lost": "bad"}, examples=37)
    found = inspect(folder, generator_folder)
    assert states(found) == dict.fromkeys(CHECKS, "ok"), [c for c in found.checks if c.defects]


def test_a_part_of_the_images(set_folder: Path, generator_folder: Path) -> None:
    found = inspect(set_folder, generator_folder, images=13, samples=5)
    details = {check.name: check.detail for check in found.checks}
    assert details["natural"] == "24 of 36 images", "two shards of twelve"
    assert details["shards"] == "3 of 3 read, 36 rows"
    assert details["rendering"].startswith("5 images")
    assert found.sound
    assert set(found.chosen.positions.tolist()) <= set(found.pairs), "pairs to show are fetched from all shards"  # type: ignore[union-attr]
    nothing = inspect(set_folder, generator_folder, images=0)
    assert states(nothing)["natural"] == "not made"


@pytest.mark.parametrize(("levels", "state"), [(1, "ok"), (2, "failed")])
def test_one_level_of_one_pixel_is_rounding(make_set: MakeSet, generator_folder: Path, levels: int, state: str) -> None:
    folder = make_set()

    def nudge(rows: list[dict[str, Any]]) -> None:
        content = bytearray(rows[0]["on_manifold"]["bytes"])
        content[-20] += levels if content[-20] < 128 else -levels
        rows[0]["on_manifold"]["bytes"] = bytes(content)

    edit_rows(folder, nudge)
    found = inspect(folder, generator_folder)
    assert states(found) == dict.fromkeys(CHECKS, "ok") | {"rendering": state}
    check = next(c for c in found.checks if c.name == "rendering")
    assert check.detail.endswith(f"{100 / (36 * 64):.4f}% of pixels differ, by {levels} levels at most (1 allowed)")


def test_bf16_sets_are_rendered_in_bf16(make_set: MakeSet, generator_folder: Path) -> None:
    folder = make_set()
    generator = generators.load_generator(str(generator_folder), precision="bf16")

    def again(rows: list[dict[str, Any]]) -> None:
        with torch.no_grad():
            x = generator.synthesis(torch.tensor([r["w"] for r in rows]).reshape(len(rows), generator.num_ws, -1))
        for row, image in zip(rows, (x * 255).round().to(torch.uint8).numpy(), strict=True):
            row["on_manifold"] = {"bytes": b"P5\n8 8\n255\n" + image.tobytes(), "path": None}

    for shard in manifest_of(folder)["shards"]:
        edit_rows(folder, again, shard)
    edit_manifest(folder, generator_precision="bf16")
    check = next(c for c in inspect(folder, generator_folder).checks if c.name == "rendering")
    assert check.state == "ok"
    assert "36 images in bf16 arithmetic" in check.detail
    edit_rows(folder, shifted_w)
    assert states(inspect(folder, generator_folder))["rendering"] == "failed"


def test_best_median_and_worst_are_those_of_a_plain_sort(set_folder: Path) -> None:
    found = inspect_set(set_folder, classes=2)
    assert found.chosen is not None
    tables = [pq.read_table(path) for path in sorted((set_folder / "shards").glob("*.parquet"))]
    rows = pa.concat_tables(tables).to_pylist()
    by_class = {c: sorted((r for r in rows if r["label"] == c), key=lambda r: r["l1"]) for c in range(3)}
    hardest = sorted(by_class, key=lambda c: by_class[c][6]["l1"])[1:]
    assert sorted(found.chosen.classes) == sorted(hardest)
    for label, picked in found.chosen.classes.items():
        for what, place in (("best", 0), ("median", 6), ("worst", 11)):
            pair, row = found.pairs[picked[what]], by_class[label][place]
            assert pair.id == row["id"]
            with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                np.testing.assert_array_equal(pair.natural[0], np.asarray(image))
            assert pair.on_manifold.tobytes() == row["on_manifold"]["bytes"][-64:]
    worst = sorted(rows, key=lambda r: -r["l1"])[:12]
    assert [found.pairs[i].id for i in found.chosen.worst] == [r["id"] for r in worst]


@settings(max_examples=25)
@given(data=st.data())
def test_no_damage_stops_the_inspection(tmp_path_factory: pytest.TempPathFactory, set_folder: Path, data: st.DataObject) -> None:
    """Bytes are changed, cut or put in anywhere: what comes out is a list of findings."""
    name = data.draw(st.sampled_from(["manifest.json", f"shards/{SHARD}"]))
    content = bytearray((set_folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "change":
            content[where] ^= data.draw(st.integers(1, 255))
        else:
            content[where : where + (3 if kind == "cut" else 0)] = b"" if kind == "cut" else b"\x00\x07"
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "shards").mkdir()
    for path in (set_folder / "shards").iterdir():
        os.link(path, folder / "shards" / path.name)
    os.link(set_folder / "manifest.json", folder / "manifest.json")
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    found = inspect_set(folder)
    assert [check.name for check in found.checks] == list(CHECKS)
    if data.draw(st.integers(0, 9)) == 0:  # drawing takes a second
        set_page.write(found, at(folder / "page.html"))


def test_two_ids_of_one_key_are_not_one_id(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are compared by a hash first; where that has 8 bits several agree, and none is there twice."""
    monkeypatch.setattr(rows, "KEY_BYTES", 1)
    folder = make_set()
    found = inspect_set(folder)
    assert found.rows is not None
    assert len(set(found.rows.key.tolist())) < 36
    assert states(found)["ids"] == "ok"
    DAMAGES["id twice"][0](folder)
    assert states(inspect_set(folder))["ids"] == "failed"


def test_parts_of_shards_are_put_together(set_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inspect_set(set_folder)
    monkeypatch.setattr(pixels, "VALUES", 5 * 64)
    parts = inspect_set(set_folder)
    assert [check.detail for check in parts.checks] == [check.detail for check in whole.checks]
    assert parts.pairs.keys() == whole.pairs.keys()
    for i, pair in whole.pairs.items():
        assert parts.pairs[i].id == pair.id
        for name in ("natural", "on_manifold", "w"):
            np.testing.assert_array_equal(getattr(parts.pairs[i], name), getattr(pair, name))


def test_another_generator_does_not_render(make_set: MakeSet, generator_folder: Path) -> None:
    folder = make_set()
    DAMAGES["other generator"][0](folder)
    assert states(inspect(folder, generator_folder)) == dict.fromkeys(CHECKS, "ok") | {
        "generator": "failed",
        "rendering": "not made",
    }


def test_images_that_are_there_twice_are_no_defect_but_told(make_set: MakeSet, tmp_path: Path) -> None:
    """A test image as a training image is, another that is it in another format, and an image under two labels."""
    folder = make_set()
    assert inspect_set(folder).warnings == []
    every = pa.concat_tables(pq.read_table(path) for path in sorted((folder / "shards").glob("*.parquet"))).to_pylist()
    trained, second, *others = [row for row in every if row["split"] == "train"]
    tested = [row for row in every if row["split"] == "test" and row["label"] == trained["label"]][:2]
    odd = next(row for row in others if row["label"] != second["label"])
    bmp = io.BytesIO()
    Image.open(io.BytesIO(trained["image"]["bytes"])).save(bmp, format="BMP")
    contents = [trained["image"]["bytes"], bmp.getvalue(), second["image"]["bytes"]]
    changed = dict(zip([row["id"] for row in (*tested, odd)], contents, strict=True))
    for path in (folder / "shards").glob("*.parquet"):
        edit_rows(
            folder, lambda rows: [r["image"].update(bytes=changed.get(r["id"], r["image"]["bytes"])) for r in rows], path.name
        )
    found = inspect_set(folder)
    names = manifest_of(folder)["class_names"]
    pair = [f"'{row['id']}' ({names[row['label']]})" for row in every if row["id"] in (second["id"], odd["id"])]
    assert found.warnings == [
        f"warning: among the test images are training images, 2 of 12, the first: '{tested[0]['id']}' is '{trained['id']}'",
        f"warning: 1 image with more than one label, the first: {' is '.join(pair)}",
    ]
    assert states(found)["natural"] == "ok"
    assert inspect_set(folder, images=0).warnings == []
    set_page.write(found, at(tmp_path / "page.html"))
    assert "among the test images are training images, 2 of 12" in (tmp_path / "page.html").read_text()
