"""What machines must have in common: found out on a real Ray, and of a folder that is not the driver's."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dmat_ray.cluster import nodes
from dmat_ray.errors import UserError

pytestmark = pytest.mark.cluster


def test_a_folder_that_is_not_the_drivers_is_known_by_its_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "SETTLING_S", 0.3)
    told = nodes.expectation(str(tmp_path / "out"))
    assert nodes.complaints(told) == []
    assert nodes.expectation(str(tmp_path / "out")) == told, "another job in the same folder"
    # what a machine has where no storage is mounted: nothing, or what an earlier job has left there
    mark = tmp_path / "out" / nodes.MARK
    for content in (None, nodes.expectation(str(tmp_path / "other"))):
        mark.unlink(missing_ok=True)
        if content is not None:
            mark.write_text(json.loads(content)["mark"])
        (said,) = nodes.complaints(told)
        assert f"output '{tmp_path / 'out'}' is not the same folder on node" in said
    monkeypatch.setenv(nodes.EXPECTED, told)
    with pytest.raises(UserError, match="is not the same folder"):
        nodes.require_like_driver()
    monkeypatch.delenv(nodes.EXPECTED)
    nodes.require_like_driver()


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written: Not a directory; give another --output"):
        nodes.expectation(str(tmp_path / "file" / "out"))


def test_clocks_and_disks_are_warned_of(ray_session, tmp_path, say, lines, monkeypatch):
    told = nodes.expectation(str(tmp_path))
    nodes.look_at_all(told, say)
    assert lines == []
    # the driver's clock is put forward, and more room asked for than any disk has
    late = SimpleNamespace(time=lambda: time.time() + 3600, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(nodes, "time", late)
    monkeypatch.setattr(nodes, "FREE_BYTES", 1 << 60)
    nodes.look_at_all(told, say)
    clock, disk = lines
    assert clock.startswith(f"warning: the clock of node {os.uname().nodename} is 36")
    assert "MiB left on its disk" in disk
    other = json.dumps({**json.loads(told), "packages": {"torch": "1.0", "numpy": "1.0"}})
    with pytest.raises(UserError, match=r"has torch 2\.\S+ \(the driver has 1\.0\), numpy 2\.\S+ \(the driver has 1\.0\)"):
        nodes.look_at_all(other, say)
    (extra,) = nodes.EXTRA
    for there in ("none", "1.0"):  # it need not be on all nodes, but must not be of different versions
        other = json.dumps({**json.loads(told), "packages": {extra: there}})
        if there == "none" or nodes.packages()[extra] == "none":
            nodes.look_at_all(other, say)
        else:
            with pytest.raises(UserError, match=f"has {extra} "):
                nodes.look_at_all(other, say)
    assert Path(tmp_path / nodes.MARK).is_file()
