"""Plans of KV caches and of attention: what they refuse is what transformers refuses, and what they add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from harness.architecture.model_spec import ModelSpec, read_spec
from harness.catalog import resolve
from harness.core.attention import ATTENTIONS, KV_FORMS, KvForm
from harness.core.records import Case, Machine, Plan, Tier, Verdict, Workload
from harness.machine.gpus import profile
from harness.planning.planner import Planner
from tests.support import small_models

HERE = Machine(name="here", tiers=(Tier(name="cpu", kind="cpu", total_bytes=64 << 30, free_bytes=48 << 30),), cores=4)
LONG = Workload(prompt_tokens=8192, new_tokens=64)


# Each keeps or reads its cache in a way of its own.
KINDS = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "codegen", "bloom", "falcon", "mamba")


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    small_models.save(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def spec(saved: Path) -> ModelSpec:
    return read_spec(resolve.resolve(str(saved)))


def planned(spec: ModelSpec, machine: Machine = HERE, **how: Any) -> Plan:
    given: dict[str, Any] = {"precision": "bf16", "placement": "cpu", "workload": Workload(prompt_tokens=20, new_tokens=4)} | how
    return Planner(spec, machine, here=False).plan(Case(model=spec.name, **given))


def generates(folder: Path, arguments: dict[str, Any], **loading: Any) -> bool:
    """Say whether transformers loads the model and continues a prompt."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", **loading)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(pad_token_id=0, **arguments),
            max_new_tokens=4,
            do_sample=False,
        )
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kv", ["static", "fp8"])
def test_a_form_is_refused_exactly_where_transformers_refuses_it(kv: str, saved: Path, spec: ModelSpec) -> None:
    assert planned(spec, kv=kv).verdict.is_good == generates(saved, dict(KV_FORMS[kv].arguments))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_refused_exactly_where_transformers_refuses_it(attention: str, saved: Path, spec: ModelSpec) -> None:
    assert planned(spec, attention=attention).verdict.is_good == generates(saved, {}, attn_implementation=attention)


def on_card(name: str, card: str = "RTX 4090", **how: Any) -> Plan:
    return planned(
        read_spec(resolve.resolve(name)), profile([card], ram=64 << 30), **({"placement": "direct", "workload": LONG} | how)
    )


def kv_bytes(one: Plan, tier: str = "gpu:0") -> int:
    assert one.estimate is not None
    return one.estimate.tiers[tier].kv_bytes


def test_eight_bits_are_half_and_four_a_third_of_the_cache() -> None:
    usual = kv_bytes(on_card("qwen2.5-7b-instruct"))
    assert kv_bytes(on_card("qwen2.5-7b-instruct", kv="fp8")) == pytest.approx(usual / 2, rel=0.001)
    four = kv_bytes(on_card("qwen2.5-7b-instruct", kv="quanto-int4"))
    assert usual * 4.5 / 16 < four < usual * 4.5 / 16 * 1.03  # the latest 63 of 8,255 tokens are as they are
    assert kv_bytes(on_card("qwen2.5-7b-instruct", kv="static")) == usual


def test_what_lies_in_ram_has_two_layers_on_the_card() -> None:
    usual, there = on_card("qwen2.5-7b-instruct"), on_card("qwen2.5-7b-instruct", kv="offloaded")
    assert kv_bytes(there) == 2 * kv_bytes(usual) // 28
    assert kv_bytes(there, "cpu") == kv_bytes(usual)
    assert there.estimate is not None
    assert usual.estimate is not None
    assert there.estimate.decode_tok_s.best < usual.estimate.decode_tok_s.best


def test_smaller_caches_have_longer_contexts() -> None:
    spec, machine = read_spec(resolve.resolve("qwen2.5-7b-instruct")), profile(["RTX 4070"], ram=64 << 30)
    most = {}
    for kv in ("dynamic", "fp8", "quanto-int4"):
        planner = Planner(spec, machine, here=False)
        most[kv] = planner.max_context(planner.plan(Case(model="m", precision="int8", placement="direct", kv=kv))) or 0
    assert most["dynamic"] < most["fp8"] < most["quanto-int4"]


def test_eager_attention_holds_all_scores() -> None:
    eager, usual = on_card("qwen2.5-7b-instruct", attention="eager"), on_card("qwen2.5-7b-instruct", attention="sdpa")
    assert eager.estimate is not None
    assert usual.estimate is not None
    scores = 28 * 8192**2 * 4  # heads, in float32 alone
    assert eager.estimate.tiers["gpu:0"].activation_bytes > usual.estimate.tiers["gpu:0"].activation_bytes + scores
    assert 'attn_implementation="eager"' in str(eager.code)


@pytest.mark.parametrize(
    ("how", "verdict", "told"),
    [
        ({"kv": "fp8", "name": "gemma-2-9b-it"}, Verdict.INVALID, "a sliding window of 4,096 tokens: drop --kv fp8"),
        (
            {"kv": "hqq-int4", "name": "smollm2-135m"},
            Verdict.INVALID,
            "a token has 3: odd prompts end in an error: take --kv hqq-int8",
        ),
        ({"kv": "offloaded", "placement": "cpu"}, Verdict.INVALID, "lies in RAM already"),
        ({"attention": "flash_attention_2", "card": "T4"}, Verdict.UNAVAILABLE, "needs compute capability 8.0, and"),
        ({"attention": "flash_attention_3"}, Verdict.UNAVAILABLE, "needs compute capability 9.0"),
        ({"attention": "flash_attention_2", "precision": "fp32"}, Verdict.INVALID, "computes in float16 or bfloat16, and fp32"),
        ({"attention": "flash_attention_2", "placement": "cpu"}, Verdict.INVALID, "runs on NVIDIA GPUs alone"),
        ({"attention": "sdpa", "name": "bloom-560m"}, Verdict.INVALID, "has no sdpa: take --attention eager"),
        ({"attention": "eager", "name": "chatglm-6b"}, Verdict.INVALID, "has attention of its own"),
    ],
)
def test_what_cannot_be_is_one_sentence(how: dict[str, Any], verdict: Verdict, told: str) -> None:
    one = on_card(**({"name": "qwen2.5-7b-instruct"} | how))
    assert one.verdict is verdict
    assert told in str(one.why)
    assert one.code is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's, as hqq calls it
@pytest.mark.parametrize("form", [form for form in KV_FORMS.values() if "hqq" in form.needs], ids=lambda form: form.name)
def test_an_odd_number_of_groups_is_refused_exactly_where_hqq_fails(form: KvForm) -> None:
    quantize = pytest.importorskip("hqq.core.quantize").Quantizer.quantize
    heads = read_spec(resolve.resolve("smollm2-135m")).skeleton.attention[0].heads
    for batch in (1, 2):
        keys, works = torch.randn(batch, heads, 7, 64, dtype=torch.bfloat16), True
        try:
            quantize(keys, nbits=form.bits, axis=1, device="cpu", compute_dtype=torch.bfloat16, group_size=64)
        except RuntimeError:
            works = False
        one = on_card("smollm2-135m", kv=form.name, workload=Workload(batch=batch))
        assert one.verdict.is_good == works


def test_every_row_of_attention_is_one_of_the_library_or_its_default() -> None:
    from transformers import AttentionInterface

    assert {*ATTENTIONS} <= {"eager", *AttentionInterface().valid_keys()}
