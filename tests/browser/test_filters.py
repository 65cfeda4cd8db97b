"""Filters, orders and addresses of the page in a real browser, with the details packed and not."""

from __future__ import annotations

import msgspec
import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from harness.core.records import Outcome, Result
from harness.core.units import GIB
from harness.report.page import figures
from harness.results import selection
from tests.browser.pages import SCRIPT, Open, many, settled, shown

pytestmark = pytest.mark.browser


def anchors(results: list[Result]) -> list[str]:
    return [f"case-{result.case.id.replace('/', '-')}" for result in results]


def choose(browser: Chrome, name: str, word: str) -> None:
    Select(browser.find_element(By.NAME, name)).select_by_visible_text(word)


def fragment(browser: Chrome) -> str:
    return browser.current_url.partition("#")[2]


def found(browser: Chrome) -> str:
    return browser.find_element(By.CSS_SELECTOR, "#filters output").text


@pytest.fixture
def gpu(results: list[Result]) -> list[Result]:
    return [result for result in results if result.machine.gpus]


def test_a_precision_leaves_its_row_and_says_how_many_cases_match(show: Open, gpu: list[Result]) -> None:
    browser = show(gpu)
    wanted = [result for result in selection.newest(gpu) if result.case.precision == "int8"]
    choose(browser, "precision", "int8")
    assert sorted(shown(browser)) == sorted(anchors(wanted))
    rows = [row.text.split()[0] for row in browser.find_elements(By.CSS_SELECTOR, ".matrix tbody tr") if row.is_displayed()]
    assert rows == ["int8"]
    assert found(browser).startswith(
        f"{len(wanted)} of {len(selection.newest(gpu))} cases; the fastest that works: int8 / direct, 8.94"
    )
    assert fragment(browser) == "precision=int8"


def test_drawings_leave_out_what_a_filter_leaves_out(show: Open, gpu: list[Result]) -> None:
    browser = show(gpu)
    choose(browser, "precision", "int4")
    script = """
    const parts = [...document.querySelectorAll(".overview a, .overview [data-of]")];
    const seen = parts.filter((part) => part.checkVisibility({ visibilityProperty: true }));
    return seen.map((part) => part.getAttribute("href") ?? `#${part.dataset.of}`);
    """
    drawn = set(browser.execute_script(script))
    assert {f"#case-chatglm-6b-int4-{name}" for name in ("direct", "ram-to-gpu", "auto", "cpu")} >= drawn
    assert "#case-chatglm-6b-int4-direct" in drawn


def test_a_placement_leaves_its_column(show: Open, gpu: list[Result]) -> None:
    browser = show(gpu)
    choose(browser, "placement", "gpu+cpu")
    heads = [head.text.split()[0] for head in browser.find_elements(By.CSS_SELECTOR, ".matrix thead th") if head.is_displayed()]
    assert heads == ["gpu+cpu"]
    assert fragment(browser) == "placement=gpu%2Bcpu"


def test_what_fits_in_a_size_is_what_worked_in_it_or_is_predicted_to(show: Open, gpu: list[Result]) -> None:
    browser = show(gpu)
    field = browser.find_element(By.NAME, "fits")
    field.send_keys("6", Keys.ENTER)
    wanted = []
    for result in selection.newest(gpu):
        memory = figures.memory(result)
        known = result.outcome is Outcome.OK or not selection.ran(result)
        if memory and known and float(memory.need.value) <= 6 * GIB:
            wanted.append(result)
    assert 2 < len(wanted) < len(gpu)
    assert sorted(shown(browser)) == sorted(anchors(wanted))
    assert fragment(browser) == "fits=6"


def test_predicted_and_measured_are_told_apart(show: Open, gpu: list[Result]) -> None:
    browser = show(gpu)
    choose(browser, "figures", "predicted")
    assert sorted(shown(browser)) == sorted(anchors([r for r in selection.newest(gpu) if not selection.ran(r)]))
    choose(browser, "figures", "measured")
    assert sorted(shown(browser)) == sorted(anchors([r for r in selection.newest(gpu) if selection.ran(r)]))


def test_an_outcome_without_a_model_hides_its_block_and_reset_brings_it_back(show: Open, results: list[Result]) -> None:
    browser = show(results)
    everything = shown(browser)
    choose(browser, "outcome", "crashed")
    blocks = [block for block in browser.find_elements(By.CSS_SELECTOR, ".block[id]") if block.is_displayed()]
    assert [block.find_element(By.TAG_NAME, "h2").text.split()[0] for block in blocks] == ["chatglm-6b"]
    assert len([link for link in browser.find_elements(By.CSS_SELECTOR, "nav li") if link.is_displayed()]) == 1
    browser.find_element(By.CSS_SELECTOR, "#filters button[type=reset]").click()
    assert shown(browser) == everything
    assert fragment(browser) == ""
    assert found(browser) == ""


def test_a_filter_opens_what_is_folded_and_reset_folds_it_again(show: Open, results: list[Result]) -> None:
    browser = show(results)
    fold = browser.find_element(By.CSS_SELECTOR, ".model")
    assert not fold.get_attribute("open")
    chosen = browser.find_element(By.NAME, "model")
    browser.execute_script("arguments[0].value = 'smollm2-135m'; arguments[0].form.requestSubmit()", chosen)
    settled(browser)
    assert fold.get_attribute("open")
    assert {case.split("-")[1] for case in shown(browser)} == {"smollm2"}
    browser.find_element(By.CSS_SELECTOR, "#filters [type=reset]").click()
    settled(browser)
    assert not fold.get_attribute("open")
    fold.find_element(By.TAG_NAME, "summary").click()  # what a person opened stays open
    browser.execute_script(
        "arguments[0].value = 'int4'; arguments[0].form.requestSubmit()", browser.find_element(By.NAME, "precision")
    )
    settled(browser)
    browser.find_element(By.CSS_SELECTOR, "#filters [type=reset]").click()
    settled(browser)
    assert fold.get_attribute("open")


def test_where_nothing_matches_it_says_so(show: Open, gpu: list[Result]) -> None:
    browser = show(gpu, fragment="precision=fp32&outcome=works")
    assert shown(browser) == []
    assert found(browser) == "No case matches."


def test_folded_cases_are_filtered_too(show: Open, results: list[Result]) -> None:
    browser = show([result for result in results if not result.machine.gpus])
    fold = browser.find_element(By.CSS_SELECTOR, ".fold")
    choose(browser, "placement", "cpu")
    assert not fold.is_displayed()
    choose(browser, "placement", "direct")
    assert fold.is_displayed()
    assert not browser.find_element(By.CSS_SELECTOR, "table.matrix").is_displayed()
    fold.find_element(By.TAG_NAME, "summary").click()
    assert [item.text for item in fold.find_elements(By.TAG_NAME, "li") if item.is_displayed()] == [
        f"{precision} direct unavailable" for precision in ("fp32", "bf16", "int4")
    ]


def test_back_and_forward_lead_through_the_views(show: Open, gpu: list[Result]) -> None:
    browser = show(gpu)
    everything = shown(browser)
    choose(browser, "precision", "int4")
    narrowed = shown(browser)
    choose(browser, "placement", "direct")
    browser.back()
    settled(browser)
    assert shown(browser) == narrowed
    assert browser.find_element(By.NAME, "placement").get_attribute("value") == ""
    browser.back()
    settled(browser)
    assert shown(browser) == everything
    browser.forward()
    settled(browser)
    assert shown(browser) == narrowed


@pytest.mark.parametrize("models", [1, 2])
def test_a_copied_address_opens_the_same_view(show: Open, gpu: list[Result], models: int) -> None:
    browser = show(many(gpu, models))
    choose(browser, "precision", "int4")
    browser.find_element(By.CSS_SELECTOR, ".block:not(.fine) td.cell.best > a").click()
    settled(browser)
    address, narrowed = fragment(browser), shown(browser)
    assert address == "case-chatglm-6b-0-int4-direct&precision=int4"
    show(many(gpu, models), fragment=address)
    settled(browser)
    assert shown(browser) == narrowed
    opened = browser.find_elements(By.CSS_SELECTOR, "details.case[open]")
    assert [details.get_attribute("id") for details in opened] == ["case-chatglm-6b-0-int4-direct"]
    assert "Memory over time" in opened[0].text


def test_the_fastest_come_first(show: Open, gpu: list[Result]) -> None:
    browser = show(gpu)
    choose(browser, "order", "fastest first")
    cards = browser.find_elements(By.CSS_SELECTOR, "#flat li")
    names = [card.find_element(By.CSS_SELECTOR, ".name").text for card in cards]
    assert len(names) == len(selection.newest(gpu))
    assert names[:2] == ["int4 / direct", "int4 / ram-to-gpu"]
    script = "return [...document.querySelectorAll('#flat data[data-key=decode_tok_s]')].map((data) => +data.value)"
    speeds = browser.execute_script(script)
    sound = speeds[:-1]  # int4/auto is faster, but its answers are broken
    assert sound == sorted(sound, reverse=True)
    assert not browser.find_element(By.CSS_SELECTOR, "table.matrix").is_displayed()


def test_the_least_memory_comes_first_and_a_card_opens_its_details(show: Open, gpu: list[Result]) -> None:
    browser = show(gpu)
    choose(browser, "order", "least memory first")
    cards = browser.find_elements(By.CSS_SELECTOR, "#flat li")
    assert cards[0].find_element(By.CSS_SELECTOR, ".name").text == "int4 / direct"
    cards[1].find_element(By.TAG_NAME, "a").send_keys(Keys.ENTER)
    settled(browser)
    details = browser.find_element(By.ID, "case-chatglm-6b-int4-ram-to-gpu")
    assert details.is_displayed()
    assert "Loading code" in details.text
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert browser.switch_to.active_element == cards[1].find_element(By.TAG_NAME, "a")
    choose(browser, "order", "table order")
    assert browser.find_element(By.CSS_SELECTOR, ".cases").find_elements(By.ID, "case-chatglm-6b-int4-ram-to-gpu")


def test_an_order_shows_the_first_cases_of_many_and_more_when_asked(show: Open, results: list[Result]) -> None:
    browser = show(many(results, 2), fragment="order=fastest")
    first = len(browser.find_elements(By.CSS_SELECTOR, "#flat li"))
    more = browser.find_element(By.CSS_SELECTOR, "#flat .more")
    assert more.text == f"show more ({2 * len(selection.newest(results)) - first} left)"
    more.click()
    assert len(browser.find_elements(By.CSS_SELECTOR, "#flat li")) == 2 * first


def test_a_card_further_down_is_brought_by_its_address(show: Open, results: list[Result]) -> None:
    browser = show(many(results, 2), fragment="case-chatglm-6b-1-fp16-disk&order=fastest")
    settled(browser)
    opened = browser.find_element(By.CSS_SELECTOR, "#flat details[open]")
    assert opened.get_attribute("id") == "case-chatglm-6b-1-fp16-disk"
    assert not browser.find_element(By.CSS_SELECTOR, "table.matrix").is_displayed()


def test_packed_details_are_unpacked_by_a_cell_by_its_address_and_by_the_button(show: Open, results: list[Result]) -> None:
    browser = show(many(results, 2))
    assert not browser.find_elements(By.CSS_SELECTOR, "details.case")
    browser.find_element(By.CSS_SELECTOR, ".block:not(.fine) td.cell.best > a").send_keys(Keys.ENTER)
    settled(browser)
    details = browser.find_element(By.ID, "case-chatglm-6b-0-int4-direct")
    assert details.get_attribute("open")
    assert browser.switch_to.active_element == details.find_element(By.TAG_NAME, "summary")
    assert "Loading code" in details.text
    browser.execute_script("location.hash = 'case-smollm2-135m-1-fp32-direct'")  # a folded one
    settled(browser)
    assert "this machine has no GPU" in browser.find_element(By.ID, "case-smollm2-135m-1-fp32-direct").text
    packed = browser.find_elements(By.CSS_SELECTOR, ".packed")
    assert len(packed) == 2
    packed[0].find_element(By.XPATH, "ancestor::details/summary").click()
    packed[0].find_element(By.CSS_SELECTOR, ".unpack").click()
    settled(browser)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".packed")) == 1


def test_packed_details_follow_a_filter_that_was_set_before(show: Open, results: list[Result]) -> None:
    browser = show(many(results, 2), fragment="precision=int4&model=chatglm-6b-0")
    browser.find_element(By.CSS_SELECTOR, ".block:not(.fine) td.cell.best > a").click()
    settled(browser)
    names = [
        case.text.split()[0] for case in browser.find_elements(By.CSS_SELECTOR, "details.case > summary") if case.is_displayed()
    ]
    assert set(names) == {"int4"}


def test_without_scripts_a_packed_page_says_what_is_missing_and_shows_no_bar(
    show: Open, browser: Chrome, results: list[Result]
) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(many(results, 2))
        assert "details of the 112 cases are compressed" in browser.find_element(By.TAG_NAME, "noscript").text
        assert not browser.find_element(By.ID, "filters").is_displayed()
        assert browser.find_element(By.CSS_SELECTOR, ".block:not(.fine) td.cell.best").is_displayed()
        assert not any(button.is_displayed() for button in browser.find_elements(By.CSS_SELECTOR, "button"))
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


FRAGMENTS = [
    "precision=<img src=x onerror='window.owned=1'>",
    "precision=%3Cimg%20src=x%20onerror=window.owned=1%3E",
    "precision=%E0%A4%A",
    "fits=1e999",
    "fits=-1",
    "order=constructor&__proto__=x&constructor=y",
    "%22%5D,body",
    "'\"]<script>window.owned=1</script>",
]


@pytest.mark.parametrize("given", FRAGMENTS)
def test_a_fragment_of_a_stranger_does_nothing(show: Open, gpu: list[Result], given: str) -> None:
    browser = show(gpu, fragment=given)
    assert len(shown(browser)) == len(selection.newest(gpu))
    assert browser.execute_script("return window.owned") is None
    assert not browser.find_elements(By.CSS_SELECTOR, "img")
    choose(browser, "precision", "int4")
    assert fragment(browser).endswith("precision=int4")


def test_hostile_names_stay_text_in_filters_cards_and_packed_details(show: Open, attacked: list[Result]) -> None:
    replace = msgspec.structs.replace
    hostile = [replace(r, case=replace(r.case, precision=f"{SCRIPT} {i}")) for i in range(35) for r in attacked]
    browser = show(hostile)
    assert browser.find_elements(By.CSS_SELECTOR, ".packed")
    option = browser.find_elements(By.CSS_SELECTOR, "select[name=precision] option")[1]
    assert option.get_attribute("value") == f"{SCRIPT} 0"
    choose(browser, "precision", option.text)
    assert len(shown(browser)) == 2
    choose(browser, "order", "fastest first")
    assert SCRIPT in browser.find_element(By.CSS_SELECTOR, "#flat .name").text
    browser.find_element(By.CSS_SELECTOR, "#flat a").send_keys(Keys.ENTER)
    settled(browser)
    opened = browser.find_element(By.CSS_SELECTOR, "#flat details[open]")
    assert SCRIPT in opened.text
    assert not set(opened.text) & set("\u202e\u2067\x07\x1b")
    assert browser.execute_script("return window.owned") is None
    assert not browser.find_elements(By.CSS_SELECTOR, "img, [onerror], [onmouseover]")
