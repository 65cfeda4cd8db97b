"""The planner's page against the command line: every model that is asked for, on every card, at two lengths.

150 models x 20 cards x 2 lengths are 6,000 plans on each side, half an hour or more: `tox run -e planner`.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome

from harness.catalog.listing import known_models
from harness.machine.gpus import gpu_table
from tests.browser.planners import ASK, close, planned
from tests.support.reporting import Figure, Section, gathered

MODELS, CARDS, LENGTHS = 150, 20, ("1024", "8192")


@pytest.fixture(scope="module")
def section(request: pytest.FixtureRequest) -> Iterator[Section]:
    yield from gathered(request, "planner.md", "The planner as a page", "tox run -e planner")


def spread(names: list[str], count: int) -> list[str]:
    """Pick so many, evenly from all."""
    return [names[at * len(names) // count] for at in range(count)]


def test_every_answer_is_that_of_the_command_line(planner: Chrome, capsys: pytest.CaptureFixture[str], section: Section) -> None:
    models = spread([model.name for model in known_models()], MODELS)
    cards = spread(sorted({card.short_name for card in gpu_table()}), CARDS)
    differing, in_page_s, here_s = [], [], []
    for number, (model, card, length) in enumerate(itertools.product(models, cards, LENGTHS)):
        words = [model, "--gpu", card, "--ram", ("16GiB", "32GiB", "64GiB")[number % 3], "--context", length]
        began = time.monotonic()
        _, out, _ = planner.execute_async_script(ASK, ["plan", *words, "--json"])
        told = time.monotonic()
        if not close(json.loads(out), planned(capsys, *words)):
            differing.append(words)
        in_page_s.append(told - began)
        here_s.append(time.monotonic() - told)
    took_s, ratio = statistics.median(in_page_s), statistics.median(map(float.__truediv__, in_page_s, here_s))
    rows = len(in_page_s)
    figures = section.figures
    figures += [
        Figure(what="answers that differ from the command line's", rows=rows, found=str(len(differing)), wanted="0"),
        Figure(what="an answer in the page, whole JSON: median", rows=rows, found=f"{took_s * 1e3:.0f} ms", wanted="100 ms"),
        Figure(what="the same against Python on the machine: median", rows=rows, found=f"x {ratio:.1f}", wanted=""),
    ]
    assert differing == []
