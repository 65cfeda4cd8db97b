"""A real browser for the page: headless Chromium, driven by chromedriver."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
from selenium import webdriver

from harness.cli import entry as cli
from harness.core.records import Result, encode_record
from harness.report.page import render
from harness.results import store
from tests.browser.pages import Open, case_of, hostile, lacking, logged, started
from tests.browser.planners import CAUGHT, PATIENCE_S, answered
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


@pytest.fixture(scope="session")
def runtime() -> Path:
    """Where Python for browsers lies; `.ci/planner DIR` fetches it."""
    folder = Path(os.environ.get("PLANNER_RUNTIME", "none"))
    if not (folder / "package.json").is_file():
        pytest.skip("no Pyodide: run .ci/planner DIR, which needs npm, and set PLANNER_RUNTIME=DIR")
    return folder


@pytest.fixture(scope="module")
def planner_site(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planner")
    results = [msgspec.structs.replace(result, at=result.at.replace("2026", "2024")) for result in store.read(GOLDEN)[0]]
    (folder / store.NAME).write_bytes(b"".join(encode_record(one) + b"\n" for one in results))
    assert cli.main(["publish", str(folder), "--to", str(folder / "a site"), "--planner", str(runtime)]) == 0
    return folder / "a site"


@pytest.fixture(scope="module")
def planner(planner_site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A browser whose planner has answered once: Python takes seconds to begin, and every test may ask it more."""
    driver = started(tmp_path_factory.mktemp("planner-profile"))
    driver.set_script_timeout(PATIENCE_S)
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": CAUGHT})
    driver.get((planner_site / "planner.html").as_uri())
    answered(driver)
    yield driver
    driver.quit()
