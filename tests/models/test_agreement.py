"""Workers that do not see the same checkpoints at first, or never: threads that average as workers do."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmat_ray.errors import UserError
from dmat_ray.local import LocalContext
from dmat_ray.models import agreement, checkpoint

RUN = "run.json"


class Workers:
    """Contexts of as many workers as there are lists of what each sees: at its first look, its second, and so on."""

    def __init__(self, folder: Path, seen: Sequence[Sequence[list[str]]]) -> None:
        self.barrier, self.values, self.lines = threading.Barrier(len(seen), timeout=60), {}, []
        self.contexts = [self.context(folder, rank, len(seen), looks) for rank, looks in enumerate(seen)]

    def context(self, folder: Path, rank: int, world_size: int, looks: Sequence[list[str]]) -> LocalContext:
        left = list(looks)
        made = LocalContext(folder)
        made.rank, made.world_size = rank, world_size

        def checkpoints() -> list[Path]:
            return [folder / name for name in (left.pop(0) if len(left) > 1 else left[0])]

        def average_(tensors: Sequence[Tensor]) -> None:
            (tensor,) = tensors
            self.values[rank] = tensor.clone()
            self.barrier.wait()
            mean = torch.stack([self.values[r] for r in range(world_size)]).mean(dim=0)
            self.barrier.wait()
            tensor.copy_(mean)

        made.checkpoints, made.average_ = checkpoints, average_  # type: ignore[method-assign]
        made.say = self.lines.append if rank == 0 else lambda text: None  # type: ignore[method-assign]
        return made

    def find(self) -> list[object]:
        """What each finds to go on from: its name, None, or the error."""

        def find(context: LocalContext) -> object:
            try:
                found = checkpoint.newest(context, RUN)
            except UserError as error:
                return str(error)
            return None if found is None else found.name

        with ThreadPoolExecutor(len(self.contexts)) as pool:
            return list(pool.map(find, self.contexts))


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workers]:
    """workers(looks, looks, ...), of the checkpoints 1, 2 and 3, which are whole, and 4, which is not."""
    monkeypatch.setattr(agreement, "LOOK_S", 0.0)
    for number in range(1, 5):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "state.pt").write_text(f"state {number}")
        checkpoint.seal(folder, RUN, {"version": 2})
    (tmp_path / "4" / "state.pt").write_text("half")
    return lambda *seen: Workers(tmp_path, seen)


NONE, ONE, TWO, THREE, HALF = [], ["1"], ["2", "1"], ["3", "2", "1"], ["4", "3", "2", "1"]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([[NONE], [NONE]], None),
        ([[TWO], [TWO]], "2"),
        ([[NONE, NONE, ONE], [ONE]], "1"),
        ([[TWO], [ONE, TWO]], "2"),
        ([[TWO, TWO, THREE], [THREE], [ONE, TWO, TWO, THREE]], "3"),
        ([[HALF], [THREE]], "3"),
        ([[["4"], THREE], [THREE]], "3"),
    ],
)
def test_workers_go_on_from_the_same_however_late_some_see_it(
    workers: Callable[..., Workers], seen: list[list[list[str]]], expected: str | None
) -> None:
    assert workers(*seen).find() == [expected] * len(seen)


def test_workers_that_never_see_the_same_are_told_to_share_a_folder(
    workers: Callable[..., Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, also the one whose checkpoint is the mean of the others'."""
    monkeypatch.setattr(agreement, "VISIBLE_S", 0.3)
    three = workers([ONE], [TWO], [THREE])
    (told,) = set(three.find())
    assert told == "workers found different checkpoints to go on from: output must be a folder that all of them share"
    assert three.lines == ["workers do not see the same newest checkpoint yet: looking again"], "once"


def test_a_checkpoint_that_is_damaged_for_all_is_told_at_once(
    workers: Callable[..., Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "VISIBLE_S", 600.0)
    two = workers([["4"]], [["4"]])
    (told,) = set(two.find())
    assert "its state.pt is not what was written, and there is none before it; remove it to train anew" in str(told)
    assert [line.split(": its ")[1] for line in two.lines] == ["state.pt is not what was written; going back to the one before"]
