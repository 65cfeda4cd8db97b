"""Planned peaks against traced ones: transformers' own code on fake tensors of a GPU, every storage counted.

`tests/data/traced_peaks.csv` has the peaks that torch would allocate, of 12 architectures at 64 to 32,768 tokens (torch 2.13,
transformers 5.23, CodeGen 5.24, which gave it SDPA; bitsandbytes 0.50, attention kernels of compute capability 8.0).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import msgspec
import pytest

from harness.architecture import model_spec, traces
from harness.architecture.model_spec import ModelSpec
from harness.catalog import resolve
from harness.cli.entry import main
from harness.core.errors import UsageError
from harness.core.precisions import PRECISIONS
from harness.core.progress import silent
from harness.core.records import Case, Machine, Plan, TierEstimate, Verdict, Workload
from harness.core.units import GIB
from harness.machine.gpus import profile
from harness.planning.cost import estimate
from harness.planning.cost.activations import Activations
from harness.planning.planner import Planner
from tests.support import small_models

with (Path(__file__).parents[1] / "data/traced_peaks.csv").open(newline="") as _file:
    ROWS = list(csv.DictReader(_file))
DTYPES = {"bf16": "bfloat16", "int8": "float16", "int4": "bfloat16"}


@cache
def spec(model: str) -> ModelSpec:
    return model_spec.read_spec(resolve.resolve(model))


@cache
def planner(model: str, machine: Machine) -> Planner:
    return Planner(spec(model), machine, here=False)


def plan(model: str, precision: str, workload: Workload, machine: Machine) -> Plan:
    case = Case(model=spec(model).name, precision=precision, placement="direct", workload=workload)
    return planner(model, machine).plan(case)


def planned(row: dict[str, str]) -> TierEstimate:
    workload = Workload(prompt_tokens=int(row["prompt_tokens"]), new_tokens=int(row["new_tokens"]), batch=int(row["batch"]))
    found = plan(row["model"], row["precision"], workload, profile(["2000GiB"], ram=4000 * GIB))
    assert found.estimate is not None
    return found.estimate.tiers["gpu:0"]


def errors(precision: str) -> Iterator[tuple[float, dict[str, str]]]:
    """Yield the error of each row of a precision, as a share of the traced peak."""
    for row in ROWS:
        if row["precision"] == precision:
            yield planned(row).allocated_bytes / int(row["peak_allocated_bytes"]) - 1, row


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_allocated_bytes_are_what_was_traced(precision: str) -> None:
    found = [abs(error) for error, _ in errors(precision)]
    assert len(found) > 60
    assert median(found) < 0.003
    assert quantiles(found, n=100)[98] < 0.02


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_no_traced_peak_is_above_the_interval(precision: str) -> None:
    assert not [row for _, row in errors(precision) if int(row["peak_allocated_bytes"]) > planned(row).high_bytes]


@pytest.mark.parametrize(
    ("model", "card", "prompt", "batch", "traced_gib"),
    [
        ("mistral-7b-instruct-v0.1", "20GiB", 32_000, 1, 21.98),  # sliding windows keep slices of the whole prompt
        ("mixtral-8x7b-instruct-v0.1", "96GiB", 64, 16, 97.6),  # decoding copies the weights of the chosen experts
        ("gemma-3-4b-it", "12GiB", 32_768, 1, 15.8),  # a mask of prompt x prompt for the layers with a window
    ],
)
def test_what_was_said_to_fit_and_does_not(model: str, card: str, prompt: int, batch: int, traced_gib: float) -> None:
    workload = Workload(prompt_tokens=prompt, new_tokens=16, batch=batch)
    found = plan(model, "bf16", workload, profile([card], ram=128 * GIB))
    assert found.verdict is Verdict.TOO_BIG
    assert found.estimate is not None
    assert found.estimate.tiers["gpu:0"].allocated_bytes / GIB == pytest.approx(traced_gib, rel=0.01)


def test_records_of_traces_and_formulas_agree() -> None:
    """A plan takes the record of a trace where one is shipped; the formulas are for all other models, and say the same."""
    for row in ROWS:
        found, at = planned(row), (int(row["prompt_tokens"]), int(row["batch"]))
        fmt = estimate.weight_format(PRECISIONS[row["precision"]], DTYPES[row["precision"]], spec(row["model"]))
        workload = Workload(prompt_tokens=at[0], new_tokens=int(row["new_tokens"]), batch=at[1])
        by_formula = Activations(spec(row["model"]).skeleton, fmt, "gpu").bytes(workload)
        assert found.weights_bytes + found.kv_bytes + by_formula == pytest.approx(found.allocated_bytes, rel=0.02), (
            row["model"],
            at,
        )


def test_explaining_names_what_is_alive_at_the_peak(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("mistral-7b-instruct-v0.1", "--gpu", "24GiB", "--ram", "64GiB", "--prompt-tokens", "16000")
    main(["plan", *words, "--explain", "bf16/direct"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Alive at the traced peak beside the weights: KV cache, 1.95 GiB; " in said
    assert "of model.layers.31.mlp" in said
    main(["plan", *words, "--explain", "torchao-int8/direct"])  # whose kernels no rule is known of
    assert "this model has not been traced in this precision" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("model", "prompt", "batch", "traced"),
    [
        ("qwen3-0.6b", 2048, 4, 6805260800),
        ("qwen2.5-0.5b-instruct", 4096, 2, 6212642816),
        ("llama-2-7b-hf", 2048, 4, 37171251712),  # a head of keys for each of queries: memory-efficient attention
    ],
)
def test_float32_writes_attention_out_where_heads_are_grouped(model: str, prompt: int, batch: int, traced: int) -> None:
    """No fused kernel takes both: all scores are in memory. Traced on fake tensors, as rows of tests/data/traced_rows.csv."""
    fmt = estimate.weight_format(PRECISIONS["fp32"], "float32", spec(model))
    workload = Workload(prompt_tokens=prompt, new_tokens=3, batch=batch)
    by_formula = Activations(spec(model).skeleton, fmt, "gpu").bytes(workload)
    tier = plan(model, "fp32", workload, profile(["2000GiB"], ram=4000 * GIB)).estimate
    assert tier is not None
    held = tier.tiers["gpu:0"].weights_bytes + tier.tiers["gpu:0"].kv_bytes
    assert held + by_formula == pytest.approx(traced, rel=0.01)


def test_explaining_a_case_has_it_traced_where_nobody_has(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The first time by a worker; then a plan without torch has the record at hand, and the sentence is gone."""
    model = tmp_path / "model"
    small_models.save("llama", model)
    words = ["plan", str(model), "--gpu", "8GiB", "--ram", "64GiB", "--precision", "bf16", "--placement", "direct"]
    main(words)
    assert "computed by formulas; --explain bf16/direct traces the model" in " ".join(capsys.readouterr().out.split())
    main([*words[:-4], "--explain", "bf16/direct"])
    said = capsys.readouterr()
    assert "tracing model in bf16, once" in said.err
    assert "Alive at the traced peak beside the weights: KV cache" in " ".join(said.out.split())
    main(words)
    assert "by formulas" not in capsys.readouterr().out


def test_a_trace_that_fails_leaves_the_formulas_and_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*asked: Any) -> bytes:
        raise UsageError(f"{asked[2]}: transformers did not answer in {asked[3]:.0f} s")

    monkeypatch.setattr(traces, "ask_worker", refuse)
    main(["plan", "baichuan2-7b-chat", "--gpu", "24GiB", "--ram", "64GiB", "--explain", "bf16/direct"])
    said = "Activations are computed by formulas: no trace for model_type 'baichuan' in bf16: transformers did not answer in 300 s."
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("prompt", "batch", "traced"), [(256, 1, 13432320), (2048, 1, 533255680), (1024, 4, 567363072)])
def test_cards_before_flash_write_attention_out_where_heads_are_grouped(prompt: int, batch: int, traced: int) -> None:
    """Qwen2.5 0.5B in float16 on a T4 (7.5), traced on fake tensors beside weights and cache."""
    found = spec("qwen2.5-0.5b-instruct")
    fmt = estimate.weight_format(PRECISIONS["fp16"], "float16", found)
    workload = Workload(prompt_tokens=prompt, new_tokens=2, batch=batch)
    assert Activations(found.skeleton, fmt, "gpu", flash=False).bytes(workload) == pytest.approx(traced, rel=0.02)
    assert Activations(found.skeleton, fmt, "gpu").bytes(workload) < traced * 0.8


def test_what_was_planned_before_a_trace_is_planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped, machine = traces.shipped_trace, profile(["RTX 4090"], ram=32 * GIB)
    untraced = msgspec.structs.replace(spec("smollm2-135m-instruct"), name="not traced yet")
    case = Case(model=untraced.name, precision="bf16", placement="direct", workload=Workload())
    planner = Planner(untraced, machine, here=False)
    with monkeypatch.context() as patched:
        patched.setattr(traces, "shipped_trace", lambda *_: None)
        patched.setattr(traces, "built_trace", lambda *_: None)
        patched.setattr(traces, "build_record", lambda config, name, _, card, attention: shipped(config, name, card, attention))
        before = planner.plan(case)
        assert planner.trace(planner.untraced([case]), silent) == []
    after, traced = planner.plan(case).estimate, plan("smollm2-135m-instruct", "bf16", Workload(), machine).estimate
    assert before.estimate is not None
    assert after is not None
    assert traced is not None
    assert before.estimate.tiers["gpu:0"] != after.tiers["gpu:0"] == traced.tiers["gpu:0"]
