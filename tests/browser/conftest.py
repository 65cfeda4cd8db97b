"""A real browser for the page: headless Chromium, driven by chromedriver."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from harness.case import Result
from harness.report import page
from tests.browser.pages import Open, case_of, hostile, logged
from tests.builders import GOLDEN

# As root Chromium runs only without its sandbox; the rest keeps it from talking to anyone.
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


def found(*names: str) -> str:
    """Return the path of the first program that is installed; without one fail on CI and skip elsewhere."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path:
        return path
    missing = f"{' or '.join(names)} is not installed: apt-get install chromium chromium-driver"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Start a browser with an empty profile that logs its console and its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = found("chromium", "chromium-browser", "google-chrome")
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(found("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def results() -> list[Result]:
    return [msgspec.json.decode(line, type=Result) for line in GOLDEN.read_bytes().splitlines()]


@pytest.fixture
def show(browser: webdriver.Chrome, tmp_path: Path) -> Open:
    """Write results as a page and open it, `width` pixels wide, at a fragment."""

    def opened(results: list[Result], width: int = 1280, fragment: str = "") -> webdriver.Chrome:
        file = tmp_path / "page.html"
        page.write(file, page.render(results))
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for name in ("browser", "performance"):
            logged(browser, name)
        browser.get("about:blank")  # another fragment alone would not load it
        browser.get(f"{file.as_uri()}#{fragment}" if fragment else file.as_uri())
        return browser

    return opened


@pytest.fixture
def attacked(results: list[Result]) -> list[Result]:
    return [hostile(case_of(results, f"chatglm-6b/{case}")) for case in ("int4/direct", "bf16/direct", "int4/disk")]
