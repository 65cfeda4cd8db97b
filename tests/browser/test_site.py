"""The site in a real browser, from disk: from the index to a model, a machine and a raw result; the filter; narrow and dark."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from harness.cli import entry as cli
from harness.core.records import Result, encode_record
from harness.report.site import pages
from harness.results import store
from tests.browser.pages import SCRIPT, logged, requested
from tests.support.builders import GOLDEN

pytestmark = pytest.mark.browser

Open = Callable[..., Chrome]
replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return [replace(result, at=result.at.replace("2026", "2024")) for result in store.read(GOLDEN)[0]]


@pytest.fixture(scope="module")
def site(results: list[Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a site of real results, and of one whose names are scripts."""
    folder = tmp_path_factory.mktemp("site")
    result = next(one for one in reversed(results) if one.case.id == "chatglm-6b/int4/direct")
    case = replace(result.case, model=f"{SCRIPT}\u202e")
    attack = replace(result, case=case, id=case.id, machine=replace(result.machine, name=f'"><{SCRIPT}', cpu=SCRIPT))
    later = replace(result, run="later", at="2024-12-01T00:00:00Z", environment=result.environment | {"torch": "2.12.0"})
    (folder / store.NAME).write_bytes(b"".join(encode_record(one) + b"\n" for one in [*results, later, attack]))
    assert cli.main(["publish", str(folder), "--to", str(folder / "a path/site")]) == 0
    return folder / "a path/site"


@pytest.fixture
def show(browser: Chrome, site: Path) -> Open:
    """Open a page of the site, `width` pixels wide."""

    def opened(page: str = "index.html", width: int = 1280) -> Chrome:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for name in ("browser", "performance"):
            logged(browser, name)
        browser.get((site / page).as_uri())
        return browser

    return opened


def test_the_way_from_the_index_to_a_raw_result(show: Open, results: list[Result]) -> None:
    browser = show()
    browser.find_element(By.LINK_TEXT, "chatglm-6b").click()
    assert "A card with 12 GiB works" in browser.find_element(By.CSS_SELECTOR, ".answer").text
    browser.find_element(By.CSS_SELECTOR, "#where").find_element(By.XPATH, "..").find_element(By.CSS_SELECTOR, "tbody th a").click()
    assert browser.find_elements(By.CSS_SELECTOR, "table.matrix")
    row = next(row for row in browser.find_elements(By.CSS_SELECTOR, "#raw ~ .scroll tbody tr") if "int8, direct" in row.text)
    raw = row.find_element(By.CSS_SELECTOR, "a.raw")
    number = int(raw.text.removeprefix("line "))
    raw.click()
    told = json.loads(browser.find_element(By.TAG_NAME, "body").text.splitlines()[number - 1])
    result = next(one for one in reversed(results) if one.case.id == "chatglm-6b/int8/direct")
    assert told["metrics"] == result.metrics
    browser.back()
    browser.find_element(By.LINK_TEXT, "All models and machines").click()
    assert browser.find_element(By.TAG_NAME, "h1").text == "What fits where"


def fitting(browser: Chrome) -> list[tuple[str, str, float]]:
    """Return the ways that the front door shows: model, kind and bytes of memory."""
    rows = [row for row in browser.find_elements(By.CSS_SELECTOR, "table.ways tbody tr") if row.is_displayed()]
    return [
        (str(row.get_attribute("data-of")), str(row.get_attribute("data-kind")), float(str(row.get_attribute("data-need"))))
        for row in rows
    ]


@pytest.mark.parametrize("width", [360, 1280])
def test_the_front_door_leaves_the_best_way_of_each_model_that_fits_a_card(show: Open, width: int) -> None:
    browser = show(width=width)
    assert browser.find_element(By.TAG_NAME, "h2").text == "What runs on my card"
    everything = fitting(browser)
    assert len({model for model, _, _ in everything}) == len(everything) > 1
    browser.find_element(By.ID, "vram").send_keys("4")
    browser.find_element(By.ID, "ram").send_keys("1")
    assert len(fitting(browser)) < len(everything)
    assert all(need < (4 if kind == "VRAM" else 1) * 2**30 for _, kind, need in fitting(browser))
    browser.find_element(By.CSS_SELECTOR, "#card option[value]:last-child").click()
    assert float(str(browser.find_element(By.ID, "vram").get_attribute("value"))) > 100
    assert {kind for _, kind, _ in fitting(browser)} == {"VRAM", "RAM"}
    told = browser.find_element(By.CSS_SELECTOR, "#door output").text
    assert told.startswith(f"{len(fitting(browser))} of ")
    figure = browser.find_element(By.CSS_SELECTOR, "table.ways tr:not([hidden]) a.fig")
    x, right = figure.rect["x"], figure.rect["x"] + figure.rect["width"]
    assert 0 <= x < right <= width, "its memory can be read without scrolling"
    figure.click()
    assert "/machines/" in browser.current_url
    assert browser.find_element(By.CSS_SELECTOR, "tr:target a[aria-label^='raw result of']").is_displayed()


def test_language_and_theme_are_chosen_once_for_all_pages(show: Open) -> None:
    browser = show()
    browser.find_element(By.CSS_SELECTOR, "[data-lang=zh]").click()
    browser.find_element(By.ID, "theme").click()
    assert browser.find_element(By.TAG_NAME, "h1").text == "什么模型装得进什么机器"
    try:
        browser.find_element(By.LINK_TEXT, "chatglm-6b").click()
        assert browser.find_element(By.ID, "answer").text == "我需要哪张显卡？"
        assert browser.execute_script("return document.documentElement.dataset.theme") == "light"
        assert browser.find_element(By.ID, "theme").text == "☀ 浅色"
        browser.find_element(By.CSS_SELECTOR, "#where ~ .scroll tbody th a").click()
        assert browser.execute_script("return document.documentElement.lang") == "zh-Hans"
    finally:
        browser.execute_script("localStorage.clear()")


def test_a_link_keeps_the_language(show: Open) -> None:
    address = show().current_url.partition("#")[0]
    for fragment, language in (("lang=zh", "zh-Hans"), ("where&lang=zh", "zh-Hans"), ("lang=en", "en"), ("lang=zhx", "en")):
        browser = show()
        browser.get("about:blank")
        browser.get(f"{address}#{fragment}")
        assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == language, fragment


def test_the_filter_leaves_what_has_all_words(show: Open) -> None:
    browser = show()

    def shown() -> list[str]:
        return [row.text for row in browser.find_elements(By.CSS_SELECTOR, "table.list tbody tr") if row.is_displayed()]

    everything = shown()
    field = browser.find_element(By.ID, "filter")
    field.send_keys("rtx 31.3")
    assert 0 < len(shown()) < len(everything)
    assert all("RTX 3060" in row for row in shown())
    assert browser.find_element(By.CSS_SELECTOR, "output[for=filter]").text == f"{len(shown())} of {len(everything)} rows"
    field.send_keys(" no such thing")
    assert shown() == []
    field.clear()
    field.send_keys(" ")
    assert shown() == everything


def test_without_scripts_everything_is_there_but_the_filter(show: Open, browser: Chrome) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show()
        assert not browser.find_element(By.ID, "filter").is_displayed()
        browser.find_element(By.LINK_TEXT, "chatglm-6b").click()
        assert "12 GiB" in browser.find_element(By.TAG_NAME, "main").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


OVERLAPPING = """
return [...document.querySelectorAll('table.ways tbody tr:not([hidden])')].flatMap((row) => {
  const texts = [...row.children].map((cell) => {
    const range = document.createRange();
    range.selectNodeContents(cell);
    return [...range.getClientRects()].filter((box) => box.width);
  });
  const meets = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 6 && b.top < a.bottom - 6;
  const outside = innerWidth <= 560 && texts.flat().some((box) => box.right > innerWidth);  // a wider table scrolls
  const over = texts.some((mine, i) => texts.slice(i + 1).some((other) => mine.some((a) => other.some((b) => meets(a, b)))));
  return over || outside ? [row.textContent] : [];
});
"""


@pytest.mark.parametrize("width", [320, 360, 560, 561, 1280])
def test_on_the_front_door_no_text_lies_over_another(show: Open, width: int) -> None:
    """Long names of precisions, and figures with a mark beside them, are as much as a telephone has room for."""
    browser = show(width=width)
    browser.execute_script(
        "for (const way of document.querySelectorAll('table.ways .way')) way.textContent = 'torchao-int8-dynamic, balanced_low_0';"
        "for (const row of document.querySelectorAll('table.ways tbody tr')) row.children[3].prepend('noisy, slower than it was ');"
    )
    assert browser.execute_script(OVERLAPPING) == []


def test_no_page_scrolls_sideways_asks_for_anything_or_runs_a_name(show: Open, site: Path) -> None:
    for file in sorted(site.rglob("*.html")):
        page = str(file.relative_to(site))
        browser = show(page, width=360)
        browser.execute_script("document.querySelectorAll('details').forEach((part) => (part.open = true))")
        scrolled, visible = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert scrolled <= visible, page
        assert browser.execute_script("return window.owned") is None
        assert [entry for entry in logged(browser, "browser") if entry["level"] == "SEVERE"] == []
        assert [url for url in requested(browser) if url != "data:,"] == [file.as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(show: Open, browser: Chrome, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 to 1, of every text that stands on a page of the site."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        for page in ("index.html", "models/chatglm-6b.html", "provenance.html"):
            show(page)
            assert browser.execute_script(CONTRAST) == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const pixel = (...colors) => {
  canvas.clearRect(0, 0, 1, 1);
  for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (color) => color.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const grounds = (node) => (node ? [...grounds(node.parentElement), getComputedStyle(node).backgroundColor] : []);
const wrong = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('script, svg, .sr')) continue;
  const ground = grounds(node);
  const [one, other] = [light(pixel(...ground, getComputedStyle(node).color)), light(pixel(...ground))].sort((a, b) => b - a);
  const ratio = (one + 0.05) / (other + 0.05);
  if (ratio < 4.5) wrong.push([ratio, walker.currentNode.data]);
}
return wrong;
"""


def test_what_has_no_line_on_the_front_page_is_found_by_its_name(
    browser: Chrome, results: list[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a list of two lines a page the third machine stands on the next, and the search leads to its own."""
    monkeypatch.setattr(pages, "MOST_LISTED", dict.fromkeys(pages.MOST_LISTED, 2))
    monkeypatch.setattr(pages, "MOST_WAYS", 1)
    one = next(one for one in reversed(results) if one.case.id == "chatglm-6b/int4/direct")
    named = [replace(one, machine=replace(one.machine, name=name)) for name in ("Anna's", "Berta's", f"Emil's {SCRIPT}")]
    (tmp_path / store.NAME).write_bytes(b"".join(encode_record(found) + b"\n" for found in [*results, *named]))
    assert cli.main(["publish", str(tmp_path / store.NAME), "--to", str(tmp_path / "site")]) == 0
    browser.get((tmp_path / "site/index.html").as_uri())
    listed = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#machines ~ .scroll tbody th")]
    assert (len(listed), listed[1]) == (2, "Anna's")
    browser.find_element(By.ID, "filter").send_keys("emil's")
    link = WebDriverWait(browser, 5).until(lambda _: browser.find_element(By.CSS_SELECTOR, "#elsewhere a"))
    assert link.text.startswith("Emil's <script>")
    link.click()
    assert browser.find_element(By.TAG_NAME, "h1").text.startswith("Emil's <script>")
    browser.back()
    written = (tmp_path / "site/index.html").read_text(encoding="utf-8").count("<tr data-of=")
    rows = WebDriverWait(browser, 5).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "table.ways tbody tr")[1:])
    assert (written, len(rows) > 3) == (1, True)
    browser.find_element(By.CSS_SELECTOR, ".ways-on a").click()
    assert browser.find_element(By.CSS_SELECTOR, ".ways-on b").text
    assert not logged(browser, "browser")
