"""What the page looks like, against pictures that a person has looked at: reports/screenshots, of which one opens the README.

They are of real results of this project, and compared by the mean color of squares: a letter drawn otherwise is nothing, a part
that has moved, vanished or lost its color is something. A picture that is deleted is taken anew: look at it before you keep it.
"""

from __future__ import annotations

import functools
import subprocess
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from harness.core.records import Result
from harness.results import store
from tests.browser.pages import Open, settled
from tests.browser.planners import answered
from tests.support.reporting import REPORTS

pytestmark = pytest.mark.browser

PICTURES = REPORTS / "screenshots"
FONT, CHINESE = "DejaVu Sans", "Noto Sans CJK SC"  # the pictures were taken with them; another one moves every line
SQUARE, COLOR, SHARE = 16, 24, 0.02  # pixels; of 255; of the squares that may differ


class Picture(NamedTuple):
    """The theme, width and height in pixels, what begins at its upper edge, and whose results it is of."""

    theme: str
    width: int
    height: int
    at: str = "body"
    of: str = "smollm2-135m"


SIZES = {"": (1280, 1000), "-wide": (1920, 1080), "-phone": (360, 800)}
PAGES = {f"page{size}-{theme}": Picture(theme, *SIZES[size]) for size in SIZES for theme in ("light", "dark")}
PARTS = {
    "models": Picture("light", 1280, 1000, of="full-size"),
    "charts": Picture("light", 1280, 700, ".overview"),
    "details": Picture("light", 1280, 1000, "details.case"),
    "details-wide": Picture("dark", 1920, 1080, "details.case"),
}
ENGLISH = PAGES | PARTS
# Each in both languages.
VIEWS = ENGLISH | {f"{name}-zh": picture for name, picture in ENGLISH.items()}


PLANNER = {
    f"planner{size}-{theme}{language}": Picture(theme, *SIZES[size])
    for size in ("", "-phone")
    for theme in ("light", "dark")
    for language in ("", "-zh")
}


@functools.cache
def measured(of: str) -> list[Result]:
    return [store.decode(line) for line in (REPORTS / of / "results.jsonl").read_bytes().splitlines()]


@functools.cache
def fonts() -> str:
    return subprocess.run(["fc-list", ":", "family"], capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("name", VIEWS)
def test_it_looks_as_it_did(show: Open, name: str) -> None:
    is_chinese, picture = name.endswith("-zh"), VIEWS[name]
    need_fonts(is_chinese)
    compare(name, taken(show(measured(picture.of), picture.width, "lang=zh" if is_chinese else "lang=en"), picture))


@pytest.mark.parametrize("name", PLANNER)
def test_the_planner_looks_as_it_did(planner: Chrome, name: str) -> None:
    is_chinese, picture = name.endswith("-zh"), PLANNER[name]
    need_fonts(is_chinese)
    size = {"width": picture.width, "height": picture.height, "deviceScaleFactor": 1, "mobile": False}
    planner.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    planner.find_element(By.CSS_SELECTOR, f"[data-lang={'zh' if is_chinese else 'en'}]").click()
    planner.execute_script("document.getElementById('said').style.visibility = 'hidden'")  # how long it took
    answered(planner)
    compare(name, taken(planner, picture))


def need_fonts(is_chinese: bool) -> None:
    for font in (FONT, CHINESE) if is_chinese else (FONT,):
        if font not in fonts():
            pytest.skip(f"the picture was taken with {font}, which is not installed here")


def compare(name: str, seen: Image.Image) -> None:
    """Fail if a picture is not as it is kept, or was not kept and now is."""
    path = PICTURES / f"{name}.png"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        seen.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        pytest.fail(f"{path} was not there and is now: look at it")
    share = different(seen, Image.open(path))
    if share > SHARE:
        seen.save(path.with_suffix(".now.png"))
        pytest.fail(f"{share:.0%} of {path.name} look otherwise: compare with {path.stem}.now.png, delete the one that is wrong")


def taken(browser: Chrome, picture: Picture) -> Image.Image:
    """Take a picture of the page from an element on, in one font and without a caret."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": picture.theme}]})
    script = """
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(`body { font-family: ${arguments[0]} }
      * { transition: none !important; caret-color: transparent; content-visibility: visible !important }`);
    document.adoptedStyleSheets = [sheet];
    for (const part of document.querySelectorAll(arguments[1] === "details.case" ? arguments[1] : "nothing")) {
      part.open = true;
      break;
    }
    return document.querySelector(arguments[1]).getBoundingClientRect().top + scrollY;
    """
    top = browser.execute_script(script, f'"{FONT}", "{CHINESE}"', picture.at)
    settled(browser)
    clip = {"x": 0, "y": top, "width": picture.width, "height": picture.height, "scale": 1}
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
    """Return the share of squares whose mean colors differ; all of them where the sizes do."""
    if one.size != other.size:
        return 1.0
    size = (one.width // SQUARE, one.height // SQUARE)
    first, second = (np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX), dtype=np.int16) for image in (one, other))
    return float((np.abs(first - second).max(axis=2) > COLOR).mean())


def test_a_part_that_is_gone_is_noticed() -> None:
    page = Image.new("RGB", (320, 320), "white")
    page.paste("green", (0, 0, 320, 32))
    assert different(page, page.copy()) == 0
    assert different(page, Image.new("RGB", (320, 320), "white")) == pytest.approx(0.1)
    assert different(page, page.resize((320, 160))) == 1


def test_the_readme_opens_with_a_picture_of_the_page() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "(reports/screenshots/page-light.png)" in readme.split("\n## ")[0]
