"""The page in a real browser: nothing overflows a phone, numbers have room beside long names, text can be read in light and dark,
pictures have a size, no errors.

The page is opened in a frame of the wanted width, since a browser's own window does not get as narrow as a phone. A script that
is added to a copy of the page measures it and tells the document around it, whose text the browser then prints.
"""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_search
from chromium import MISSING, browser, document
from PIL import Image
from tiny_page import EVALUATION, MODELS, TITLE, write_page

from dmat_ray.config import Config

WIDTHS = {"desktop": 1280, "phone": 360}
HEIGHT = 2400
NAMES = [*MODELS, "dmat_fog_recolor_stadv"]  # the last's is one long word
SCHEMES = {"light": 1, "dark": 0}  # what blink calls them

EARLY = """<script>
const errors = [];
addEventListener("error", (e) => errors.push(String(e.message || e.target.outerHTML).slice(0, 200)), true);
for (const kind of ["error", "warn"]) console[kind] = (...what) => errors.push(kind + ": " + what.join(" "));
</script>"""

LATE = """<script>
addEventListener("load", () => {
  const pen = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const ground = (at) => {
    for (; at; at = at.parentElement) { const c = rgba(getComputedStyle(at).backgroundColor); if (c[3] === 255) return c; }
    return [255, 255, 255, 255];
  };
  for (const details of document.querySelectorAll("details")) details.open = true;
  const texts = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, title") || !parent.getClientRects().length) continue;
    const style = getComputedStyle(parent);
    const ink = rgba(parent instanceof SVGElement ? style.fill : style.color);
    const key = JSON.stringify([ink, ground(parent)]);
    texts[key] = texts[key] || {size: parseFloat(style.fontSize), text: node.data.trim().slice(0, 40), count: 0};
    texts[key].count += 1;
  }
  const size = (e) => { const box = e.getBoundingClientRect(); return [e.tagName.toLowerCase(), box.width, box.height]; };
  const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll, pre, svg") &&
    e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80));
  const table = document.querySelector("table.sortable");
  const column = (k) => [...table.tBodies[0].rows].map((row) => row.cells[k].textContent);
  const sorted = [column(1)];
  for (let k = 0; k < 2; k += 1) { table.querySelectorAll("thead th")[1].firstChild.click(); sorted.push(column(1)); }
  const scrollers = [...document.querySelectorAll(".scroll")].filter((e) => e.scrollWidth > e.clientWidth + 1);
  parent.postMessage({
    errors, texts, wide, sorted, inner: innerWidth, scroll: document.documentElement.scrollWidth,
    sizes: [...document.querySelectorAll("img, svg")].map(size),
    loaded: [...document.images].every((image) => image.complete && image.naturalWidth > 0),
    scrollers: scrollers.length,
    heads: scrollers.flatMap((e) => [...e.querySelectorAll("tbody th, .corner")].map((head) =>
      [head.getBoundingClientRect().width / e.clientWidth, head.textContent])),
  }, "*");
});
</script>"""

OUTER = """<!doctype html><meta charset="utf-8">
<style>body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: {height}px }}</style>
<pre id="found" hidden></pre>
<script>addEventListener("message", (e) => {{ document.getElementById("found").textContent = JSON.stringify(e.data); }});</script>
<iframe src="{page}"></iframe>"""


pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser() is None, reason=MISSING)]


def luminance(rgb: list[int]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(ink: list[int], ground: list[int]) -> float:
    """Contrast ratio as WCAG 2 defines it, 1 to 21; an ink that lets through is mixed with its ground."""
    seen = [round(c * ink[3] / 255 + g * (1 - ink[3] / 255)) for c, g in zip(ink[:3], ground[:3], strict=True)]
    light, dark = sorted((luminance(seen), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standards_examples() -> None:
    assert contrast([0, 0, 0, 255], [255, 255, 255, 255]) == pytest.approx(21)
    assert contrast([119, 119, 119, 255], [255, 255, 255, 255]) == pytest.approx(4.48, abs=0.005)


@pytest.fixture(scope="module", params=["report", "search"])
def measured(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_config: Callable[..., Config],
    set_folder: Path,
) -> Path:
    """A copy of a page with the script in it."""
    folder = tmp_path_factory.mktemp("browser")
    config = make_config(evaluation=EVALUATION, tracking={"experiment": TITLE})
    if request.param == "report":
        text = write_page(folder, config, set_folder, NAMES).html
    else:
        text = tiny_search.write_page(folder, config).read_text()
    path = folder / f"{request.param}.html"
    path.write_text(text.replace("<style>", EARLY + "<style>", 1).replace("</body>", LATE + "</body>"))
    return path


def opened(page: Path, folder: Path, pixels: int, scheme: int) -> tuple[dict[str, Any], np.ndarray]:
    """What the script found, and a screenshot (H, W, 3)."""
    outer, picture = folder / "outer.html", folder / "screen.png"
    outer.write_text(OUTER.format(width=pixels, height=HEIGHT, page=page.as_uri()))
    options = [f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={pixels},{HEIGHT}"]
    options += [f"--screenshot={picture}", "--virtual-time-budget=2000"]
    shown = document(outer.as_uri(), folder, *options)
    told = re.search(r'<pre id="found" hidden="">(.+?)</pre>', shown, flags=re.DOTALL)
    assert told is not None, f"the page told nothing: {shown[:300]}"
    with Image.open(picture) as image:
        return json.loads(html.unescape(told[1])), np.asarray(image.convert("RGB"))[:, :pixels]


# one test each, so that no browser is started twice where tests are spread over processes
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_page_can_be_looked_at(measured: Path, tmp_path: Path, width: str, scheme: str) -> None:
    found, picture = opened(measured, tmp_path, WIDTHS[width], SCHEMES[scheme])
    assert found["errors"] == []

    # nothing is wider than the screen: wide tables scroll in themselves
    assert found["inner"] == WIDTHS[width]
    assert found["wide"] == []
    assert found["scroll"] <= found["inner"]
    assert found["scrollers"] > 0 or (width, measured.stem) == ("desktop", "search"), "which has room for all"

    # what stays in place as a table scrolls leaves room for its numbers
    assert [text for share, text in found["heads"] if share >= 0.6] == []

    # pictures are there
    assert found["loaded"]
    assert {kind for kind, _, _ in found["sizes"]} == ({"img", "svg"} if measured.stem == "report" else {"svg"})
    assert [size for size in found["sizes"] if min(size[1:]) < 10] == []
    assert max(size[1] for size in found["sizes"]) <= WIDTHS[width]

    # text can be read
    assert len(found["texts"]) >= (8 if measured.stem == "report" else 4)
    assert {key: at for key, at in found["texts"].items() if contrast(*json.loads(key)) < 4.5} == {}
    assert min(at["size"] for at in found["texts"].values()) >= 11

    # something is shown, on a ground that the scheme asks for
    assert picture.shape[1] == WIDTHS[width]
    assert len(np.unique(picture.astype(int) @ [1, 256, 65536])) > 100
    ground = np.median(picture[:, :8].reshape(-1, 3), axis=0)
    assert (ground > 230).all() if scheme == "light" else (ground < 50).all()

    # a click on a head sorts, largest first, and a second one the other way round
    before, once, twice = found["sorted"]
    numbers = [value for value in before if value]  # a trial that failed has none
    assert [value for value in once if value] == sorted(numbers, key=float, reverse=True)
    assert [value for value in twice if value] == sorted(numbers, key=float)
    assert once != twice
