"""Files on this machine: whole or not there."""

import json
from pathlib import Path

import pytest

from dmat_ray.storage.files import write_json


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, 2.5, None]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
