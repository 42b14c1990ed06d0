"""The page of an evaluation as a browser reads it, and what its tables should hold, counted by hand."""

import base64
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
from PIL import Image
from tiny_page import GROUP, MODELS, PGD, WORST, Written, write_page

from dmat_ray.config import Config

COLUMNS = {
    "on_manifold": ["clean", PGD, "PGD L2", GROUP, "OM-PGD", WORST, "mean"],
    "natural": ["clean", PGD, "PGD L2", GROUP, WORST, "mean"],
}
LINES = ["natural x", "on-manifold g(w)", PGD, "PGD L2", "one", "OM-PGD"]
VOID = {"meta", "img", "br", "link", "input", "hr"}


def whole_page(folder: Path, config: Config, set_folder: Path) -> Written:
    """The page of all models, with its siblings."""
    found = write_page(folder, config, set_folder, MODELS)
    assert sorted(p.name for p in found.path.parent.iterdir()) == ["report.csv", "report.html", "report.md"]
    return found


class Page(HTMLParser):
    """What a browser would see: references, images with their captions, tables, headings, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.references: list[str] = []
        self.images: list[Image.Image] = []
        self.alts: list[str] = []
        self.captions: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.classes: list[str] = []
        self.headings: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.unclosed: list[str] = []
        self._path: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        self.unclosed += [tag for tag, _ in self._path]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self._path.append((tag, values))
        self.references += [v for k, v in attrs if v and (k in ("src", "href", "action") or k.endswith(":href"))]
        self.ids += [v for k, v in attrs if k == "id" and v]
        if tag == "img":
            content = base64.b64decode(str(values["src"]).removeprefix("data:image/png;base64,"), validate=True)
            self.images.append(Image.open(io.BytesIO(content)))
            self.alts.append(values["alt"] or "")
        if tag == "table":
            self.tables.append([])
            self.classes.append(values.get("class") or "")
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        path = [tag for tag, _ in self._path]
        if "figcaption" in path and "table" in path:
            self.captions.append((data, str(self._path[-1][1]["class"])))
        elif "td" in path or "th" in path:
            self.tables[-1][-1][-1] += data
        if path and path[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._path and (found := self._path.pop()[0]) != tag:
            self.unclosed.append(found)


def right(rows: pa.Table, model: str, set_name: str, attacks: list[str], source: str | None = None) -> dict[str, bool]:
    """For each example whether it is right in all rows of some attacks, by plain loops."""
    found: dict[str, bool] = {}
    for r in rows.to_pylist():
        if (r["model"], r["source"], r["set"]) == (model, source or model, set_name) and r["attack"] in attacks:
            found[r["id"]] = found.get(r["id"], True) and r["correct"]
    return found


def shares(rows: pa.Table, model: str, set_name: str) -> list[str]:
    """Per cent of each column, counted by hand."""
    made_of = {PGD: [PGD], GROUP: ["clean", "one", "two"], "OM-PGD": ["OM-PGD"]}
    found = {}
    for column in COLUMNS[set_name]:
        if column == "mean":
            values = [found[c] for c in made_of if c in found]
            found[column] = sum(values) / len(values)
            continue
        attacks = ["clean", PGD, "OM-PGD"] if column == WORST else made_of.get(column, [column])
        standing = right(rows, model, set_name, attacks)
        assert len(standing) == 12
        found[column] = 100 * sum(standing.values()) / 12
    return [f"{value:.1f}" for value in found.values()]


def pictures(html: str, section: str) -> list[tuple[str, ET.Element]]:
    """Titles and charts of a section, parsed as XML."""
    part = html.split(f'<h2 id="{section}">')[1].split("<h2")[0]
    drawn = [ET.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', part, flags=re.DOTALL)]
    return [(svg.attrib["aria-label"], svg) for svg in drawn]


def values(svg: ET.Element) -> list[str]:
    """What a pointer finds at the marks."""
    return [str(title.text) for title in svg.iter("title")]
