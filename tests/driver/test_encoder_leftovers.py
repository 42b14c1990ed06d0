"""What a driver has left of an encoder's training that was killed when the encoder was there: without a Ray."""

from pathlib import Path

import pytest
from kills import killed_when_removed

from dmat_ray import cli
from dmat_ray.cluster import encoder
from dmat_ray.cluster.context import stored_checkpoints

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("removed", range(4))
def test_it_is_removed_and_found_whole_or_not_at_all_where_that_is_killed(
    tmp_path: Path, generator_folder: Path, removed: int
) -> None:
    """Of two checkpoints so many files are gone by then; a part of one would keep the next training of the same settings."""
    given = ["--preset", "demo", "--output", str(tmp_path), "--generator.path", str(generator_folder)]
    config = cli.parse("test", given)[0]
    storage = tmp_path / "train"
    training, another = storage / f"{encoder._label(config)}2", storage / "encoder-0123456789ab-1"
    for place in (training, another):
        for time in ("00-00-00", "00-00-01"):
            checkpoint = place / f"checkpoint_2026-01-01_{time}.000000"
            checkpoint.mkdir(parents=True)
            for file in ("encoder.json", "state.pt"):
                (checkpoint / file).touch()
    (storage / ".encoder-0123456789ab-2.removed").mkdir()  # of another, that may be at it
    with killed_when_removed(removed, "encoder.json", "state.pt"):
        encoder._sweep(config)
    assert not any(len(list(place.local.iterdir())) == 1 for place in stored_checkpoints(training) if place.local)
    encoder._sweep(config)
    assert {place.name for place in storage.iterdir()} == {another.name, ".encoder-0123456789ab-2.removed"}
    assert len(stored_checkpoints(another)) == 2
