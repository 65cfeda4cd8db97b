"""The speed of ChatGLM-6B's and MOSS's packed layers, planned before small models of theirs run here."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.architecture import model_spec
from harness.checkpoint import reader
from harness.core.records import Case, Machine, Workload
from harness.core.units import format_share
from harness.models import ChatGLMConfig, ChatGLMForCausalLM, MossConfig, MossForCausalLM
from harness.models.cache_argument import CACHE, kv_cache_of
from harness.planning.calibration import Calibration
from harness.planning.planner import Planner
from tests.support.reporting import Figure

TOKENS = 12
NEAR = 0.3


def of_chatglm(bits: int) -> Any:
    """Four layers half as wide as ChatGLM-6B's: 0.2 B."""
    return ChatGLMForCausalLM(
        ChatGLMConfig(
            vocab_size=8000, hidden_size=2048, inner_hidden_size=8192, num_layers=4, num_attention_heads=16, quantization_bit=bits,
            mask_token_id=7998, gmask_token_id=7999, bos_token_id=7996, eos_token_id=7997, pad_token_id=3,
        )
    )  # fmt: skip


def of_moss(bits: int) -> Any:
    """Four layers a third as wide as MOSS's: 0.2 B."""
    return MossForCausalLM(
        MossConfig(
            vocab_size=8000, n_embd=2048, n_layer=4, n_head=16, rotary_dim=32, bos_token_id=1, eos_token_id=2,
            wbits=bits, groupsize=128,
        )
    )  # fmt: skip


def draw(model: Any) -> Any:
    """Fill packed weights with random bits, and scales so that what they stand for is small."""
    torch.manual_seed(0)
    for name, tensor in model.named_parameters():
        if name.endswith("g_idx"):
            tensor.data = torch.arange(len(tensor), dtype=torch.int32) // 128
        elif not tensor.dtype.is_floating_point:
            tensor.data.copy_(torch.randint(-(2**31), 2**31, tensor.shape))
        elif "scale" in name:
            tensor.data.uniform_(0, 1e-3)
    return model.half().eval()


def seconds_of_a_token(make: Callable[[int], Any], bits: int, folder: Path) -> float:
    """Save a model and return the seconds of its fastest token: beside other programs, waiting takes many times as long."""
    model = draw(make(bits))
    model.save_pretrained(folder)
    prompt = torch.tensor([[5] * 14 + [7999, 7996]])  # [gMASK] and <sop> of the first
    with torch.inference_mode():
        past = kv_cache_of(model(prompt, use_cache=True))
        taken = []
        for _ in range(TOKENS):
            start = time.perf_counter()
            past = kv_cache_of(model(torch.tensor([[9]]), **{CACHE: past}, use_cache=True))
            taken.append(time.perf_counter() - start)
    return min(taken)


@pytest.mark.parametrize(
    ("precision", "make", "bits"),
    [("chatglm-int8", of_chatglm, 8), ("chatglm-int4", of_chatglm, 4), ("gptq-int8", of_moss, 8), ("gptq-int4", of_moss, 4)],
)
def test_a_token_takes_what_the_plan_says(
    here: Machine, calibrated: Calibration, figures: list[Figure], tmp_path: Path, precision: str, make: Any, bits: int
) -> None:
    """In a process of its own, for threads that sleep while they wait, as those of tests do, take two to three times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_WAIT_POLICY", raising=False)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
            took_s = apart.submit(seconds_of_a_token, make, bits, tmp_path).result()
    spec = model_spec.of_checkpoint("small", str(tmp_path), reader.read(tmp_path), tmp_path)
    work = Workload(prompt_tokens=16, new_tokens=TOKENS)
    case = Case(model="small", precision=precision, placement="cpu", workload=work)
    for constants, said, wanted in ((None, "without calibration", ""), (calibrated, "calibrated here", f"{NEAR * 100:.0f} %")):
        plan = Planner(spec, here, constants=constants).plan(case)
        assert plan.estimate is not None
        error = plan.estimate.decode_tok_s.best * took_s - 1
        what = f"decode tokens/s of small packed models, {precision}, {said}"
        figures.append(Figure(what=what, rows=1, found=format_share(error), wanted=wanted))
    assert abs(error) < NEAR
