"""The page of an on-manifold set as a browser reads it."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """What a browser would see; raises for tags that do not fit."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[list[list[str]]] = []
        self.images: list[Image.Image] = []
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.references: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v for k, v in attrs if v and (k in ("src", "href", "action") or k.endswith(":href"))]
        if tag == "img":
            content = base64.b64decode(str(dict(attrs)["src"]).removeprefix("data:image/png;base64,"), validate=True)
            self.images.append(Image.open(io.BytesIO(content)))
            self.images[-1].load()
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v for k, v in attrs if v and k.endswith(":href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data.strip()
        if self._open and self._open[-1] == "h3":
            self.headings.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
