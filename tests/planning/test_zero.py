"""DeepSpeed's estimates: the examples of its own document, and where its code differs from it."""

from __future__ import annotations

import pytest

from harness.architecture import skeleton_source
from harness.core.units import GIB
from harness.planning.training import zero
from harness.planning.training.zero import Trained

T5_3B = Trained(parameters=2851_000_000, largest_layer=32_000_000, gpus=8)  # as the document prints it: 2851M, 32M


def gib(stage: str, trained: Trained, **how: object) -> tuple[float, float]:
    """Return (RAM, GPU) in GiB of the one way that is so."""
    found = [way for way in zero.estimate_states(stage, trained) if all(getattr(way, key) == value for key, value in how.items())]
    assert len(found) == 1
    return round(found[0].cpu_bytes / GIB, 2), round(found[0].gpu_bytes / GIB, 2)


@pytest.mark.parametrize(
    ("optimizer", "parameters", "init", "expected"),
    [
        ("cpu", "cpu", True, (71.69, 0.12)),
        ("cpu", "cpu", False, (127.45, 0.12)),
        ("cpu", "gpu", True, (63.72, 0.78)),
        ("cpu", "gpu", False, (127.45, 0.78)),
        ("gpu", "gpu", True, (1.43, 6.09)),
        ("gpu", "gpu", False, (127.45, 6.09)),
    ],
)
def test_zero3_gives_the_figures_of_the_document(
    optimizer: str, parameters: str, init: bool, expected: tuple[float, float]
) -> None:
    assert gib("zero3", T5_3B, optimizer=optimizer, parameters=parameters, init=init) == expected


def test_zero2_follows_the_code_where_the_document_says_otherwise() -> None:
    assert gib("zero2", T5_3B, optimizer="cpu") == (127.45, 5.31)
    assert gib("zero2", T5_3B, optimizer="gpu") == (127.45, 11.28)  # the document: 15.93


def test_more_nodes_take_less_of_each() -> None:
    one = Trained(parameters=2851_000_000, largest_layer=32_000_000, gpus=4, nodes=1)
    two = Trained(parameters=2851_000_000, largest_layer=32_000_000, gpus=4, nodes=2)
    for first, second in zip(zero.estimate_states("zero3", one), zero.estimate_states("zero3", two), strict=True):
        assert second.gpu_bytes <= first.gpu_bytes
        assert second.cpu_bytes <= first.cpu_bytes


def test_a_layer_is_what_one_module_holds_and_tied_weights_count_once() -> None:
    found = zero.of_skeleton(skeleton_source.named("chatglm-6b"), gpus=2)
    assert found.parameters == 6_173_286_400
    assert found.largest_layer == 130_528 * 4096
    assert found.all_gpus == 2
