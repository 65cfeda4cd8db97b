"""Tracing on a card that is not there: what it counts, and that records say for any size what a trace of that size says."""

from __future__ import annotations

import ctypes
import gc
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import harness.models  # noqa: F401 registers our own architectures
from harness.architecture.card_kernels import kernels_of
from harness.architecture.traced_memory import TracedMemory, evaluate
from harness.architecture.traces import shipped_trace
from harness.catalog.shipped import catalog
from harness.core.records import Workload
from harness.worker.trace import fake_model, kernels, ledger
from harness.worker.trace.direct import trace
from harness.worker.trace.record import record

SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512}
SMALL |= {"num_hidden_layers": 3, "head_dim": 32, "max_position_embeddings": 4096}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "mistral with a window": {"model_type": "mistral", **SMALL, "sliding_window": 96},
    "gemma 3, alternating": {"model_type": "gemma3_text", **SMALL, "sliding_window": 128, "sliding_window_pattern": 3},
    "qwen 3, experts": {
        "model_type": "qwen3_moe",
        **SMALL,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "mlp_only_layers": [0],
    },
    "codegen, eager": {
        "model_type": "codegen",
        "n_embd": 256,
        "n_layer": 4,
        "n_head": 8,
        "rotary_dim": 16,
        "vocab_size": 512,
        "n_positions": 2048,
    },
    "chatglm, ours": {
        "model_type": "chatglm",
        "hidden_size": 256,
        "inner_hidden_size": 1024,
        "num_attention_heads": 8,
        "num_layers": 4,
        "vocab_size": 512,
        "bos_token_id": 500,
        "eos_token_id": 501,
        "mask_token_id": 502,
        "gmask_token_id": 503,
        "pad_token_id": 3,
        "max_sequence_length": 2048,
    },
    "qwen 3 next, a loop over chunks": {
        "model_type": "qwen3_next",
        **SMALL,
        "num_hidden_layers": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 96,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "bamba, padded to chunks": {
        "model_type": "bamba",
        **SMALL,
        "attn_layer_indices": [1],
        "mamba_n_heads": 16,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
        "mamba_chunk_size": 64,
    },
}
# Away from the points that records are fitted at, on both sides of the windows, with keys that are a multiple of 16 and not.
LOADS = (
    Workload(prompt_tokens=64, new_tokens=2, batch=1),
    Workload(prompt_tokens=333, new_tokens=5, batch=3),
    Workload(prompt_tokens=512, new_tokens=3, batch=8),
)


# The other models, precisions and cards are in tests/oracle/oracle_records.py: each takes half a minute.
@pytest.mark.parametrize(
    ("model", "precision", "capability"),
    [
        ("llama", "int4", "8.0"),
        ("qwen 3, experts", "bf16", "8.0"),
        ("llama", "fp16", "7.5"),  # grouped heads without flash attention: written out
    ],
)
def test_a_record_gives_what_a_trace_of_all_layers_gives(model: str, precision: str, capability: str) -> None:
    agrees(MODELS[model], precision, capability)


@pytest.fixture
def mistral() -> TracedMemory:
    """Mistral 7B, with its window of 4,096 tokens, as it is shipped."""
    shipped = shipped_trace(catalog()["mistralai/Mistral-7B-v0.1"].config, "bf16")
    assert shipped is not None
    return shipped


def test_a_record_says_nothing_of_cards_that_it_does_not_hold_for(mistral: TracedMemory) -> None:
    made = mistral
    assert evaluate(made, 1, 64, 2, "8.9") is not None
    assert evaluate(made, 1, 64, 2, "7.5") is None


def agrees(config: dict[str, Any], precision: str, capability: str) -> None:
    made = record(config, precision, capability=capability)
    for load, traced in zip(LOADS, trace(config, precision, LOADS, capability=capability), strict=True):
        given = evaluate(made, load.batch, load.prompt_tokens, load.new_tokens, capability)
        assert given is not None
        assert traced.guesses == 0
        assert given.weights_bytes == traced.weights_bytes
        assert given.kv_bytes == pytest.approx(traced.kv_bytes, rel=0.005)
        assert given.allocated_bytes - traced.weights_bytes == pytest.approx(
            traced.peak_bytes - traced.weights_bytes, rel=0.005, abs=1 << 16
        )


def test_weights_and_cache_are_what_the_shapes_say() -> None:
    config = MODELS["llama"]
    (traced,) = trace(config, "bf16", [Workload(prompt_tokens=100, new_tokens=3, batch=2)])
    layer = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704 + 2 * 256
    frequencies = 2 * 4 * 16
    assert traced.weights_bytes == pytest.approx(2 * (3 * layer + 2 * 512 * 256 + 256) + frequencies, abs=4096)
    assert traced.kv_bytes == 3 * 2 * 4 * 32 * 102 * 2 * 2


def test_a_cache_with_a_window_keeps_the_whole_prompt_until_the_next_token() -> None:
    config = MODELS["mistral with a window"]
    prompt, step = trace(config, "bf16", [Workload(prompt_tokens=1000, new_tokens=new, batch=1) for new in (1, 2)])
    per_token = 3 * 2 * 4 * 32 * 2
    assert (prompt.kv_bytes, step.kv_bytes) == (1000 * per_token, 96 * per_token)


def test_the_largest_tensors_have_the_names_of_the_model(mistral: TracedMemory) -> None:
    given = evaluate(mistral, 1, 32000, 4)
    assert given is not None
    largest, nbytes = max(given.worst.tensors, key=lambda tensor: tensor[1])
    assert largest == "where bfloat16[B, 1, S, S] of model.layers.31.self_attn"
    assert nbytes == 2 * 32000**2


def test_the_ledger_counts_what_lives_and_no_view_twice() -> None:
    with ledger.fake_card({}, (8, 0)) as counted:
        kept = torch.zeros(1000, 10, device="cuda")
        view = kept[:10].t()
        held = counted.live[ledger.CARD]
        copy = view.contiguous()
        top = counted.live[ledger.CARD]
        del copy, kept
        gc.collect()
        assert counted.live[ledger.CARD] == held == 40448  # the view keeps it; rounded to 512
        del view
        assert counted.live[ledger.CARD] == 0
    assert counted.peak[ledger.CARD] == top == 40448 + 512


def test_values_that_are_known_choose_as_those_of_real_tensors_do() -> None:
    """Copies with deepcopy, masks in an index and the best of a few: models shape tensors by them."""
    with ledger.fake_card({}, (8, 0)) as counted:
        given, mask = torch.empty(6, 4, device="cuda"), torch.tensor([True, False, True, False, False, True]).to("cuda")
        held = counted.live[ledger.CARD]
        copy: Any = deepcopy({"a": given, "b": [given]})
        assert counted.live[ledger.CARD] - held == ledger.GRAIN
        assert copy["a"] is copy["b"][0]
        assert given[mask].shape == (3, 4)
        assert given[:, :1].topk(1, dim=1).indices.flatten().tolist() == [0] * 6  # of one there is no other
        assert given.argmax(dim=-1).tolist() == [ledger.TOKEN] * 6
    assert not counted.guesses


def test_the_ledger_counts_real_tensors_of_the_processor_alike() -> None:
    cpu = torch.device("cpu")
    with torch.no_grad(), ledger.Ledger() as counted:
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        inputs = torch.ones(128, 64)
        counted.reset()
        held = counted.live[cpu]
        out = model(inputs)
        assert counted.live[cpu] - held == out.nbytes
    hidden = 128 * 256 * 4
    assert counted.peak[cpu] - held == 2 * hidden  # the first product and its ReLU


@pytest.mark.parametrize(
    ("capability", "dtype", "masked", "kernel"),
    [
        ("8.0", torch.bfloat16, False, "flash"),
        ("8.0", torch.bfloat16, True, "efficient"),
        ("8.0", torch.float32, False, "efficient"),
        ("8.9", torch.float16, False, "flash"),
        ("9.0", torch.bfloat16, True, "cudnn"),
        ("10.0", torch.bfloat16, False, "cudnn"),
        ("12.0", torch.bfloat16, True, "efficient"),
        ("12.0", torch.bfloat16, False, "flash"),
        ("7.5", torch.float16, False, "efficient"),
        ("7.0", torch.float16, True, "efficient"),
        ("7.5", torch.bfloat16, False, "math"),
        ("6.1", torch.float32, False, "efficient"),
    ],
)
def test_a_card_takes_a_kernel_by_its_compute_capability(capability: str, dtype: torch.dtype, masked: bool, kernel: str) -> None:
    states = torch.empty(1, 8, 32, 64, dtype=dtype)
    mask = torch.empty(1, 1, 32, 32, dtype=torch.bool) if masked else None
    assert kernels.choose_kernel(states, states, states, mask, kernels_of(capability)) == kernel


@pytest.mark.parametrize(
    ("widths", "masked", "capability", "kernel"),
    [
        ((256, 256), False, "9.0", "flash"),  # wider than cuDNN's
        ((256, 256), True, "9.0", "efficient"),
        ((320, 320), False, "8.0", "efficient"),  # wider than flash attention's
        ((192, 128), False, "8.0", "efficient"),  # flash attention has one width
        ((100, 100), False, "8.0", "flash"),  # which pads
        ((100, 100), True, "8.0", "math"),
    ],
)
def test_a_kernel_has_limits_of_width(widths: tuple[int, int], masked: bool, capability: str, kernel: str) -> None:
    query, value = (torch.empty(1, 8, 32, width, dtype=torch.bfloat16) for width in widths)
    mask = torch.empty(1, 1, 32, 32) if masked else None
    assert kernels.choose_kernel(query, query, value, mask, kernels_of(capability)) == kernel


def test_torch_has_no_grouped_heads_but_in_flash_attention() -> None:
    """The rows of KERNELS are of this release: a later one takes grouped heads in the memory-efficient kernel as well."""
    said = Path(torch.__file__).parent / "include/ATen/native/transformers/sdp_utils_cpp.h"
    assert "supports_mqa" not in said.read_text(encoding="utf-8")
    assert "It currently works only for Flash_attention" in str(F.scaled_dot_product_attention.__doc__)


def test_a_mask_with_shared_heads_has_no_kernel_but_the_plain_one() -> None:
    query, key = torch.empty(1, 8, 32, 64, dtype=torch.float16), torch.empty(1, 4, 32, 64, dtype=torch.float16)
    assert kernels.choose_kernel(query, key, key, None, kernels_of("8.0")) == "flash"
    assert kernels.choose_kernel(query, key, key, torch.empty(1, 1, 32, 32), kernels_of("8.0")) == "math"


def test_bitsandbytes_unpacks_no_weight_for_a_few_rows_and_any_for_many() -> None:
    ranges = kernels.packed_rows(torch.bfloat16, 14336, 4096, kernels_of("8.0"))
    assert ranges[0][0] == 1
    assert ranges[0][1] >= 4
    assert ranges[-1][1] <= kernels.MOST_PACKED_ROWS
    assert kernels.packed_rows(torch.bfloat16, 256, 100, kernels_of("8.0")) == []


def test_what_is_taken_of_torch_that_is_not_public_is_there() -> None:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    slots = (ctypes.c_void_p * 21).in_dll(library, ledger.GUARDS)
    assert slots[14]  # Meta's guard, that CUDA borrows
    assert issubclass(ledger.Ledger, TorchDispatchMode)
    with FakeTensorMode(), ledger.Ledger() as counted:
        made = torch.ones(3)
        assert isinstance(made, FakeTensor)
        assert counted.number(made) == 0


def test_the_first_and_the_last_layer_of_each_kind_stand_for_all() -> None:
    assert fake_model.representatives([0, 0, 1, 0, 0, 1, 0]) == [0, 2, 5, 6]
    assert fake_model.representatives([0]) == [0]


def test_attention_can_be_chosen() -> None:
    """Eager attention holds scores of all heads; the package flash-attn holds what torch's flash kernel does, masks or not."""
    loads = [Workload(prompt_tokens=1000, new_tokens=3, batch=1)]
    peaks = {
        attention: trace(MODELS["mistral with a window"], "bf16", loads, attention)[0].peak_bytes
        for attention in ("sdpa", "eager", "flash_attention_2")
    }
    scores = 8 * 1000**2 * 2
    assert peaks["eager"] > peaks["flash_attention_2"] + 3 * scores
    assert peaks["sdpa"] > peaks["flash_attention_2"] + 2 * 1000**2  # the mask of the window
    (full,) = trace(MODELS["llama"], "bf16", loads, "flash_attention_2")
    (torchs,) = trace(MODELS["llama"], "bf16", loads)
    assert full.peak_bytes == pytest.approx(torchs.peak_bytes, rel=0.002)


def test_attention_that_a_model_does_not_support_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no trace with flash_attention_2: .* does not support it"):
        fake_model.build_fake(MODELS["chatglm, ours"], "bf16", "flash_attention_2")


def test_what_a_config_lists_by_layer_is_cut_with_its_layers() -> None:
    config = {"model_type": "smollm3", **SMALL, "num_hidden_layers": 8, "pad_token_id": 0}
    config |= {"no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0]}
    model = fake_model.build_fake(config, "bf16")
    layers = fake_model.layers_of(model)
    assert layers is not None
    kept = fake_model.keep(model, layers, [0, 3, 7])
    assert model.config.no_rope_layers == [1, 0, 0]
    assert len(model.config.layer_types) == 3
    assert model.config.num_hidden_layers == len(kept.held) == 3
