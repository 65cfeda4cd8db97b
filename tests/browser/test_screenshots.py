"""What the page looks like, against pictures that a person has looked at: reports/screenshots, of which one opens the README.

They are of real results of this project, and compared by the mean colour of squares: a letter drawn otherwise is nothing, a part
that has moved, vanished or lost its colour is something. A picture that is deleted is taken anew: look at it before you keep it.
"""

from __future__ import annotations

import subprocess
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome

from harness.core.records import Result
from harness.results import store
from tests.browser.pages import Open, settled
from tests.support.reporting import REPORTS

pytestmark = pytest.mark.browser

RESULTS = REPORTS / "smollm2-135m" / "results.jsonl"
PICTURES = REPORTS / "screenshots"
FONT = "DejaVu Sans"  # the pictures were taken with it; another one moves every line
SQUARE, COLOUR, SHARE = 16, 24, 0.02  # pixels; of 255; of the squares that may differ

# Of each picture: theme, width and height in pixels, what is above its upper edge.
VIEWS = {
    "page-light": ("light", 1280, 1000, "body"),
    "page-dark": ("dark", 1280, 1000, "body"),
    "page-wide": ("dark", 1920, 1080, "body"),
    "page-phone": ("light", 360, 800, "body"),
    "charts": ("light", 1280, 700, ".overview"),
    "details": ("light", 1280, 1000, "details.case"),
}


@pytest.fixture(scope="module")
def measured() -> list[Result]:
    return [store.decode(line) for line in RESULTS.read_bytes().splitlines()]


@pytest.fixture(autouse=True)
def _has_the_font() -> None:
    known = subprocess.run(["fc-list", ":", "family"], capture_output=True, text=True, check=False).stdout
    if FONT not in known:
        pytest.skip(f"the pictures were taken with {FONT}, which is not installed here")


@pytest.mark.parametrize("name", VIEWS)
def test_it_looks_as_it_did(show: Open, measured: list[Result], name: str) -> None:
    theme, width, height, at = VIEWS[name]
    browser = show(measured, width)
    seen = taken(browser, theme, width, height, at)
    path = PICTURES / f"{name}.png"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        seen.save(path, optimize=True)
        pytest.fail(f"{path} was not there and is now: look at it")
    share = different(seen, Image.open(path))
    if share > SHARE:
        seen.save(path.with_suffix(".now.png"))
        pytest.fail(f"{share:.0%} of {path.name} look otherwise: compare with {path.stem}.now.png, delete the one that is wrong")


def taken(browser: Chrome, theme: str, width: int, height: int, at: str) -> Image.Image:
    """Take a picture of the page from an element on, in one font and without a caret."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]})
    script = """
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(`:root { font-family: "${arguments[0]}" }
      * { transition: none !important; caret-color: transparent; content-visibility: visible !important }`);
    document.adoptedStyleSheets = [sheet];
    for (const part of document.querySelectorAll(arguments[1] === "details.case" ? arguments[1] : "nothing")) {
      part.open = true;
      break;
    }
    return document.querySelector(arguments[1]).getBoundingClientRect().top + scrollY;
    """
    top = browser.execute_script(script, FONT, at)
    settled(browser)
    clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
    image = _painted(browser, clip)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    return image


def _painted(browser: Chrome, clip: dict[str, float]) -> Image.Image:
    """Take the same picture until it stays as it is: on a busy machine the first ones come before all of it is painted."""
    before = None
    for _ in range(20):
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        image = Image.open(BytesIO(b64decode(shot["data"]))).convert("RGB")
        is_blank = len(image.getcolors(1) or ()) == 1
        if not is_blank and before is not None and image.tobytes() == before.tobytes():
            break
        before = image
    return image


def different(one: Image.Image, other: Image.Image) -> float:
    """Return the share of squares whose mean colours differ; all of them where the sizes do."""
    if one.size != other.size:
        return 1.0
    size = (one.width // SQUARE, one.height // SQUARE)
    first, second = (np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX), dtype=np.int16) for image in (one, other))
    return float((np.abs(first - second).max(axis=2) > COLOUR).mean())


def test_a_part_that_is_gone_is_noticed() -> None:
    page = Image.new("RGB", (320, 320), "white")
    page.paste("green", (0, 0, 320, 32))
    assert different(page, page.copy()) == 0
    assert different(page, Image.new("RGB", (320, 320), "white")) == pytest.approx(0.1)
    assert different(page, page.resize((320, 160))) == 1


def test_the_readme_opens_with_a_picture_of_the_page() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "(reports/screenshots/page-light.png)" in readme.split("\n## ")[0]
