"""The page in a real browser: what a reader sees, clicks and types, and what hostile text cannot do."""

from pathlib import Path

import pytest
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By

from harness.core.metrics import format_metric
from harness.core.records import Result
from harness.report.page import render
from harness.results.needed import need_of
from tests.browser.pages import SCRIPT, Open, case_of, cell, logged, requested

pytestmark = pytest.mark.browser


def test_a_cell_says_the_figures_of_its_record(show: Open, results: list[Result]) -> None:
    browser = show(results)
    for placement in ("direct", "cpu"):
        result = case_of(results, f"chatglm-6b/int4/{placement}")
        metrics, need = result.metrics, need_of(result)
        assert need
        shown = cell(browser, "int4", placement)
        assert shown.text.splitlines()[0] == "works"
        taken = shown.find_element(By.CSS_SELECTOR, ".need data")
        assert (float(taken.get_attribute("value") or "nan"), taken.text) == (need.bytes, format_metric(need.key, need.bytes))
        for key in ("ready_s", "decode_tok_s"):
            figure = shown.find_element(By.CSS_SELECTOR, f"data[data-key={key}]")
            assert float(figure.get_attribute("value") or "nan") == metrics[key]
            assert figure.text == format_metric(key, metrics[key])


def test_the_bar_is_as_long_as_the_peak_is_of_the_capacity(show: Open, results: list[Result]) -> None:
    shown = cell(show(results), "int4", "direct")
    track, filled = (shown.find_element(By.CSS_SELECTOR, f".bar .{name}").rect["width"] for name in ("track", "firm"))
    result = case_of(results, "chatglm-6b/int4/direct")
    gpu = result.machine.tier("gpu:0")
    assert gpu
    assert gpu.capacity_bytes
    need = need_of(result)
    assert need
    assert filled / track == pytest.approx(need.bytes / gpu.capacity_bytes, abs=0.01)


def test_a_click_on_a_cell_opens_its_details(show: Open, results: list[Result]) -> None:
    browser = show(results)
    details = browser.find_element(By.ID, "case-chatglm-6b-bf16-direct")
    assert not details.get_attribute("open")
    for _ in range(2):  # a second click on the same cell opens them again, although it changes no hash
        cell(browser, "bf16", "direct").click()
        assert details.get_attribute("open")
        assert "CUDA out of memory" in details.text
        details.find_element(By.CSS_SELECTOR, "summary").click()
        assert not details.get_attribute("open")


def test_the_keyboard_alone_opens_and_closes_details(show: Open, results: list[Result]) -> None:
    browser = show(results)
    details = browser.find_element(By.ID, "case-chatglm-6b-fp16-disk")
    cell(browser, "fp16", "disk").find_element(By.CSS_SELECTOR, "a").send_keys(Keys.ENTER)
    assert details.get_attribute("open")
    focused = browser.switch_to.active_element
    assert focused.tag_name == "summary"
    focused.send_keys(Keys.ENTER)
    assert not details.get_attribute("open")


def test_a_folded_case_opens_by_its_address(show: Open, results: list[Result]) -> None:
    browser = show([result for result in results if not result.machine.gpus])
    folded = browser.find_element(By.ID, "case-smollm2-135m-fp32-direct")
    assert not folded.is_displayed()
    browser.execute_script("location.hash = 'case-smollm2-135m-fp32-direct'")
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
    assert "this machine has no GPU" in folded.text


def test_without_scripts_a_cell_leads_to_details_that_open(show: Open, browser: Chrome, results: list[Result]) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(results)
        cell(browser, "fp16", "disk").find_element(By.CSS_SELECTOR, "a").send_keys(Keys.ENTER)
        assert browser.current_url.endswith("#case-chatglm-6b-fp16-disk")
        browser.find_element(By.CSS_SELECTOR, "#case-chatglm-6b-fp16-disk summary").send_keys(Keys.ENTER)
        assert "Loading code" in browser.find_element(By.ID, "case-chatglm-6b-fp16-disk").text
        assert not any(button.is_displayed() for button in browser.find_elements(By.CSS_SELECTOR, "button"))
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_copy_button_copies_the_code_as_it_is(show: Open, results: list[Result]) -> None:
    browser = show(results)
    browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    button = browser.find_element(By.CSS_SELECTOR, ".block:not(.fine) .answer button.copy")
    button.click()
    browser.execute_async_script("setTimeout(arguments[0], 100)")
    assert button.text == "copied"
    read = "navigator.clipboard.readText().then(arguments[0], () => arguments[0]('refused'))"
    assert browser.execute_async_script(read) == case_of(results, "chatglm-6b/int4/direct").code


def test_hostile_text_stays_text(show: Open, attacked: list[Result]) -> None:
    browser = show(attacked)
    for details in browser.find_elements(By.TAG_NAME, "details"):
        browser.execute_script("arguments[0].open = true", details)
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert.text
    assert browser.execute_script("return window.owned") is None
    assert len(browser.find_elements(By.CSS_SELECTOR, "script:not([type])")) == 1
    assert not browser.find_elements(By.CSS_SELECTOR, "img, [onerror], [onmouseover]")
    shown = browser.find_element(By.TAG_NAME, "main").text
    assert SCRIPT in shown
    assert not set(shown) & set("\u202e\u2067\x07\x1b")
    assert "‹U+202E›gnp.exe" in shown


# What stood in the page if a text had ever slipped through unescaped.
SLIPPED = (
    "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'><p onclick='window.owned = 1' id=slipped "
    "style='position: fixed'>x</p><style>p { color: red }</style><base href='https://example.org/'>"
    "<iframe src='data:text/html,x'></iframe>"
)


def test_what_slips_through_does_not_run(show: Open, browser: Chrome, results: list[Result], tmp_path: Path) -> None:
    file = tmp_path / "slipped.html"
    file.write_text(render.render(results).replace("<main>", f"<main>{SLIPPED}"), encoding="utf-8")
    logged(browser, "browser")
    browser.get(file.as_uri())
    slipped = browser.find_element(By.ID, "slipped")
    slipped.click()
    assert browser.execute_script("return window.owned") is None
    assert slipped.value_of_css_property("position") == "static"
    assert "255, 0, 0" not in slipped.value_of_css_property("color")
    assert browser.execute_script("return document.baseURI").startswith("file:")
    refused = [entry["message"] for entry in logged(browser, "browser") if "Content Security Policy" in entry["message"]]
    assert len(refused) >= 5, refused
    show(results)
    assert [entry for entry in logged(browser, "browser") if "Content Security Policy" in entry["message"]] == []


def test_nothing_makes_a_narrow_page_scroll_sideways(show: Open, results: list[Result], attacked: list[Result]) -> None:
    for shown in (results, attacked):
        browser = show(shown, width=360)
        script = "document.querySelectorAll('details').forEach((part) => (part.open = true))"
        browser.execute_script(script)
        widths = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth, innerWidth]"
        scrolled, visible, window = browser.execute_script(widths)
        assert scrolled <= visible
        assert window == 360


def test_the_page_asks_nobody_for_anything_and_logs_no_error(show: Open, results: list[Result], attacked: list[Result]) -> None:
    for shown in (results, attacked):
        browser = show(shown)
        cell(browser, "int4", "direct").find_element(By.CSS_SELECTOR, "a").send_keys(Keys.ENTER)
        assert [entry for entry in logged(browser, "browser") if entry["level"] == "SEVERE"] == []
        assert [url for url in requested(browser) if url != "data:,"] == [browser.current_url.partition("#")[0]]
