"""The first contact with a card: what is cheap and tells most comes first, ten minutes at most, and a report at the end.

Without a card all of it is skipped. What it measured lies in the directory FIRST_CONTACT (default `first-contact`), in
`results.jsonl` and `report.md`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from harness.machine import accelerators, probe
from tests.gpu import report
from tests.gpu.contact import OPTIONS, Contact

# Later modules need what earlier ones show: that torch sees the card, that a case runs, that its figures are right.
ORDER = ("contact", "placements", "estimates", "quantized", "limits", "overhead", "recovery", "tp", "gguf")
BUDGET_S = 600.0
_BEGUN = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    others = [item for item in items if item not in here]
    items[:] = [*others, *sorted(here, key=lambda item: ORDER.index(item.path.stem.removeprefix("test_")))]
    if not probe.probe().gpus:
        for item in here:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and NVML knows none here"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - _BEGUN > BUDGET_S and item.path.is_relative_to(Path(__file__).parent):
        pytest.skip(f"the {BUDGET_S / 60:.0f} minutes are over: run it alone by its name")


@pytest.fixture(scope="session")
def contact(request: pytest.FixtureRequest) -> Contact:
    """All cases of this contact, measured into one directory; skips what needs a card that torch cannot use."""
    machine = accelerators.usable(probe.probe())
    if machine.gpu_problem:
        pytest.skip(machine.gpu_problem)
    options = os.environ.get("FIRST_CONTACT_OPTIONS", "").split() or OPTIONS
    made = Contact(_place(), machine, os.environ.get("FIRST_CONTACT_MODEL"), options)
    given = [
        item.callspec.params for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    ]
    made.wanted = {(str(one["precision"]), str(one["placement"])) for one in given if {"precision", "placement"} <= one.keys()}
    return made


def _place() -> Path:
    return Path(os.environ.get("FIRST_CONTACT", "first-contact")).absolute()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    text = report.write(_place(), time.monotonic() - _BEGUN)
    if text:
        terminalreporter.section("first contact")
        terminalreporter.write(text)


@pytest.fixture(autouse=True)
def _hub_as_given(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take weights and kernels from the hub's cache that the shell names: HF_HOME and its kind."""
    for name, value in given.items():
        if name.startswith("HF_"):
            monkeypatch.setenv(name, value)
