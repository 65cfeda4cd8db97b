"""A site and a report in both languages, from a telephone to a wide screen, light and dark: nothing is cut, scrolls or overlaps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from selenium.webdriver import Chrome

from harness.cli import entry
from harness.core.records import Result, encode_record
from harness.report.page import render
from harness.results import store
from tests.browser.pages import WIDTHS, cut, overlapping, settled, violations
from tests.browser.test_language import in_english
from tests.support.builders import GOLDEN
from tests.support.reporting import REPORTS

pytestmark = pytest.mark.browser

SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return [replace(result, at=result.at.replace("2026", "2024")) for result in store.read(GOLDEN)[0]]


@pytest.fixture(scope="module")
def alone() -> list[Result]:
    """Those of a single model."""
    return store.read(REPORTS / "smollm2-135m" / store.NAME)[0]


@pytest.fixture(scope="module")
def pages(results: list[Result], alone: list[Result], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A report of many models, one of a single model, and of each kind of a site's pages one."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / store.NAME).write_bytes(b"".join(encode_record(result) + b"\n" for result in results))
    assert entry.main(["publish", str(folder), "--to", str(folder / "site")]) == 0
    (folder / "report.html").write_text(render.render(results), encoding="utf-8")
    (folder / "alone.html").write_text(render.render(alone), encoding="utf-8")
    of_kinds = [sorted((folder / "site" / kind).glob("*.html"))[0] for kind in ("models", "cards", "machines")]
    return [folder / "report.html", folder / "alone.html", folder / "site/index.html", folder / "site/provenance.html", *of_kinds]


@pytest.fixture(autouse=True)
def _as_it_was(browser: Chrome) -> Iterator[None]:
    yield
    browser.execute_script("localStorage.removeItem('fitmatrix-language')")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def show(browser: Chrome, page: Path, width: int, scheme: str, language: str) -> None:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    browser.get(f"{page.as_uri()}#lang={language}")
    settled(browser)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_is_whole_at_every_width(
    browser: Chrome, pages: list[Path], results: list[Result], alone: list[Result], width: int, scheme: str, language: str
) -> None:
    wrong: dict[str, Any] = {}
    for page in pages:
        show(browser, page, width, scheme, language)
        assert browser.execute_script("return document.documentElement.lang").startswith(language), page.name
        scrolled = browser.execute_script("const all = document.documentElement; return all.scrollWidth - all.clientWidth")
        found = [*([f"scrolls by {scrolled}"] if scrolled > 0 else []), *cut(browser), *overlapping(browser)]
        found += in_english(browser, [*results, *alone]) if language == "zh" else []
        if found:
            wrong[page.name] = found
    assert not wrong


@pytest.mark.parametrize(("width", "scheme"), list(zip(WIDTHS, [*SCHEMES, *SCHEMES], strict=True)))
def test_axe_core_finds_nothing_in_chinese(browser: Chrome, pages: list[Path], axe: str, width: int, scheme: str) -> None:
    for page in pages:
        show(browser, page, width, scheme, "zh")
        assert violations(browser, axe) == [], page.name
