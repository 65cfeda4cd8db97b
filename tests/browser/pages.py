"""What tests of the page share: a browser, where its cells are, what the browser logged, and a result that attacks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from harness.core.records import Answer, Quality, Result

SCRIPT = "<script>window.owned = 1; alert('owned')</script><img src=x onerror='window.owned = 1'>"
LONG = "x" * 10_000
WIDTHS = (360, 768, 1280, 1920)  # a telephone, a tablet, a laptop, a wide screen
Open = Callable[..., Chrome]
# Every rule of the levels A and AA, and those that are off unless named.
RULES = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    "rules": {"target-size": {"enabled": True}},
    "resultTypes": ["violations"],
}

# As root Chromium runs only without its sandbox; the rest keeps it from talking to anyone.
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


def found(*names: str) -> str:
    """Return the path of the first program that is installed; without one fail on CI and skip elsewhere."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        lacking(f"{' or '.join(names)} is not installed: apt-get install chromium chromium-driver")
    return path


def lacking(what: str) -> NoReturn:
    """Fail on CI, where everything is to be tested, and skip elsewhere."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def started(profile: Path) -> Chrome:
    """Start a browser with this profile that logs its console and its requests."""
    options = ChromeOptions()
    options.binary_location = found("chromium", "chromium-browser", "google-chrome")
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Chrome(options=options, service=Service(found("chromedriver")))


def cell(browser: Chrome, precision: str, placement: str) -> WebElement:
    """Find a cell of the first matrix that is not folded by the heads of its row and column."""
    table = browser.find_element(By.CSS_SELECTOR, ".block:not(.fine) table.matrix")
    columns = [head.text.splitlines()[0] for head in table.find_elements(By.CSS_SELECTOR, "thead th")]
    rows = [row for row in table.find_elements(By.CSS_SELECTOR, "tbody tr") if row.text.split()[0] == precision]
    return rows[0].find_elements(By.CSS_SELECTOR, "td")[columns.index(placement)]


def shown(browser: Chrome) -> list[str]:
    """List the cases whose cells can be seen: model, precision and placement of each."""
    script = """
    const links = [...document.querySelectorAll(".workload .cell > a")];
    return links.filter((link) => link.checkVisibility({ visibilityProperty: true })).map((link) => link.hash.slice(1));
    """
    found: list[str] = browser.execute_script(script)
    return found


def settled(browser: Chrome) -> None:
    """Wait until the page has done what the last click or key asked for, unpacking included."""
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 100))")


def many(results: list[Result], models: int) -> list[Result]:
    """Repeat results under other names of the model, until their page is packed."""
    case = msgspec.structs.replace
    return [case(r, case=case(r.case, model=f"{r.case.model}-{i}")) for i in range(models) for r in results]


def case_of(results: list[Result], case: str) -> Result:
    return next(result for result in reversed(results) if result.case.id == case)


def hostile(result: Result) -> Result:
    """Put scripts, marks of direction and endless lines wherever a model, a log or a user may write."""
    asked = Answer(question=SCRIPT, answer=f"\u202egnp.exe {LONG}\x07", correct=False)
    return msgspec.structs.replace(
        result,
        case=msgspec.structs.replace(result.case, model=f"{SCRIPT}\u202e"),
        machine=msgspec.structs.replace(result.machine, name=f'"><{SCRIPT}'),
        why=f"{SCRIPT} {LONG}",
        quality=Quality(probe=SCRIPT, verdict="intact", why=LONG, reference=LONG, answers=[asked]),
        checks={SCRIPT: LONG},
        noisy={"decode_tok_s": f'" onmouseover="window.owned = 1" {SCRIPT}'},
        device_map={f"{SCRIPT}.{LONG}": SCRIPT},
        loaded=None,
        code=f"</code></pre>{SCRIPT}\n{LONG}",
        command=f"{SCRIPT} {LONG}",
        environment={SCRIPT: LONG},
        log_tail=f"</pre>{SCRIPT}\n{LONG}\x1b[31m\u2067",
    )


def cut(browser: Chrome) -> list[str]:
    """List the texts of which a part is out of sight, with no way to bring it there."""
    script = """
    const hides = (style) => ["hidden", "clip"].includes(style.overflowX) || style.textOverflow === "ellipsis";
    const cut = (one) => one.scrollWidth > one.clientWidth + 1 && hides(getComputedStyle(one));
    const parts = [...document.querySelectorAll("body *")].filter((one) => one.textContent.trim() && !one.closest("svg, .sr"));
    const seen = parts.filter((one) => one.checkVisibility({ visibilityProperty: true }) && one.clientWidth);
    // What is laid out on demand paints nothing beyond its edge either.
    const edge = (one) => {
      for (let up = one.parentElement; up; up = up.parentElement) {
        const style = getComputedStyle(up);
        if (["auto", "scroll"].includes(style.overflowX)) return Infinity;
        if (style.contentVisibility === "auto") return up.getBoundingClientRect().right;
      }
      return Infinity;
    };
    const says = (one) => [...one.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    const sticksOut = (one) => says(one) && one.getBoundingClientRect().right > edge(one) + 1;
    return seen.filter((one) => cut(one) || sticksOut(one)).map((one) => one.outerHTML.slice(0, 300));
    """
    found: list[str] = browser.execute_script(script)
    return found


def overlapping(browser: Chrome) -> list[str]:
    """List the neighbors of which one is written over the other; what is placed so on purpose is left out.

    What is out of sight, which a browser lays out by a guess of its height, is laid out meanwhile.
    """
    script = """
    const guessed = [...document.querySelectorAll("body *")].filter((one) => getComputedStyle(one).contentVisibility === "auto");
    for (const one of guessed) one.style.contentVisibility = "visible";
    const placed = (one) => ["absolute", "fixed", "sticky"].includes(getComputedStyle(one).position);
    const moves = (one) => ["auto", "scroll", "hidden"].includes(getComputedStyle(one).overflowX);
    const apart = (one, top) => { while (one !== top && !placed(one) && !moves(one)) one = one.parentElement; return one !== top; };
    const shown = (one) => one.checkVisibility({ visibilityProperty: true }) && one.textContent.trim() && !placed(one);
    const boxes = (one) => {
      if (moves(one)) return [...one.getClientRects()];
      const walk = document.createTreeWalker(one, NodeFilter.SHOW_TEXT), found = [];
      while (walk.nextNode()) {
        const holder = walk.currentNode.parentElement, range = document.createRange();
        if (!walk.currentNode.data.trim() || !shown(holder) || holder.closest("svg, .sr") || apart(holder, one)) continue;
        range.selectNodeContents(walk.currentNode);
        found.push(...range.getClientRects());
      }
      return found;
    };
    const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1.5;
    const blocks = (one) => getComputedStyle(one).display !== "inline" && getComputedStyle(one).display !== "contents";
    const found = [];
    for (const parent of document.querySelectorAll("body, body *:not(svg *)")) {
      const ones = [...parent.children].filter((one) => !one.closest("svg, .sr") && shown(one) && blocks(one));
      for (let i = 1; i < ones.length; i += 1) {
        const [before, after] = [ones[i - 1], ones[i]];
        if (boxes(before).some((a) => boxes(after).some((b) => meet(a, b))))
          found.push(`${before.outerHTML.slice(0, 150)} | ${after.outerHTML.slice(0, 150)}`);
      }
    }
    for (const one of guessed) one.style.contentVisibility = "";
    return found;
    """
    found: list[str] = browser.execute_script(script)
    return found


def requested(browser: Chrome) -> list[str]:
    """Return the addresses that the page asked for since it was opened."""
    events = [json.loads(entry["message"])["message"] for entry in logged(browser, "performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def logged(browser: Chrome, name: str) -> list[dict[str, Any]]:
    """Take what a log gathered since it was last taken."""
    entries: list[dict[str, Any]] = browser.get_log(name)  # type: ignore[no-untyped-call]
    return entries


def violations(browser: Chrome, axe: str) -> list[str]:
    """Let axe-core judge the page as it stands."""
    browser.set_script_timeout(120)
    browser.execute_script(axe)
    script = f"axe.run(document, {json.dumps(RULES)}).then(arguments[0], (error) => arguments[0]({{violations: [error.message]}}))"
    found: dict[str, Any] = browser.execute_async_script(script)
    return [f"{one['id']}: {[node['html'][:200] for node in one['nodes']][:3]}" for one in found["violations"]]
