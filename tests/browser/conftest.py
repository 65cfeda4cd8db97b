"""A real browser for the page: headless Chromium, driven by chromedriver."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from selenium import webdriver

from harness.core.records import Result
from harness.report.page import render
from harness.results import store
from tests.browser.pages import Open, case_of, hostile, lacking, logged, started
from tests.support.builders import GOLDEN


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Start a browser with an empty profile that logs its console and its requests."""
    driver = started(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def results() -> list[Result]:
    return [store.decode(line) for line in GOLDEN.read_bytes().splitlines()]


@pytest.fixture
def show(browser: webdriver.Chrome, tmp_path: Path) -> Open:
    """Write results as a page and open it, `width` pixels wide, at a fragment."""

    def opened(results: list[Result], width: int = 1280, fragment: str = "") -> webdriver.Chrome:
        file = tmp_path / "page.html"
        render.write(file, render.render(results))
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for name in ("browser", "performance"):
            logged(browser, name)
        browser.get("about:blank")  # another fragment alone would not load it
        browser.get(f"{file.as_uri()}#{fragment}" if fragment else file.as_uri())
        browser.execute_cdp_cmd("Page.resetNavigationHistory", {})  # a full one drops entries that no hand made
        return browser

    return opened


@pytest.fixture
def attacked(results: list[Result]) -> list[Result]:
    return [hostile(case_of(results, f"chatglm-6b/{case}")) for case in ("int4/direct", "bf16/direct", "int4/disk")]


@pytest.fixture(scope="session")
def axe() -> str:
    """The axe-core that axe-playwright-python carries; nothing else of that package is used."""
    found = find_spec("axe_playwright_python")
    if not found or not found.origin:
        lacking("axe-core is not installed: pip install axe-playwright-python")
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")
