"""Files on this machine: whole or not there."""

import json
from pathlib import Path

import pytest
from disk_order import noted

from dmat_ray.storage.files import write_json


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, None]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_json_has_its_name_once_the_disk_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a machine that goes down leaves an empty file, which no reader takes."""
    events = noted(monkeypatch)
    write_json(tmp_path / "x.json", {})
    (synced, partial), last = events
    assert synced == "synced"
    assert partial.endswith(".partial")
    assert last == ("renamed", "x.json")
