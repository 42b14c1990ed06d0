"""Builds the documents as a site, in build/site: python docs/build_site.py

README.md becomes its first page. Links are as on GitHub; where the site has another path for them they are changed on the way.
A page that is not there, a heading that is not there, and anything that a page would fetch from elsewhere are errors.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGED, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"
FETCHED = re.compile(
    r"""<(?:script|img|iframe|link(?=[^>]*rel="?(?:stylesheet|preload|preconnect|icon)))[^>]*(?:src|href)="?(https?:)?//"""
)


def staged() -> dict[str, str]:
    """The pages of the site by their names."""
    docs = ROOT / "docs"
    pages = {str(path.relative_to(docs).as_posix()): path.read_text(encoding="utf-8") for path in sorted(docs.rglob("*.md"))}
    first = (ROOT / "README.md").read_text(encoding="utf-8")
    pages["index.md"] = re.sub(r"\]\(docs/", "](", first)
    return {name: re.sub(r"\]\(((?:\.\./)*)\.\./README\.md", r"](\1index.md", text) for name, text in pages.items()}


def fetched(page: str) -> list[str]:
    """What a page would fetch from elsewhere as soon as it is opened."""
    return [found[0] for found in FETCHED.finditer(page)]


def unlisted(page: str) -> list[str]:
    """Items of lists that stand in a paragraph: GitHub asks for less to see a list than the site does."""
    article = page[page.find("<article") : page.find("</article")]
    return re.findall(r"\n(?:- |\d+\. ).{0,60}", re.sub(r"<pre.*?</pre>", "", article, flags=re.DOTALL))


def main() -> None:
    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    STAGED.mkdir(parents=True)
    for name, text in staged().items():
        (STAGED / name).parent.mkdir(exist_ok=True)
        (STAGED / name).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", STAGED / "images")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", str(ROOT / "zensical.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    problems = done.stdout + done.stderr
    if done.returncode or "Warning" in problems:
        sys.exit(f"{problems}\nerror: the site cannot be built without warnings")
    for page in sorted(SITE.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        if found := fetched(text):
            sys.exit(f"error: {page} fetches from elsewhere: {found[0]}")
        if found := unlisted(text):
            sys.exit(f"error: {page} has a list that is none: {found[0].strip()}; indent what is in its items by four spaces")
    print(f"site of {len(list(SITE.glob('*.html')))} pages: {SITE / 'index.html'}")


if __name__ == "__main__":
    main()
