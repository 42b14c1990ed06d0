"""What all workers of a training must see alike before they go on, on storage that may show it to some of them later."""

import json
import time
from collections.abc import Callable

import torch

from dmat_ray.errors import UserError
from dmat_ray.storage import Location
from dmat_ray.storage.files import VISIBLE_S, text_digest
from dmat_ray.types import RunContext

LOOK_S = 1.0  # between two looks
NOTHING, REFUSED = 0, -1  # where a checkpoint's number would stand


def seen_by_all(
    look: Callable[[Callable[[str], None]], Location | None], name: str, context: RunContext, seconds: float | None = None
) -> Location | None:
    """The checkpoint that `look` finds, or None, once that is the same on all workers, which must all call this.

    `look` is given where to say things, and called again until then: a shared disk may be late in showing a worker what another
    machine has written. `name` is the JSON file that makes a checkpoint whole. Raises UserError if workers still find different
    ones after `seconds` (None: `files.VISIBLE_S`), or what `look` raises last.
    """
    end, said = time.monotonic() + (VISIBLE_S if seconds is None else seconds), set[str]()

    def say(text: str) -> None:
        if text not in said:
            said.add(text)
            context.say(text)

    while True:
        found, refused = None, None
        try:
            found = look(say)
        except UserError as error:
            refused = error
        number = REFUSED if refused is not None else NOTHING if found is None else _number(found, name)
        numbers, over = _exchanged(number, time.monotonic() > end, context)
        if len(numbers) == 1 or over:
            break
        say("workers do not see the same newest checkpoint yet: looking again")
        time.sleep(LOOK_S)
    if refused is not None:
        raise refused
    if len(numbers) > 1:
        raise UserError("workers found different checkpoints to go on from: output must be a folder that all of them share")
    return found


def _number(folder: Location, name: str) -> int:
    """Tells a checkpoint from others by its JSON, which holds the digests of its files."""
    return 1 + int(text_digest(json.dumps((folder / name).read_json(), sort_keys=True))[:8], 16)


def _exchanged(number: int, over: bool, context: RunContext) -> tuple[set[int], bool]:
    """The numbers of all workers, and whether rank 0 says that it is `over`; the same on all."""
    told = torch.zeros(context.world_size + 1, dtype=torch.float64, device=context.device)
    told[context.rank], told[-1] = number, float(over and context.rank == 0)
    context.average_([told])  # a sum but for the factor, which leaves each worker its place
    *numbers, ends = (told * context.world_size).round().long().tolist()
    return set(numbers), ends > 0
