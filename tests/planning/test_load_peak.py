"""What loading takes at most, for the models that this project began with: small ones of their make, in files like theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CodeGenConfig, CodeGenForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PretrainedConfig

from harness.architecture import model_spec
from harness.checkpoint import reader
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import TierEstimate
from harness.core.units import MIB
from harness.measure import system_counters
from harness.planning.code import loading_code
from harness.planning.planner import Planner
from tests.support import builders, load_peak

pytestmark = pytest.mark.skipif(not system_counters.LINUX, reason="anonymous memory is told by Linux")

NEOX = GPTNeoXConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, vocab_size=20_000)
CODEGEN = CodeGenConfig(n_embd=512, n_layer=8, n_head=8, rotary_dim=32, vocab_size=20_000, bos_token_id=1, eos_token_id=2)
# What libraries take beside weights, whatever their size.
SLACK = 24 * MIB

# from_pretrained as it was, where no dtype was given: all of the file into RAM, and a model of random float32 to copy it into.
IN_2023 = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
state = torch.load(f"{MODEL}/pytorch_model.bin", map_location="cpu", weights_only=True)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODEL), dtype=torch.float32)
model.load_state_dict(state, strict=False)
"""


def write(folder: Path, config: PretrainedConfig, state: Mapping[str, torch.Tensor], shards: int, ending: str) -> int:
    """Write a checkpoint in so many files; return how many parameters it has."""
    config.save_pretrained(folder)
    names = list(state)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{ending}" if shards > 1 else f"{stem}.{ending}"
        part = {name: state[name] for name in names[number::shards]}
        weight_map |= dict.fromkeys(part, file)
        if ending == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())


def as_printed(precision: str) -> str:
    row = PRECISIONS[precision]
    return loading_code(row, PLACEMENTS["cpu"], row.dtype)


def estimated(folder: Path, precision: str) -> TierEstimate:
    spec = model_spec.of_checkpoint("small", str(folder), reader.read(folder), folder)
    plan = Planner(spec, builders.machine()).plan(builders.case(precision))
    assert plan.estimate is not None
    return plan.estimate.tiers["cpu"]


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_float32_files_load_as_float16_without_a_copy_in_float32(tmp_path: Path, ending: str) -> None:
    """stablelm-tuned-alpha is published in float32: 31.7 GB of files for 15.7 GB of weights. The plan says the same."""
    state = GPTNeoXForCausalLM(NEOX).state_dict()
    parameters = write(tmp_path, NEOX, state, 3, ending)
    largest = max(tensor.nbytes for tensor in state.values())
    peak = load_peak.measure(tmp_path, as_printed("fp16"))
    assert 2 * parameters <= peak < 2 * parameters + largest + SLACK
    own = estimated(tmp_path, "fp32").load_anon_bytes  # of a process that maps its weights and copies none
    assert estimated(tmp_path, "fp16").load_anon_bytes - own == pytest.approx(peak, abs=SLACK)


def test_one_huge_file_is_no_longer_read_whole_beside_the_model(tmp_path: Path) -> None:
    """What the history of codegen-16b rests on: 2023's way took three times the file, and today's takes next to nothing of it."""
    state = {name: tensor.half() for name, tensor in CodeGenForCausalLM(CODEGEN).state_dict().items()}
    parameters = write(tmp_path, CODEGEN, state, 1, "bin")
    assert load_peak.measure(tmp_path, IN_2023) == pytest.approx(6 * parameters, abs=SLACK)
    assert load_peak.measure(tmp_path, as_printed("fp16")) < SLACK
    assert load_peak.measure(tmp_path, as_printed("bf16")) == pytest.approx(2 * parameters, abs=SLACK)
