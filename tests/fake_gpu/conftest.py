"""The runs on fake cards: made by whoever needs them first, in this process or in another of xdist's."""

from __future__ import annotations

import os

import pytest
from filelock import FileLock

from tests.fake_gpu.runs import Runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_TESTRUNUID") else base
    found = Runs(shared / "fake_cards")
    with FileLock(shared / "fake_cards.lock"):
        if not found.folder.exists():
            found.folder.mkdir()
            found.make()
    return found
