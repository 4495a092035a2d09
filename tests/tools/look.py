"""Open a page in headless Chromium: print the text that a reader sees, keep a picture.

    python tests/tools/look.py 'http://127.0.0.1:5000/#/models/anchorage' --png model.png

Waits until the page has stopped asking for things. Exit code 3 where no Chromium is installed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from html import unescape
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BUDGET_MS = 10_000  # of the page's own clock, which stands still while a request is open
OPEN_S = (30.0, 90.0, 300.0)  # of the machine's clock, which on busy cores runs ahead of the page's
SIZE = (1400, 1000)
SHOWN = (0, 0, 1035, 1000)  # without the assistant's panel on the right


def main() -> int:
    """Read the arguments, open the page once for the text and once for the picture."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("url")
    asked.add_argument("--png", type=Path)
    given = asked.parse_args()
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        sys.stderr.write(f"no browser; wanted one of {', '.join(NAMES)}\n")
        return 3
    sys.stdout.write(text_of(opened(browser, given.url, "--dump-dom")) + "\n")
    if given.png is not None:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole.png"
            opened(browser, given.url, f"--screenshot={whole}")
            keep(whole, given.png)
    return 0


def opened(browser: str, url: str, what: str) -> str:
    """What Chromium writes to stdout for a page, in a profile of its own.

    A page's clock may stop for good where a request is lost; it is opened again then.
    """
    for wait_s in OPEN_S[:-1]:
        with suppress(subprocess.TimeoutExpired):
            return opened_once(browser, url, what, wait_s)
    return opened_once(browser, url, what, OPEN_S[-1])


def opened_once(browser: str, url: str, what: str, wait_s: float) -> str:
    """The same; TimeoutExpired after ``wait_s``."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless",
            "--no-sandbox",  # it refuses to run as root with one; the page is our own
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
            f"--window-size={SIZE[0]},{SIZE[1]}",
            f"--virtual-time-budget={BUDGET_MS}",
        ]
        told = subprocess.run(
            [browser, *options, what, url],
            capture_output=True,
            text=True,
            timeout=wait_s,
            check=True,
            env=os.environ | {"HOME": profile},
        )
    return told.stdout


def text_of(page: str) -> str:
    """The words between the tags, scripts and styles left out."""
    bare = re.sub(r"(?s)<(script|style)\b.*?</\1>", " ", page)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", bare)).split())


def keep(whole: Path, png: Path) -> None:
    """The part of the picture that says something, in 128 colours."""
    from PIL import Image

    with Image.open(whole) as picture:
        picture.crop(SHOWN).convert("RGB").quantize(128).save(png, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
