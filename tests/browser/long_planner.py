"""Every model that is asked for, on every card, at two lengths: the planner's page answers what the command line answers.

150 models x 20 cards x 2 lengths are 6,000 plans on each side, half an hour or more: `tox run -e planner`.
"""

from __future__ import annotations

import itertools
import json

import pytest
from selenium.webdriver import Chrome

from harness.catalog.listing import known_models
from harness.machine.gpus import gpu_table
from tests.browser.planners import ASK, close, planned

MODELS, CARDS, LENGTHS = 150, 20, ("1024", "8192")


def spread(names: list[str], count: int) -> list[str]:
    """Pick so many, evenly from all."""
    return [names[at * len(names) // count] for at in range(count)]


def test_every_answer_is_that_of_the_command_line(planner: Chrome, capsys: pytest.CaptureFixture[str]) -> None:
    models = spread([model.name for model in known_models()], MODELS)
    cards = spread(sorted({card.short_name for card in gpu_table()}), CARDS)
    differing = []
    for number, (model, card, length) in enumerate(itertools.product(models, cards, LENGTHS)):
        words = [model, "--gpu", card, "--ram", ("16GiB", "32GiB", "64GiB")[number % 3], "--context", length]
        _, out, _ = planner.execute_async_script(ASK, ["plan", *words, "--json"])
        if not close(json.loads(out), planned(capsys, *words)):
            differing.append(words)
    assert differing == []
