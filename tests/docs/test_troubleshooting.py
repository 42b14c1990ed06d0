"""Every message that docs/troubleshooting.md quotes is one that there is: in our source, or of the packages that it names."""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest
from documents import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
OURS, THEIRS = PAGE.read_text(encoding="utf-8").split("\n## Of Ray, torch and the system\n")
GAP = "\x00"  # what is filled in when a message is made
ARGPARSE = {"unrecognized arguments: ..."}
SYSTEM = {
    "No space left on device": "the system's, errno 28",
    "Too many open files": "the system's, errno 24",
    "No module named 'dmat_ray'": "Python's",
    "No module named 'ray'": "Python's",
    "ncclSystemError": "NCCL's",
}


def quoted(text: str) -> list[str]:
    """The messages of an entry: what stands in bold code at its beginning."""
    entries = [block for block in text.split("\n\n") if block.startswith("**`")]
    return [message for entry in entries for message in re.findall(r"\*\*`(.+?)`\*\*", entry.replace("\n", " "))]


def constants(paths: list[Path]) -> dict[str, str]:
    """Texts that modules name, by the name, where it is one text in all of them."""
    found: dict[str, set[str]] = {}
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                names, values = [target], [node.value]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    names, values = target.elts, node.value.elts
                for name, value in zip(names, values, strict=True):
                    if isinstance(name, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                        found.setdefault(name.id, set()).add(value.value)
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def sources() -> list[Path]:
    return [*sorted((ROOT / "dmat_ray").rglob("*.py")), *sorted((ROOT / "jobs").glob("*.py"))]


def texts(node: ast.AST, named: dict[str, str]) -> list[str]:
    """The texts that the code below a node makes, with a gap where a value comes in."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if not isinstance(node, ast.JoinedStr):
        return [text for child in ast.iter_child_nodes(node) for text in texts(child, named)]
    whole, inner = "", []
    for part in node.values:
        if isinstance(part, ast.Constant):
            whole += str(part.value)
        else:
            value = part.value if isinstance(part, ast.FormattedValue) else part
            whole += named.get(value.id, GAP) if isinstance(value, ast.Name) else GAP
            inner += texts(value, named)
    return [whole, *inner]


@functools.cache
def written() -> list[str]:
    """All texts in the source."""
    everywhere = constants(sources())
    return [text for path in sources() for text in texts(ast.parse(path.read_text()), everywhere | constants([path]))]


def is_written(message: str) -> bool:
    """Whether some text has all the literal parts of a message in their order; three dots stand for what is filled in."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("...")), re.DOTALL)
    return any(pattern.search(text) for text in written())


@pytest.mark.parametrize("message", sorted(set(quoted(OURS)) - ARGPARSE))
def test_our_messages_are_ours(message: str) -> None:
    longest = max((part for part in message.split("...")), key=len)
    assert len(longest.split()) >= 2 or "warning" in message, "a message that can be told from others"
    assert is_written(message)


@pytest.mark.parametrize("message", quoted(THEIRS))
def test_their_messages_are_theirs(message: str) -> None:
    found = re.fullmatch(r"((?:ray|torch)[\w.]*)\.(\w+)", message)
    if found:
        assert issubclass(getattr(importlib.import_module(found[1]), found[2]), Exception)
    elif message.startswith("Token"):
        from ray._private.authentication import authentication_constants

        assert message in vars(authentication_constants).values()
    else:
        assert message in SYSTEM


def test_a_message_that_there_is_not_is_found() -> None:
    assert not is_written("there is no on-manifold pair at")
    assert not is_written("is unfinished: ... the on-manifold set")
    assert is_written("the on-manifold set '...' is unfinished: it has no manifest.json")


def test_what_a_user_meets_first_is_there() -> None:
    messages = " ".join(quoted(OURS) + quoted(THEIRS))
    for part in (
        "OutOfMemoryError",
        "DistBackendError",
        "disk full",
        "unfinished",
        "begun with",
        "access denied",
        "let us in",
        "GPU",
    ):
        assert part in messages, part
    assert len(quoted(OURS)) >= 60


def test_every_entry_says_what_to_do() -> None:
    for block in PAGE.read_text(encoding="utf-8").split("\n\n"):
        if block.startswith("**`"):
            after = re.sub(r"^(?:\*\*`.+?`\*\*,? ?)+", "", block.replace("\n", " "))
            assert len(after.split()) >= 3, block
