"""A real browser without a screen."""

import os
import shutil
import subprocess
from pathlib import Path

MISSING = "no Chromium: install Debian's package chromium, or name one in the variable CHROMIUM"


def browser() -> str | None:
    """Chromium or Chrome, where there is one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)


def document(url: str, folder: Path, *more: str) -> str:
    """The document of a page after its scripts have run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command = [str(browser()), *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", *more, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.stdout, done.stderr[-2000:]
    return done.stdout
