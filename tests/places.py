"""An empty place on this machine or in a store, for tests that hold of both."""

from pathlib import Path

import pytest

from dmat_ray.storage import Location, at


def empty_place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A folder of this machine, or of the store that the fixture `server` gives, by the parameter; it need not exist."""
    if request.param == "local":
        return at(tmp_path / "folder")
    server = request.getfixturevalue("server")
    bucket = f"bucket-{abs(hash(request.node.name))}"
    server.put(bucket, {})
    return at(f"s3://{bucket}/folder")
