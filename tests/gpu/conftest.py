"""Tests that need a CUDA device; without one they are skipped."""

import pytest

from harness.machine import probe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if probe.probe().gpus:
        return
    for item in items:
        if item.path.is_relative_to(__file__.rsplit("/", 1)[0]):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _hub_as_given(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Take weights and kernels from the hub's cache that the shell names: HF_HOME and its kind."""
    for name, value in given.items():
        if name.startswith("HF_"):
            monkeypatch.setenv(name, value)
