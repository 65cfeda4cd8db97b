"""What torch's allocator takes beyond what is allocated: found from a few layers, told in a record."""

from __future__ import annotations

from typing import Any

import harness.models  # noqa: F401 registers our own architectures
from harness.architecture.card_kernels import kernels_of
from harness.worker.trace import fake_model, kernels, reserve, workload
from harness.worker.trace.ledger import fake_card
from harness.worker.trace.reserve import ReplayedWorkload, Weights
from harness.worker.trace.whole import Events, stand_ins

CARD = kernels_of("8.0")
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 6,
    "vocab_size": 512,
}


def test_weights_come_before_the_run_and_stay() -> None:
    assert Weights([10, 20]).before(Events([30, 40], [0, 1, ~0])) == Events([10, 20, 30, 40], [0, 1, 2, 3, ~2])


def replayed(size: tuple[int, int, int], *, some: bool) -> ReplayedWorkload:
    """Replay a workload of CONFIG from some of its layers or from all."""
    model = fake_model.build_fake(CONFIG, "bf16")
    with fake_card({}, CARD.capability) as ledger, kernels.chosen_as_on(CARD, ledger, whole=False):
        fake_model.place_on_card(model)
        weights, layers = Weights.on(ledger), fake_model.layers_of(model)
        assert layers is not None
        traced = fake_model.representatives(layers.kinds) if some else range(len(layers.kinds))
        kept = fake_model.keep(model, layers, traced)
        stands = stand_ins(layers.kinds, traced)
        workload.run(ledger, model, kept, 1, 3, 2)  # what is made once is there
        return reserve.replay_workload(ledger, model, kept, stands, weights, size)


def test_a_few_layers_reserve_what_all_would() -> None:
    replayed((1, 41, 2), some=True)  # the first model of a process leaves two small constants of torch alive
    found = replayed((4, 1000, 3), some=True)
    assert found == replayed((4, 1000, 3), some=False)
    assert found.held > 4000 * 6 * 2 * 1024 * 2  # tokens, layers, keys and values of 1024, 2 bytes each: the cache alone
    assert found.weights + found.held <= found.usual.least <= found.usual.reserved
    assert found.weights + found.held <= found.expandable.least < found.usual.least


def test_a_record_tells_the_middle_and_the_ends_of_its_sizes() -> None:
    found = reserve.reserved_of(CONFIG, "bf16")
    assert found is not None
    for gaps in (found.usual, found.expandable):
        assert all(0 <= low <= best <= high for low, best, high in (gaps.least, gaps.kept))
        assert all(least <= kept for least, kept in zip(gaps.least, gaps.kept, strict=True))
    assert found.expandable.least[1] < found.usual.least[1]
