"""The first contact: torch and NVML speak of the same cards in the same order, and a forked worker can use them.

Not run on a card yet.
"""

from __future__ import annotations

import pytest

from harness.machine import accelerators, nvml, probe

pytestmark = pytest.mark.gpu


def test_torch_and_nvml_agree_on_the_cards() -> None:
    machine, seen = probe.probe(), accelerators.ask_torch()
    assert accelerators.problem(machine, accelerators.torch_build(), seen) is None
    with nvml.lent() as library:
        uuids = [str(nvml.ask(library, "nvmlDeviceGetUUID", card)).removeprefix("GPU-") for card in nvml.visible_gpus(library)]
    assert [card.uuid for card in seen.cards] == uuids


def test_both_see_the_same_memory_and_capability() -> None:
    """What the driver keeps from programs is less than a tenth."""
    for gpu, card in zip(probe.probe().gpus, accelerators.ask_torch().cards, strict=True):
        assert gpu.total_bytes == pytest.approx(card.total_bytes, rel=0.1)
        assert card.architecture == f"sm_{(gpu.compute_capability or '').replace('.', '')}"
