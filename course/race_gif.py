#!/usr/bin/env python3
"""Films the race of chapter 00 for the README, from the state that the chapter's last run stored.

    race_gif.py [FILE]     docs/race.gif without FILE; needs Chromium and the extra e2e

The first seconds are filmed as they pass, the rest four times as fast; the picture shows clock and speed.
"""

from __future__ import annotations

import io
import os
import pathlib
import shutil
import sys
from typing import TYPE_CHECKING

from PIL import Image

import make_site
import widget_states

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHAPTER = ROOT / "notebooks" / "00_start_here.ipynb"
WIDTH_PX, COLOURS = 720, 48
REAL_MS, FRAME_MS, FASTER, END_MS = 8000, 200, 4, 4000
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PAGE = """<!doctype html><html lang="en"><style>
body { margin: 0; background: #ffffff; } button, .scrub { display: none !important; }
.mixoff-race .bar { justify-content: flex-end; } .mixoff-race .typed { height: 9.8em; }
.mixoff-race .note { min-height: 3em; }
</style>"""
SHOW = """([ms, speed]) => {
    document.querySelector('.speed').value = speed;
    const scrub = document.querySelector('.scrub');
    scrub.value = ms;
    scrub.dispatchEvent(new Event('input'));
}"""


def times_ms(last: int) -> list[tuple[int, int, int]]:
    """Of each frame: time of the race, its speed, and how long it is shown; all but the speed in ms."""
    real = [(ms, 1, FRAME_MS) for ms in range(0, min(REAL_MS, last), FRAME_MS)]
    fast = [(ms, FASTER, FRAME_MS) for ms in range(REAL_MS, last, FASTER * FRAME_MS)]
    return [*real, *fast, (last, FASTER, END_MS)]


def film(page: Page, html: str) -> tuple[list[Image.Image], list[int]]:
    """Frames of the race, and the ms that each is shown."""
    page.set_content(PAGE + html)
    page.wait_for_selector(".mixoff-race[data-clock]")
    frames = times_ms(int(page.locator(".scrub").get_attribute("max") or 0))
    page.evaluate(SHOW, [frames[-1][0], "1"])  # the tallest picture
    box, pictures = page.locator(".mixoff-race").bounding_box(), []
    for ms, speed, _ in frames:
        page.evaluate(SHOW, [ms, str(speed)])
        shot = page.screenshot(clip=box)
        pictures.append(Image.open(io.BytesIO(shot)).convert("RGB"))
    return pictures, [shown for _, _, shown in frames]


def write(pictures: list[Image.Image], shown_ms: list[int], path: pathlib.Path) -> None:
    """One GIF in the colours of its last picture, which has them all."""
    palette = pictures[-1].quantize(COLOURS)
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=shown_ms, loop=0, optimize=True)


def main(argv: list[str]) -> int:
    """Exit code 0 where the film is made."""
    from playwright.sync_api import sync_playwright

    path = pathlib.Path(argv[0]) if argv else ROOT / "docs" / "race.gif"
    browser = os.environ.get("MIXOFF_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    races = [(name, it) for name, it in widget_states.kept(CHAPTER).items() if it["class"].endswith(".Race")]
    if not browser or not races:
        print(
            "no Chromium on this machine" if races else f"no race in {widget_states.file_of(CHAPTER)}: run the chapter"
        )
        return 1
    name, stored = races[0]
    with sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": WIDTH_PX, "height": 900})
        pictures, shown_ms = film(page, make_site.widget_html(name, stored["state"], **{"class": stored["class"]}))
        chromium.close()
    write(pictures, shown_ms, path)
    print(f"{path.name}: {len(pictures)} frames, {sum(shown_ms) / 1000:.0f} s, {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
