"""What a pickle would cost, found out from its opcodes before anything of it is built.

A few hundred bytes can keep Python or torch busy for years: a tuple of twice the tuple before it, sixty times, is hashed
by visiting 2^60 of them, and text that is named again and again is read each time. Whatever is expensive is counted here,
over all the pickles of a file, and what no checkpoint comes near is refused.
"""

import io
import pickletools
from dataclasses import dataclass
from typing import Any

from dmat_ray.formats.refusal import RefusedError, shown

MAX_OPCODES, MAX_NESTING = 1_000_000, 300  # the largest published checkpoints have some 50 thousand and 50
MAX_VISITS = 30_000_000  # of values, were each to be looked through with all in it wherever it stands; a second of hashing
MAX_BITS = 128  # of a number; states of random generators have as many
REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
PUT_OPCODES, GET_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
GROWING_OPCODES = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
TOO_MUCH = "is longer or nested deeper than any checkpoint"


class Budget:
    """What reading one file may still cost; its pickles, and those inside of them, share it."""

    def __init__(self, size: int) -> None:
        self.opcodes, self.visits = MAX_OPCODES, MAX_VISITS
        self.bytes = 2 * size + (1 << 20)  # a pickle inside of another is read twice

    def spend(self, opcodes: int = 0, visits: int = 0, read: int = 0) -> None:
        """Raises RefusedError when there is not so much left."""
        self.opcodes -= opcodes
        self.visits -= visits
        self.bytes -= read
        if min(self.opcodes, self.visits, self.bytes) < 0:
            raise RefusedError(TOO_MUCH)


@dataclass(slots=True)
class _Value:
    """Of a value on the stack: how deep it is nested, how many values a walk through it visits, and whether others hold it."""

    depth: int = 0
    size: int = 1
    shared: bool = False


class _Walk:
    """The stack of a pickle, with the depth and the size of values in place of them.

    Python hashes nested tuples by recursion in C, without a guard, and again each time: a hundred thousand levels end the
    process. What is hashed cannot grow any more, so that its numbers are exact. Those of a list or a dict in the memo are
    not, as it may grow later: nobody here looks through these without bounds of his own. With `strict`, for torch's C++,
    which does, nothing may grow that was named again before, and all numbers are exact.
    """

    def __init__(self, budget: Budget, strict: bool) -> None:
        self._budget, self._strict = budget, strict
        self._stack: list[_Value] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Value] = {}

    def _again(self, value: _Value) -> None:
        value.shared = True
        self._stack.append(value)

    def _taken(self, name: str, takes: list[Any]) -> list[_Value]:
        if pickletools.markobject in takes:
            if not self._marks:
                raise RefusedError("is no pickle that a program wrote")
            start = max(self._marks.pop() - takes.index(pickletools.markobject), 0)
        else:
            start = max(len(self._stack) - len(takes), 0)
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def after(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Take one step. Raises RefusedError if what this opcode leaves on the stack is nested too deep, or costs too much."""
        stack, name = self._stack, opcode.name
        if name == "MARK":
            self._marks.append(len(stack))
        elif name == "POP" and self._marks and self._marks[-1] == len(stack):
            self._marks.pop()
        elif name in PUT_OPCODES or name == "MEMOIZE":
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1] if stack else _Value()
        elif name in GET_OPCODES:
            self._again(self._memo.get(argument, _Value()))
        elif name == "DUP":
            self._again(stack[-1] if stack else _Value())
        else:
            self._make(name, opcode)

    def _make(self, name: str, opcode: pickletools.OpcodeInfo) -> None:
        taken = self._taken(name, opcode.stack_before)
        if name in GROWING_OPCODES and taken:  # these grow the first of what they take
            grown, *parts = taken
            value = _Value(max([grown.depth, *(1 + part.depth for part in parts)]), grown.size)
            cost = sum(part.size for part in parts)
            if self._strict:
                if grown.shared:
                    raise RefusedError("holds values that contain themselves, or that grow after they were used")
                grown.depth, grown.size, value = value.depth, grown.size + cost, grown
        else:
            cost = sum(part.size for part in taken)
            value = _Value(1 + max([part.depth for part in taken], default=-1), 1 + cost)
        self._budget.spend(visits=cost)
        if value.depth > MAX_NESTING:
            raise RefusedError(TOO_MUCH)
        self._stack += [value] * len(opcode.stack_after)


def check_opcodes(data: bytes, budget: Budget, start: int = 0, *, strict: bool = False) -> int:
    """Walk over one pickle without running it; returns where it ends.

    Raises RefusedError for sizes beyond the file, places in the memo that would need an array of their size, nesting that
    would overflow the stack, sharing that would keep a reader busy, numbers that nothing can be made of, and opcodes that
    no checkpoint has.
    """
    stream = io.BytesIO(data)
    stream.seek(start)
    walk, end = _Walk(budget, strict), start
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        budget.spend(opcodes=1, read=stream.tell() - end)
        end = stream.tell()
        if opcode.name in REFUSED_OPCODES:
            raise RefusedError(f"holds the opcode {opcode.name}, which no weights need")
        if opcode.name in PUT_OPCODES and not 0 <= argument <= count:  # type: ignore[operator]
            raise RefusedError(f"gives the number {shown(argument)} to an object that is at most its {count}th")
        if opcode.name == "FRAME" and argument > len(data) - (position or 0):  # type: ignore[operator]
            raise RefusedError(f"claims a frame of {shown(argument)} bytes that it does not have")
        if isinstance(argument, int) and argument.bit_length() > MAX_BITS:
            raise RefusedError(f"holds {shown(argument)}, which no weights need")
        walk.after(opcode, argument)
    return end
