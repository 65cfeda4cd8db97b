"""The page of a checkpoint in a real browser: a treemap to look at, a table to read, nothing that hostile names can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from harness.architecture.inspection import Inspection
from harness.checkpoint.reader import FileInfo
from harness.checkpoint.size_breakdown import SizePart, Tie
from harness.report.page import render, treemap
from tests.browser.pages import LONG, SCRIPT, logged, requested

pytestmark = pytest.mark.browser

MIB = 1 << 20
Open = Callable[..., Chrome]


def part(block: str, repeats: int, kind: str, size: int) -> SizePart:
    return SizePart(
        block=block, repeats=repeats, kind=kind, tensors=repeats, parameters=size // 2, bytes=size, dtype_bytes={"float16": size}
    )


PARTS = (
    part("", 1, "embedding", 100 * MIB),
    part("model.layers.0-29", 30, "attention", 300 * MIB),
    part("model.layers.0-29", 30, "mlp", 600 * MIB),
    part("", 1, "norm", 4096),
)


def inspection(parts: tuple[SizePart, ...] = PARTS, name: str = "tiny") -> Inspection:
    size = sum(part.bytes for part in parts)
    return Inspection(
        name=name,
        kind="directory",
        source=f"/home/somebody/{name}",
        architecture=name,
        parameters=size // 2,
        bytes=size,
        tensors=90,
        dtype_bytes={"float16": size},
        files=(FileInfo(name=f"{name}.safetensors", bytes=size, format="safetensors"),),
        quantization="gptq 4-bit",
        context_length=2048,
        parts=parts,
        ties=(Tie(names=(name, "lm_head.weight"), how="repeated", extra_bytes=MIB, extra_parameters=MIB // 2),),
    )


@pytest.fixture
def show(browser: Chrome, tmp_path: Path) -> Open:
    """Write the page of a checkpoint and open it, `width` pixels wide, in the light or in the dark."""

    def opened(of: Inspection, width: int = 1280, scheme: str = "light") -> Chrome:
        file = tmp_path / "inspect.html"
        render.write(file, treemap.render_treemap(of))
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for name in ("browser", "performance"):
            logged(browser, name)
        browser.get(file.as_uri())
        return browser

    return opened


def areas(browser: Chrome, kind: str) -> float:
    """Add up the areas of the rectangles of one kind, as they are on the screen."""
    found = browser.find_elements(By.CSS_SELECTOR, f".treemap .m-{kind} rect")
    return sum(float(rect.rect["width"]) * float(rect.rect["height"]) for rect in found)


def test_areas_on_the_screen_are_bytes(show: Open) -> None:
    browser = show(inspection())
    assert len(browser.find_elements(By.CSS_SELECTOR, ".treemap .m-mlp rect")) == 30
    assert areas(browser, "mlp") / areas(browser, "attention") == pytest.approx(2, rel=0.05)
    assert areas(browser, "attention") / areas(browser, "embedding") == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("blocks", [30, 100, 144, 180, 240])
def test_labels_stay_inside_their_rectangles(show: Open, blocks: int) -> None:
    name = f"model.layers.0-{blocks - 1}"
    browser = show(inspection((part(name, blocks, "attention", 40 * MIB), part(name, blocks, "mlp", 60 * MIB))))
    script = """return [...document.querySelectorAll('.treemap g text')].map((text) => {
        const inner = text.getBoundingClientRect(), outer = text.parentNode.querySelector('rect').getBoundingClientRect();
        return [text.textContent, inner.left >= outer.left && inner.right <= outer.right && inner.bottom <= outer.bottom];
    })"""
    labels = browser.execute_script(script)
    assert ["mlp", True] in labels or ["mlp 29", True] in labels
    assert not [text for text, is_inside in labels if not is_inside]


def test_the_table_says_the_figures(show: Open) -> None:
    rows = show(inspection()).find_elements(By.CSS_SELECTOR, "table.figures tbody tr")
    shown = [" ".join(row.text.split()) for row in rows[:4]]
    assert shown[0] == "outside the blocks embedding 1 52.4 M 100 MiB 10.0 % float16"
    assert shown[2] == "mlp 30 315 M 600 MiB 60.0 % 20.0 MiB float16"
    label = rows[0].find_element(By.XPATH, "//*[name()='svg'][@role='img']").get_attribute("aria-label")
    assert label == "Treemap of 1,000 MiB in 4 parts; the table below says the same"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(show: Open, scheme: str) -> None:
    """WCAG's contrast of 4.5 to 1, in the light and in the dark."""
    kinds = ("embedding", "attention", "mlp", "norm", "head", "other")
    browser = show(inspection(tuple(part("", 1, kind, MIB) for kind in kinds)), scheme=scheme)
    script = """
    const light = (color) => {
      const [r, g, b] = color.match(/[\\d.]+/g).map((part) => part / 255)
        .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    return [...document.querySelectorAll('.treemap g')].map((cell) => {
      const [ink, ground] = ['text', 'rect'].map((tag) => light(getComputedStyle(cell.querySelector(tag)).fill));
      return Math.max(ink, ground) / Math.min(ink, ground);
    })"""
    contrasts = browser.execute_script(script)
    assert len(contrasts) == len(kinds)
    assert min(contrasts) >= 4.5


@pytest.fixture
def attacked() -> Inspection:
    evil = f"{SCRIPT}\u202e\x1b[31m{LONG}"
    return inspection((part(f"{evil}.0-29", 30, "mlp", 600 * MIB), part(evil, 1, "other", MIB)), name=evil)


def test_hostile_names_stay_text(show: Open, attacked: Inspection) -> None:
    browser = show(attacked)
    assert browser.execute_script("return window.owned") is None
    assert not browser.find_elements(By.CSS_SELECTOR, "script, img, [onerror]")
    assert not set(browser.page_source) & set("\u202e\x1b")
    assert SCRIPT in browser.find_element(By.TAG_NAME, "main").text


def test_a_narrow_page_does_not_scroll_sideways_and_asks_nobody(show: Open, attacked: Inspection) -> None:
    for of in (inspection(), attacked):
        browser = show(of, width=360)
        scrolled, visible = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert scrolled <= visible
        assert [entry for entry in logged(browser, "browser") if entry["level"] == "SEVERE"] == []
        assert [url for url in requested(browser) if url != "data:,"] == [browser.current_url]
