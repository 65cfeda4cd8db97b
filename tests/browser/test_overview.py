"""The overview in a real browser: points lead to cases, names can be read, numbers are the store's, in light and dark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By

from harness.core.records import Outcome, Result
from harness.core.units import GIB
from harness.report.page import render
from harness.results import store
from harness.results.needed import need_of
from tests.support.builders import GOLDEN

pytestmark = pytest.mark.browser

Open = Callable[..., Chrome]


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return [store.decode(line) for line in GOLDEN.read_bytes().splitlines()]


@pytest.fixture
def show(browser: Chrome, tmp_path: Path, results: list[Result]) -> Open:
    """Open the page of the results, `width` pixels wide, in the light or in the dark."""

    def opened(width: int = 1280, scheme: str = "light") -> Chrome:
        file = tmp_path / "page.html"
        render.write(file, render.render(results))
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(file.as_uri())
        return browser

    return opened


def test_a_click_on_a_point_opens_its_case_again_and_again(show: Open) -> None:
    browser = show()
    details = browser.find_element(By.ID, "case-chatglm-6b-int8-ram-to-gpu")
    point = browser.find_element(By.CSS_SELECTOR, ".plot a[href='#case-chatglm-6b-int8-ram-to-gpu']")
    for _ in range(2):
        assert not details.get_attribute("open")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
        browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}))", point)
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
        assert details.get_attribute("open")
        details.find_element(By.CSS_SELECTOR, "summary").click()


def test_the_topmost_point_is_where_the_mouse_finds_it(show: Open) -> None:
    browser = show()
    script = """
    const point = document.querySelector(".plot a[href='#case-chatglm-6b-int4-direct']");
    point.scrollIntoView({block: "center"});
    const {left, top, width, height} = point.querySelector("use:last-child").getBoundingClientRect();
    return document.elementFromPoint(left + width / 2, top + height / 2).closest("a").getAttribute("href")"""
    assert browser.execute_script(script) == "#case-chatglm-6b-int4-direct"


def test_a_row_of_the_predictions_opens_its_case_by_keyboard(show: Open) -> None:
    browser = show()
    row = browser.find_element(By.CSS_SELECTOR, ".forecast a[href='#case-chatglm-6b-bf16-direct']")
    assert row.text.split()[:3] == ["bf16/direct", "false", "fit"]
    row.send_keys(Keys.ENTER)
    assert browser.find_element(By.ID, "case-chatglm-6b-bf16-direct").get_attribute("open")


def test_the_table_says_the_figures_of_the_store(show: Open, results: list[Result]) -> None:
    browser = show()
    details = browser.find_element(By.CSS_SELECTOR, ".block:not(.fine) details.numbers")
    details.find_element(By.CSS_SELECTOR, "summary").click()
    newest = {f"{result.case.precision}/{result.case.place}": result for result in results if result.machine.gpus}
    by_name = {name: result for name, result in newest.items() if result.outcome is Outcome.OK}
    rows = details.find_elements(By.CSS_SELECTOR, "tbody tr")
    assert sorted(row.find_element(By.CSS_SELECTOR, "th").text for row in rows) == sorted(by_name)
    for row in rows:
        result = by_name[row.find_element(By.CSS_SELECTOR, "th").text]
        metrics, need = result.metrics, need_of(result)
        assert need
        size, speed = row.find_elements(By.CSS_SELECTOR, "data")
        peak = need.bytes
        assert (float(size.get_attribute("value") or 0), float(speed.get_attribute("value") or 0)) == (
            peak,
            metrics["decode_tok_s"],
        )
        assert float(size.text) == pytest.approx(peak / GIB, rel=0.005)
        assert float(speed.text) == pytest.approx(metrics["decode_tok_s"], rel=0.005)


@pytest.mark.parametrize("width", [360, 560, 1280])
def test_names_overlap_neither_each_other_nor_points_and_can_be_read(show: Open, width: int) -> None:
    browser = show(width)
    script = """
    return [...document.querySelectorAll(".plot")].map((plot) => {
      const boxes = (found) => [...found].map((part) => part.getBoundingClientRect()).filter((box) => box.width);
      const names = boxes(plot.querySelectorAll(".names text")), points = boxes(plot.querySelectorAll("use:last-child"));
      const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
      const bad = names.flatMap((a, i) => [...names.slice(i + 1), ...points].filter((b) => meet(a, b)).map((b) => [a, b]));
      const size = Math.min(...[...plot.querySelectorAll("text")].map((text) => parseFloat(getComputedStyle(text).fontSize)));
      const out = names.filter((box) => box.right > innerWidth || box.left < 0).length;
      return [names.length, bad, size * plot.getScreenCTM().a, out];
    })"""
    for names, overlapping, font, outside in browser.execute_script(script):
        assert names >= 2
        assert overlapping == []
        assert font >= 11
        assert outside == 0
    assert browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize("width", [360, 1280])
def test_the_band_lies_behind_its_column(show: Open, width: int) -> None:
    """The middle of the scale, of the band and of an empty difference are one line."""
    script = """
    const middle = (part) => { const {left, width} = part.getBoundingClientRect(); return left + width / 2; };
    return [...document.querySelectorAll(".forecast")].map((part) => ["svg:nth-of-type(1)", "svg:nth-of-type(2)"].map((nth) =>
      [".ground", ".heads:nth-child(3)", "li:last-child a"].map((row) => middle(part.querySelector(`${row} > ${nth}`)))))"""
    for columns in show(width).execute_script(script):
        for places in columns:
            assert places == pytest.approx([places[0]] * 3, abs=0.5)


CONTRASTS = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const light = (color) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
};
const ground = light(getComputedStyle(document.body).backgroundColor);
const contrast = (color) => { const ink = light(color); return Math.max(ink, ground) / Math.min(ink, ground); };
const of = (selector, key) => [...document.querySelectorAll(selector)].map((part) => contrast(getComputedStyle(part)[key]));
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_marks_stand_out(show: Open, scheme: str) -> None:
    """WCAG's contrast of 4.5 to 1 for words and 3 to 1 for the outlines of marks, in the light and in the dark."""
    browser = show(scheme=scheme)
    words = browser.execute_script(
        CONTRASTS + "return [...of('.overview text', 'fill'), ...of('.overview span, .forecast i', 'color')]"
    )
    marks = "#q-intact, #q-degraded, #q-broken, #q-not-checked, .plot path.front, .plot .capacity"
    outlines = browser.execute_script(CONTRASTS + f"return of('{marks}', 'stroke')")
    points = browser.execute_script(CONTRASTS + "return of('.forecast circle:not(.more)', 'fill')")
    assert min(words) >= 4.5
    assert len(outlines) >= 6
    assert min(outlines) >= 3
    assert min(points) >= 3
