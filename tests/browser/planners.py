"""What the tests of the planner's page share: its worker, its answers, and the plans to compare them with."""

from __future__ import annotations

import json
import tempfile
from typing import Any

import pytest
from huggingface_hub import constants
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from harness.cli import entry as cli

# The worker of the page, so that a test can ask it for a whole answer.
CAUGHT = """
const Plain = Worker;
window.Worker = class extends Plain { constructor(...given) { super(...given); window.worker = this; } };
"""
ASK = """
const [words, done] = arguments;
const heard = ({ data }) => {
  if (data.number !== "test") return;
  worker.removeEventListener("message", heard);
  done([data.status ?? data.failed, data.out, data.err]);
};
worker.addEventListener("message", heard);
worker.postMessage({ number: "test", words });
"""
PATIENCE_S = 120  # Python begins in seconds, and in a minute where a machine is busy


def answered(driver: Chrome) -> str:
    """Wait until an answer is there; return what the page says of it."""
    told = "return document.getElementById('said').textContent"
    WebDriverWait(driver, PATIENCE_S).until(lambda d: any(word in d.execute_script(told) for word in ("Answered", "用时")))
    return driver.find_element(By.ID, "answer").text


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Plan as the page does: with nothing in a cache, where a model that was made or downloaded would be planned from its files."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as here, tempfile.TemporaryDirectory() as empty:
        here.setenv("FITMATRIX_CACHE", empty)
        here.setattr(constants, "HF_HUB_CACHE", empty)
        assert cli.main(["plan", *words, "--json"]) in (0, 1)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def close(one: object, other: object) -> bool:
    """Compare JSON; numbers but for their last digits, as Python adds up more exactly from version to version."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float) and isinstance(other, float | int):
        return one == pytest.approx(other, rel=1e-12)
    return one == other
