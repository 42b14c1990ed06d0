"""Folders of grey images and texts, of names of all kinds."""

import io
from pathlib import Path

from PIL import Image

ODD = ["new\nline", "é", "e\u0301", "🐈 cat", "#1", "100%", "%20", "a+b", "q'\"", "a\\b", "tab\t", "a,b;c"]


def png(level: int = 0, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size), level).save(buffer, format="PNG")
    return buffer.getvalue()


def folder_of(root: Path, *names: str) -> Path:
    """A folder with these files: images, each of its own grey level, and texts."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"text" if name.endswith(".md") else png(4 * i % 256))
    return root


def two_classes(root: Path) -> Path:
    """Two classes, 'a' with 30 images and 'b' with 10, each of its own grey level."""
    return folder_of(root, *(f"{name}/{i}.png" for name, count in (("a", 30), ("b", 10)) for i in range(count)))
