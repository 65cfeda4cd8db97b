"""The door to NVML: lent and given back whatever happens, and silent where it is refused. Cards: test_machine.py."""

from __future__ import annotations

import sys

import pytest

from harness.machine import nvml
from tests.machine.test_probe import Nvml, NVMLError


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    library = Nvml({})
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return library


def test_it_is_open_while_it_is_lent(library: Nvml) -> None:
    with nvml.lent() as lent:
        assert lent is library
        assert library.open == 1
    assert library.open == 0


def test_it_is_given_back_after_an_error(library: Nvml) -> None:
    with pytest.raises(ZeroDivisionError), nvml.lent():
        _ = 1 / 0
    assert library.open == 0


def test_it_may_be_lent_twice_at_once(library: Nvml) -> None:
    with nvml.lent(), nvml.lent():
        assert library.open == 2
    assert library.open == 0


def test_a_driver_that_leaves_early_is_no_error(library: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setattr(library, "nvmlShutdown", gone)
    with nvml.lent() as lent:
        assert lent is library


def test_what_a_card_refuses_is_unknown_and_what_it_says_is_passed_on() -> None:
    library = Nvml()
    assert nvml.ask(library, "nvmlDeviceGetName", {"nvmlDeviceGetName": "A100"}) == "A100"
    assert nvml.ask(library, "nvmlDeviceGetName", {}) is None
    assert nvml.ask(None, "nvmlDeviceGetName", {}) is None


def test_a_call_that_does_not_exist_is_a_mistake_of_ours() -> None:
    with pytest.raises(AttributeError):
        nvml.ask(Nvml(), "nvmlGetNothing")


def test_without_a_library_no_card_is_visible() -> None:
    assert nvml.visible_gpus(None) == []


def test_the_real_library_opens_or_is_absent() -> None:
    with nvml.lent() as lent:
        assert lent is None or nvml.ask(lent, "nvmlDeviceGetCount") is not None
