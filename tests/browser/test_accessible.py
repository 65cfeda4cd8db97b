"""The page for everybody: by keyboard, by screen reader, on a narrow screen, in light, dark and print (WCAG 2.2 AA)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from harness.cli import entry
from harness.core.records import Result, encode_record
from harness.core.units import GIB
from harness.report.site import pages
from harness.results import store
from tests.browser.pages import Open, cell, many, settled, violations

pytestmark = pytest.mark.browser


@pytest.fixture
def media(browser: Chrome) -> Iterator[Any]:
    """Set what the reader's system asks for, and what the page is shown on."""

    def to(scheme: str = "light", kind: str = "screen") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": features})

    yield to
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


@pytest.fixture
def few(results: list[Result]) -> list[Result]:
    """Some cases of each kind, so that axe-core is done in a moment."""
    kept = {"bf16", "int4"}
    return [
        r for r in results if r.case.precision in kept and (not r.machine.gpus or r.case.placement in ("direct", "auto", "cpu"))
    ]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_core_finds_nothing(show: Open, few: list[Result], axe: str, media: Any, scheme: str, width: int) -> None:
    media(scheme)
    browser = show(few, width=width)
    assert violations(browser, axe) == []
    browser.execute_script("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    assert violations(browser, axe) == []


@pytest.mark.parametrize("fragment", ["precision=int4&fits=6", "order=fastest", "case-chatglm-6b-int4-direct"])
def test_axe_core_finds_nothing_in_a_view_of_ones_own(show: Open, few: list[Result], axe: str, fragment: str) -> None:
    browser = show(few, fragment=fragment)
    settled(browser)
    assert violations(browser, axe) == []


def test_axe_core_finds_nothing_in_limits_and_packed(show: Open, few: list[Result], axe: str) -> None:
    replace = msgspec.structs.replace
    limited = [replace(r, case=replace(r.case, vram_bytes=size)) for r in few for size in (8 * GIB, None)]
    assert violations(show(many(limited, 3)), axe) == []


def focused(browser: Chrome) -> WebElement:
    return browser.switch_to.active_element


def place(browser: Chrome) -> str:
    """Tell which cell has the focus."""
    return (focused(browser).get_attribute("aria-label") or "").partition(": ")[2]


def test_arrows_move_between_the_cells_of_a_matrix(show: Open, results: list[Result]) -> None:
    browser = show([r for r in results if r.machine.gpus])
    browser.execute_script("arguments[0].focus()", cell(browser, "bf16", "auto").find_element(By.TAG_NAME, "a"))
    seen = []
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.HOME, Keys.END, Keys.ARROW_RIGHT):
        focused(browser).send_keys(key)
        seen.append(place(browser))
    assert seen == ["bf16, dispatch", "fp16, dispatch", "fp16, auto", "bf16, auto", "bf16, direct", "bf16, cpu", "bf16, cpu"]


def test_arrows_pass_over_what_a_filter_hides(show: Open, results: list[Result]) -> None:
    browser = show([r for r in results if r.machine.gpus], fragment="outcome=works")
    browser.execute_script("arguments[0].focus()", browser.find_element(By.CSS_SELECTOR, ".block:not(.fine) td.best > a"))
    focused(browser).send_keys(Keys.END)
    assert place(browser) == "int4, cpu"
    focused(browser).send_keys(Keys.ARROW_UP)
    assert place(browser) == "fp16, cpu"  # int8 on the CPU is not supported


def test_escape_closes_the_details_and_returns_to_the_cell(show: Open, results: list[Result]) -> None:
    browser = show([r for r in results if r.machine.gpus])
    link = cell(browser, "fp16", "disk").find_element(By.TAG_NAME, "a")
    link.send_keys(Keys.ENTER)
    settled(browser)
    details = browser.find_element(By.ID, "case-chatglm-6b-fp16-disk")
    assert details.get_attribute("open")
    focused(browser).send_keys(Keys.ESCAPE)
    assert not details.get_attribute("open")
    assert focused(browser) == link
    assert "case-" not in browser.current_url.partition("#")[2]


def test_the_whole_reason_shows_at_the_pointer_and_at_the_focus(show: Open, results: list[Result]) -> None:
    browser = show([r for r in results if r.machine.gpus])
    tip = browser.find_element(By.ID, "tip")
    died = cell(browser, "bf16", "direct")
    why = next(r.why for r in results if r.case.id == "chatglm-6b/bf16/direct")
    assert not tip.is_displayed()
    browser.execute_script("arguments[0].focus()", died.find_element(By.TAG_NAME, "a"))
    assert tip.text == why
    assert died.find_element(By.TAG_NAME, "a").get_attribute("aria-describedby") == "tip"
    focused(browser).send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", died)
    settled(browser)
    ActionChains(browser).move_to_element(cell(browser, "int4", "direct")).pause(0.5).perform()
    assert tip.text == "Needs 5.61 of 11.6 GiB VRAM, measured. Predicted: fits."
    box, window = tip.rect, browser.execute_script("return [scrollX, scrollY, innerWidth, innerHeight]")
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= window[2]


def test_predicted_cells_say_so_and_look_otherwise(show: Open, results: list[Result]) -> None:
    browser = show([r for r in results if r.machine.gpus])
    predicted, measured = cell(browser, "fp32", "direct"), cell(browser, "int4", "direct")
    assert "predicted" in predicted.text
    assert "predicted" not in measured.text
    assert predicted.value_of_css_property("border-left-style") == "dashed"
    assert measured.value_of_css_property("border-left-style") == "none"
    assert predicted.find_elements(By.CSS_SELECTOR, ".bar .hatch")


def test_the_theme_button_turns_round_and_is_remembered(show: Open, few: list[Result], media: Any) -> None:
    media("light")
    browser = show(few)
    ground = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(ground) == "rgb(255, 255, 255)"
    button = browser.find_element(By.ID, "theme")
    words = [button.text]
    for _ in range(2):
        button.click()
        words.append(button.text)
    assert words == ["◐ auto", "☀ light", "☾ dark"]
    assert browser.execute_script(ground) == "rgb(20, 24, 28)"
    browser.refresh()
    assert browser.execute_script(ground) == "rgb(20, 24, 28)"
    browser.find_element(By.ID, "theme").click()
    assert browser.execute_script(ground) == "rgb(255, 255, 255)"


def test_a_theme_works_where_nothing_may_be_kept(show: Open, few: list[Result], media: Any) -> None:
    media("light")
    browser = show(few)
    forbid = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": forbid})
    try:
        show(few)
        for _ in range(2):
            browser.find_element(By.ID, "theme").click()
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_print_shows_answer_matrix_and_opened_details_and_no_controls(show: Open, few: list[Result], media: Any) -> None:
    browser = show(few, fragment="case-chatglm-6b-int4-direct")
    settled(browser)
    media("dark", "print")
    assert browser.find_element(By.CSS_SELECTOR, ".block:not(.fine) .answer").is_displayed()
    assert browser.find_element(By.CSS_SELECTOR, ".block:not(.fine) table.matrix").is_displayed()
    cases = [case for case in browser.find_elements(By.CSS_SELECTOR, "details.case") if case.is_displayed()]
    assert [case.get_attribute("id") for case in cases] == ["case-chatglm-6b-int4-direct"]
    controls = browser.find_elements(By.CSS_SELECTOR, "button, select, input, nav, #tip")
    assert not [control.tag_name for control in controls if control.is_displayed()]
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.parametrize("fragment", ["", "order=least", "precision=int4"])
def test_controls_are_large_enough_and_nothing_scrolls_sideways(show: Open, results: list[Result], fragment: str) -> None:
    browser = show(many(results, 2), width=360, fragment=fragment)
    script = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scrolled, visible = browser.execute_script(script)
    assert scrolled <= visible
    for control in browser.find_elements(By.CSS_SELECTOR, "button, select, input, .fold > summary"):
        if control.is_displayed():
            assert min(control.rect["width"], control.rect["height"]) >= 24, control.get_attribute("outerHTML")


def test_the_timeline_names_the_phases(show: Open, results: list[Result]) -> None:
    browser = show(results, fragment="case-chatglm-6b-int4-direct")
    settled(browser)
    drawing = browser.find_element(By.CSS_SELECTOR, "#case-chatglm-6b-int4-direct .timeline")
    assert [label.text for label in drawing.find_elements(By.CSS_SELECTOR, ".phase")][:1] == ["loading"]


@pytest.mark.parametrize(("scheme", "width", "most"), [("light", 1280, 500), ("dark", 360, 1)])
def test_axe_core_finds_nothing_in_a_site(
    browser: Chrome, few: list[Result], axe: str, media: Any, scheme: str, width: int, most: int, tmp_path: Path
) -> None:
    """As it is, and with lists that go on on further pages."""
    media(scheme)
    past = [msgspec.structs.replace(result, at=result.at.replace("2026", "2024")) for result in few]
    (tmp_path / store.NAME).write_bytes(b"".join(encode_record(result) + b"\n" for result in past))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "MOST_LISTED", dict.fromkeys(pages.MOST_LISTED, most))
        assert entry.main(["publish", str(tmp_path), "--to", str(tmp_path / "site")]) == 0
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    files = sorted((tmp_path / "site").rglob("*.html"))
    assert any("~" in file.name for file in files) == (most == 1)
    for file in files:
        browser.get(file.as_uri())
        assert violations(browser, axe) == [], file.name
