"""The documents in parts: what stands between fences, what the commands there are, and the prose around them."""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LOOP = re.compile(r"^for (\w+) in ([\w ]+); do\n(.*?)^done$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w./-]+\.\w+)")


@dataclass(frozen=True)
class Block:
    """What stands between two fences, without its indentation; `language` is '' for commands, and for what is shown as it is."""

    language: str
    text: str

    @property
    def name(self) -> str:
        """The file that its first line says it is, '' for none."""
        found = NAMED.match(self.text)
        return found[1] if found else ""


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path, language: str | None = None) -> list[Block]:
    """All blocks of a document, or those of a language."""
    found = [Block(m[2], textwrap.dedent(m[3])) for m in FENCED.finditer(document.read_text(encoding="utf-8"))]
    return [block for block in found if language is None or block.language == language]


def spans(document: Path) -> list[str]:
    """What stands between single backticks outside the blocks, on one line."""
    prose = FENCED.sub("", document.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(text: str) -> list[list[str]]:
    """The commands of a block, as words: without comments, lines that go on put together, `&&` taken apart, loops run through."""

    def each(loop: re.Match[str]) -> str:
        return "".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())

    found: list[list[str]] = []
    for line in LOOP.sub(each, text).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            found.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        found.append(words)
    return [words for words in found if words]
