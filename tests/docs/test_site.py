"""The documents as a site: links lead somewhere, every page is in the navigation, nothing comes from elsewhere."""

import importlib.util
import posixpath
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from documents import FENCED, ROOT, documents

pytestmark = pytest.mark.slow

SITE = runpy.run_path(str(ROOT / "docs" / "build_site.py"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def headings(text: str) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def links(text: str) -> list[str]:
    """Where links lead, those outside of this repository apart."""
    return [target for target in LINK.findall(FENCED.sub("", text)) if not target.startswith(("http:", "https:"))]


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere_on_github(document: Path) -> None:
    for target in links(document.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.is_file(), target
        assert not anchor or anchor in headings(path.read_text(encoding="utf-8")), target


def test_links_lead_somewhere_on_the_site() -> None:
    pages = SITE["staged"]()
    assert pages.keys() == {"index.md", *(str(path.relative_to(ROOT / "docs")) for path in documents()[1:])}
    for name, text in pages.items():
        for target in links(text):
            page, _, anchor = target.partition("#")
            where = posixpath.normpath(posixpath.join(posixpath.dirname(name), page)) if page else name
            assert where in pages or (ROOT / "docs" / where).suffix == ".png", f"{name}: {target}"
            assert not anchor or anchor in headings(pages[where]), f"{name}: {target}"


def test_anchors_are_the_same_on_both() -> None:
    """GitHub keeps every dash, the site one of several."""
    for document in documents():
        assert [anchor for anchor in headings(document.read_text(encoding="utf-8")) if "--" in anchor] == []


def leaves(nav: Any) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from leaves(value)


def test_every_page_is_in_the_navigation_once() -> None:
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(leaves(nav)) == sorted(SITE["staged"]())
    assert next(iter(leaves(nav))) == "index.md"


def test_the_readme_names_every_document() -> None:
    named = re.findall(r"^- \[(docs/[\w/]+\.md)\]\((docs/[\w/]+\.md)\): .+", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {one for one, _ in named} == {str(path.relative_to(ROOT)) for path in documents()[1:]}
    assert all(one == two for one, two in named)


def test_what_is_fetched_is_found() -> None:
    fetched, unlisted = SITE["fetched"], SITE["unlisted"]
    assert fetched('<a href="https://arxiv.org">x</a><script src="./x.js"></script><link rel=icon href="x.png">') == []
    for tag in (
        '<script src="https://unpkg.com/x.js">',
        '<link rel="stylesheet" href="https://fonts.example/x.css">',
        '<link href="//fonts.example/x.css" rel="preconnect">',
        "<img src=https://example.org/x.png>",
    ):
        assert fetched(tag) != [], tag
    assert unlisted("<article><p>so:\n- one</p></article>") == ["\n- one</p>"]
    assert unlisted("<article><ul>\n<li>one</li></ul><pre>\n- x</pre></article>") == []


@pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="make docs installs the tool that makes the site")
def test_a_site_is_made_and_a_broken_link_is_an_error(tmp_path: Path) -> None:
    for name in ("docs", "README.md", "zensical.toml"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    command = [sys.executable, str(tmp_path / "docs" / "build_site.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "build" / "site" / "configuration.html").is_file()
    guide = tmp_path / "docs" / "guide.md"
    whole = guide.read_text()
    for broken in ("[x](nosuch.md)", "[x](data.md#no-such-heading)"):
        guide.write_text(f"{whole}\n{broken}\n")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "does not exist" in done.stderr
