"""Text models are traced with weights that need no gradient, and loaded with weights that do: the same bytes in the same order.

For a weight that needs one torch.matmul takes another kernel, under no_grad as well (`should_fold` in ATen): it folds the sequences
into rows, and copies them first where they are not contiguous. The towers of vision models copy so, which their trace follows.
"""

from __future__ import annotations

from typing import Any

import pytest

import harness.models  # noqa: F401 registers our own architectures
from harness.architecture.card_kernels import WITH_FLASH, kernels_of
from harness.worker.trace import fake_model, kernels, workload
from harness.worker.trace.ledger import fake_card

SMALL: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 512}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "intermediate_size": 704, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 256, "n_head": 8, "n_layer": 2, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2},
    "bloom": {"hidden_size": 256, "n_head": 8, "n_layer": 2, "vocab_size": 512},
    "mpt": {"d_model": 256, "n_heads": 8, "n_layers": 2, "vocab_size": 512},
    "falcon": {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
    "olmoe": {**SMALL, "intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2},
    "codegen": {"n_embd": 256, "n_head": 8, "n_layer": 2, "rotary_dim": 16, "vocab_size": 512},
}
SIZE = (3, 65, 3)  # batch, prompt, new tokens


def traced(config: dict[str, Any], *, needs_grad: bool) -> workload.Trace:
    card, model = kernels_of(WITH_FLASH), fake_model.build_fake(config, "bf16")
    with fake_card({}, card.capability) as ledger, kernels.chosen_as_on(card, ledger, whole=False):
        fake_model.place_on_card(model)
        model.requires_grad_(needs_grad)
        workload.run(ledger, model, fake_model.layers_of(model), 1, 3, 2)  # what is made once is there
        return workload.run(ledger, model, fake_model.layers_of(model), *SIZE)


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_that_need_a_gradient_take_no_other_bytes(kind: str) -> None:
    config = {"model_type": kind, **CONFIGS[kind]}
    without, within = (traced(config, needs_grad=needs_grad) for needs_grad in (False, True))
    assert [one.operator for one in without.allocations] != [one.operator for one in within.allocations]
    assert [one.nbytes for one in without.allocations] == [one.nbytes for one in within.allocations]
    assert without.events == within.events
    assert without.peak_bytes == within.peak_bytes > 0
