#!/usr/bin/env python3
"""Screenshots of the page (scripts/webui.py) for the documentation, by a headless Chromium.

benchmarks/page.py [--outdir assets] starts the page on the bundled models, uses it and writes webui-*.png. It
needs the playwright package and a Chromium or Chrome of the system.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
DESKTOP, PHONE = (1280, 900), (390, 844)
TIMEOUT = 60_000  # ms
OVER = "/ in [0-9.]+ s[.]|Cancelled/.test(document.querySelector('#status').innerText)"
FAILED = "document.querySelector('#status .error') !== null"


def browser_path() -> str | None:
    """The system's Chromium; None if there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def served(*options: str) -> Iterator[str]:
    """The address of a page that runs in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / "webui.py"), "--port", "0", "--safety", "off", *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


@contextmanager
def browsing(address: str, size: tuple[int, int] = DESKTOP, **options: Any) -> Iterator["Page"]:
    """A tab of a headless Chromium in which the page has come up."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        page = browser.new_page(viewport={"width": size[0], "height": size[1]}, **options)
        page.set_default_timeout(TIMEOUT)
        page.on("request", lambda request: page.requested.append(request.url))
        page.requested = []
        page.goto(address)
        page.wait_for_selector("#generate")
        page.wait_for_timeout(300)  # until its handlers are there
        yield page
        browser.close()


def fill(page: "Page", control: str, text: str) -> None:
    """Type into the control of this id."""
    page.locator(f"#{control}").locator("textarea, input").first.fill(text)


def finish(page: "Page") -> str:
    """Wait until the page says what came of its job; returns that."""
    page.wait_for_function(f"{OVER} || {FAILED}")
    page.wait_for_timeout(400)  # for the gallery to fade in
    return page.inner_text("#status")


def generate(page: "Page") -> str:
    """Press the button, and `finish`."""
    page.click("#generate")
    page.wait_for_function(f"!({OVER}) && !{FAILED}")
    return finish(page)


def paint(page: "Page", image: str) -> None:
    """Choose inpainting, drop an image onto it and draw a stroke over its right half."""
    page.get_by_label("Inpaint", exact=True).check()
    page.wait_for_selector("#editor canvas")
    page.wait_for_timeout(1000)  # until the editor has set itself up
    page.set_input_files("#editor input[type=file]", image)
    page.wait_for_timeout(1000)
    canvas = page.locator("#editor canvas").last.bounding_box()
    x, y = canvas["x"] + canvas["width"] / 2 + 34, canvas["y"] + canvas["height"] / 2
    page.mouse.move(x, y - 56)
    page.mouse.down()
    for k in range(17):
        page.mouse.move(x + 78 * (k % 2), y - 56 + 6 * k)
    page.mouse.up()
    page.wait_for_timeout(500)


def save(page: "Page", path: Path, **options: Any) -> None:
    """A screenshot, packed as tightly as PNG allows."""
    page.screenshot(path=path, **options)
    Image.open(path).convert("RGB").save(path, optimize=True)
    print(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--outdir", type=Path, default=ROOT / "assets", help="folder for the files (assets)")
    outdir = parser.parse_args(argv).outdir
    outdir.mkdir(parents=True, exist_ok=True)
    if browser_path() is None:
        print(f"page.py: error: no browser: none of {', '.join(BROWSERS)} is there", file=sys.stderr)
        return 2
    with served() as address:
        with browsing(address) as page:
            for seed in ("3", "7"):
                fill(page, "prompt", "a red cube to the left of a blue sphere")
                fill(page, "set_seed", seed)
                said = generate(page)
                assert re.search("1 image", said), said
            page.mouse.move(0, 0)
            save(page, outdir / "webui-text.png")
            fill(page, "prompt", "a green cone")
            paint(page, str(ROOT / "assets" / "init.png"))
            said = generate(page)
            assert re.search("1 image", said), said
            page.evaluate("window.scrollTo(0, 0)")
            page.mouse.move(0, 0)
            save(page, outdir / "webui-inpaint.png")
        with browsing(address, PHONE, is_mobile=True, has_touch=True) as page:
            fill(page, "prompt", "a yellow cylinder in front of a green cube")
            fill(page, "set_seed", "5")
            generate(page)
            page.evaluate("document.querySelector('#buttons').scrollIntoView()")
            save(page, outdir / "webui-phone.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
