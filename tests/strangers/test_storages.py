"""Weights of `.bin` files that are views of larger storages, or share one: planned as torch holds them, mapped or read."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from harness.architecture import model_spec, skeleton_source
from harness.catalog import resolve
from harness.core.records import TierEstimate, Verdict
from harness.measure.protocol import Load
from harness.planning.planner import Planner
from harness.worker import build_skeleton as worker
from harness.worker import model as work
from tests.strangers import made_by_packages
from tests.support import strangers
from tests.support.builders import case, machine
from tests.support.small_models import held_bytes

ROOT = Path(__file__).parents[2]
Weights = dict[str, torch.Tensor]
KEY, QUERY, OTHER = (f"model.layers.{name}_proj.weight" for name in ("0.self_attn.k", "0.self_attn.q", "1.self_attn.k"))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    transformers.logging.disable_progress_bar()


def widened(weights: Weights, names: str, times: int = 4) -> Weights:
    """Make weights views of storages that are larger."""
    for name in [name for name in weights if names in name]:
        tensor = weights[name]
        storage = torch.ones(times * tensor.numel(), dtype=tensor.dtype)
        storage[: tensor.numel()] = tensor.flatten()
        weights[name] = storage[: tensor.numel()].view_as(tensor)
    return weights


def joined(weights: Weights) -> Weights:
    """Make several weights parts of one storage."""
    names = [name for name in weights if "self_attn.k_proj" in name or "self_attn.v_proj" in name]
    parts = torch.cat([weights[name] for name in names]).split([len(weights[name]) for name in names])
    return weights | dict(zip(names, parts, strict=True))


KINDS: dict[str, Callable[[Weights], Weights]] = {
    "each its own": lambda weights: weights,
    "views of larger ones": lambda weights: widened(weights, "mlp"),
    "one for many": joined,
    "a part of another": lambda weights: weights | {KEY: weights[QUERY][:32]},
    "the same twice": lambda weights: weights | {KEY: weights[OTHER]},
}


def save(folder: Path, kind: str, *, is_zip: bool) -> Path:
    weights = load_file(strangers.save_llama(folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(KINDS[kind](weights), folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    return folder


def planned(folder: Path, precision: str) -> tuple[TierEstimate, str]:
    spec = model_spec.read_spec(resolve.resolve(str(folder)))
    plan = Planner(spec, machine(), here=True).plan(case(precision, "cpu", prompt_tokens=3, new_tokens=2))
    assert plan.verdict is Verdict.FITS, plan.why
    assert plan.estimate is not None
    return plan.estimate.tiers["cpu"], str(plan.code)


def viewed_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of all tensors, those that several hold once: what of mapped storages ever comes into memory."""
    ranges = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in (*module.parameters(), *module.buffers()))
    total = end = 0
    for start, stop in ranges:
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_planned_as_their_storages_are_held(kind: str, is_zip: bool, precision: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", kind, is_zip=is_zip)
    tier, code = planned(folder, precision)
    module = work.load(Load(model=str(folder), code=code, tokenizer=False), lambda _: contextlib.nullcontext())[0].module
    assert tier.weights_bytes == (viewed_bytes(module) if is_zip else held_bytes(module))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("container", ["bin", "safetensors, head again"])
def test_packed_weights_beside_a_head_that_is_the_embedding_are_counted(container: str, tied: bool, tmp_path: Path) -> None:
    """In one pickle both are one storage, whether the config ties them or not; in safetensors the head is stored again."""
    pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(**{**made_by_packages.CONFIG, "vocab_size": 2048, "tie_word_embeddings": True})
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="bfloat16", quantization_config=nf4)
    folder = tmp_path / "made"
    model.save_pretrained(folder)
    weights = model.state_dict() if container == "bin" else load_file(folder / "model.safetensors")
    if container == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        again = weights["model.embed_tokens.weight"].clone()
        save_file(weights | {"lm_head.weight": again}, folder / "model.safetensors", metadata={"format": "pt"})
    strangers.change(folder / "config.json", {"tie_word_embeddings": tied})
    tier, code = planned(folder, "int4")
    module = work.load(Load(model=str(folder), code=code, tokenizer=False), lambda _: contextlib.nullcontext())[0].module
    assert tier.weights_bytes == pytest.approx(held_bytes(module), rel=0.005)


LOADING = """
import sys, torch, transformers
from pathlib import Path

def told():
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if words[0] in ("RssAnon:", "VmHWM:")}

tiny = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
transformers.LlamaForCausalLM(tiny)(torch.tensor([[1]]))  # what is imported here is not counted
before = told()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2])
model(torch.tensor([[1, 2, 3]]))
after = told()
print(*(after[name] - before[name] for name in ("RssAnon:", "VmHWM:")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what is resident")
@pytest.mark.parametrize(("is_zip", "dtype"), [(True, "bfloat16"), (False, "bfloat16"), (False, "float16")])
def test_what_stays_and_what_loading_takes_is_what_the_kernel_counts(is_zip: bool, dtype: str, tmp_path: Path) -> None:
    """What is mapped brings the views, what is read all of the storages, and casts come on top; each is too large for the heap."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=16384, num_hidden_layers=2, num_attention_heads=8
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(widened(weights, "mlp", 3), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    tier, _ = planned(tmp_path, {"bfloat16": "bf16", "float16": "fp16"}[dtype])
    command = [sys.executable, "-c", LOADING, str(tmp_path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    anonymous, peak = (int(word) << 10 for word in done.stdout.split())
    whole = (tmp_path / "pytorch_model.bin").stat().st_size
    plain = sum(tensor.nbytes for tensor in weights.values())
    slack = 32 << 20
    assert anonymous == pytest.approx(0 if is_zip else tier.weights_bytes, abs=slack)
    assert tier.weights_bytes == pytest.approx(plain if is_zip or dtype == "float16" else whole, rel=0.01)
    assert peak == pytest.approx(whole + plain if dtype == "float16" else tier.weights_bytes, abs=slack)
    assert tier.load_anon_bytes is not None
    assert tier.load_anon_bytes >= (0 if is_zip else peak - slack)
