"""Where nothing fits the nearest way stands beside it, and a mixture of experts is told straight."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from harness.architecture import model_spec
from harness.catalog.resolve import resolve
from harness.core.methods.packages import asked_of_pip, lacking, quoted
from harness.core.precisions import PRECISIONS
from harness.core.quantizers import SCHEMES
from harness.core.records import Machine, Verdict
from harness.core.units import GIB, format_seconds
from harness.machine.gpus import profile
from harness.planning.choice.nearest import SLOW_TOK_S
from harness.planning.choice.recommend import Recommendation, advise
from harness.planning.other_form import left_wide, published_wide
from harness.planning.planner import Planner
from tests.support.builders import case

SMALL_CARD = profile(["RTX 3060 12GB"], ram=16 * GIB)


def advised(name: str, on: Machine, *cases: tuple[str, str], here: bool = False) -> Recommendation:
    source = resolve(name)
    planner = Planner(model_spec.read_spec(source), on, here=here)
    return advise(source, planner, [case(*one, model=name) for one in cases])


def test_another_precision_or_placement_of_this_machine_comes_first() -> None:
    found = advised("qwen2.5-7b-instruct", SMALL_CARD, ("fp32", "direct"))
    assert found.best is None
    assert found.nearest is not None
    words = found.nearest.split()
    precision, placement = words[words.index("--precision") + 1], words[words.index("--placement") + 1]
    again = Planner(found.spec, SMALL_CARD, here=False).plan(case(precision, placement))
    assert again.verdict.is_good


@pytest.mark.parametrize(("name", "ways"), [("mixtral-8x7b-instruct-v0.1", 1), ("llama-3.1-405b-instruct", 3)])
def test_else_the_hardware_whose_cards_hold_every_weight(name: str, ways: int) -> None:
    found = advised(name, profile(["T4"]), ("bf16", "direct"))
    assert found.best is None
    assert found.nearest is not None
    said = re.findall(r"(\w+)/(\w+) fits (a card|\d+ cards) like ([\w ]+?) [\d.]+ ?GB", found.nearest)
    assert len(said) >= ways, found.nearest
    for precision, placement, count, card in said:
        on = profile([card] * (1 if count == "a card" else int(count.split()[0])), ram=1 << 40)
        plan = Planner(found.spec, on, here=False).plan(case(precision, placement))
        assert plan.verdict.is_good
        assert plan.estimate is not None
        assert plan.estimate.tiers["cpu"].weights_bytes == 0
        assert "disk" not in plan.estimate.tiers


def test_beside_what_is_too_slow_to_use_stands_what_is_not() -> None:
    """The disk holds a model whose 4-bit form is on the card: such a checkpoint is named first, then cards."""
    small = profile(["RTX 3060 12GB"], ram=32 * GIB)
    found = advised("Qwen/Qwen2.5-14B-Instruct", small, ("bf16", "disk"))
    assert found.best is not None
    assert found.faster is not None
    said = re.search(
        r": (\S+)/(\S+) fits with an? (\w+) checkpoint \(([\d.]+) tokens/s(.*?)\)(?:,| and) bf16/direct fits a card", found.faster
    )
    assert said is not None, found.faster
    precision, placement, form, speed, more = said.groups()
    plan = Planner(found.spec, small, here=False).plan(case(precision, placement, model=found.spec.name))
    assert plan.estimate is not None
    assert more.rpartition(", needs pip install ")[2] == quoted(plan.needs)
    assert plan.needs_checkpoint == f"{'an' if form[0] == 'A' else 'a'} {form} checkpoint"
    assert float(speed) >= SLOW_TOK_S
    assert plan.estimate.decode_tok_s.best == pytest.approx(float(speed), rel=0.05)
    assert found.faster in found.notes


def test_here_only_packages_that_are_missing_are_named_with_a_form() -> None:
    small = profile(["RTX 3060 12GB"], ram=32 * GIB)
    found = advised("Qwen/Qwen2.5-14B-Instruct", small, ("bf16", "disk"), here=True)
    assert found.faster is not None
    form = PRECISIONS[found.faster.partition(": ")[2].partition("/")[0]]
    asked = re.search(r", needs pip install ([^)]*)\)", found.faster)
    assert set(shlex.split(asked[1]) if asked else ()) == set(asked_of_pip(lacking(form.needs)))


@pytest.mark.parametrize(
    ("name", "way"), [("moss-moon-003-sft-int4", ("gptq-int4", "direct")), ("llama-3.1-70b-instruct", ("bf16", "recommended"))]
)
def test_a_card_that_is_named_as_faster_is_faster(name: str, way: tuple[str, str]) -> None:
    """All weights on a card of 12 GB are no help where each token unpacks them. And the headline says how slow it is here."""
    found = advised(name, profile(["RTX 3060 12GB"], ram=32 * GIB), way)
    assert found.best is not None
    assert found.best.estimate is not None
    speed = found.best.estimate.decode_tok_s.best
    assert speed < SLOW_TOK_S
    assert f", but slow: 16 tokens take {format_seconds(16 / speed)}" in found.reason
    assert found.faster is not None
    said = re.findall(r"([\w-]+)/(\w+) fits (a card|\d+ cards) like ([\w ]+?)(?: [\d.]+ ?GB)?(?= and |[,.])", found.faster)
    assert said, found.faster
    for precision, placement, count, card in said:
        on = profile([card] * (1 if count == "a card" else int(count.split()[0])), ram=1 << 40)
        there = Planner(found.spec, on, here=False).plan(case(precision, placement))
        assert there.estimate is not None
        assert there.estimate.decode_tok_s.best >= SLOW_TOK_S


@pytest.mark.parametrize(
    ("name", "on", "way"),
    [
        ("chatglm-6b-int4", profile(["RTX 3060 12GB"], ram=32 * GIB), ("chatglm-int4", "direct")),
        ("chatglm-6b-int4", profile([], ram=16 * GIB), ("chatglm-int4", "cpu")),
        ("moss-moon-003-sft-int8", profile(["RTX 4090"], ram=64 * GIB), ("gptq-int8", "direct")),
    ],
)
def test_what_unpacks_for_each_token_points_to_the_same_model_unpacked(name: str, on: Machine, way: tuple[str, str]) -> None:
    found = advised(name, on, way)
    assert found.best is not None
    assert found.best.estimate is not None
    assert found.faster is not None
    said = re.search(r": (\S+), the same model unpacked, fits as (\S+)/(\S+) \(([\d.]+) tokens/s\)", found.faster)
    assert said is not None, found.faster
    model, precision, placement, speed = said.groups()
    plan = Planner(model_spec.read_spec(resolve(model)), on, here=False).plan(case(precision, placement, model=model))
    assert plan.verdict is Verdict.FITS
    assert plan.estimate is not None
    assert plan.estimate.decode_tok_s.best == pytest.approx(float(speed), rel=0.05)
    assert plan.estimate.decode_tok_s.best > 2 * found.best.estimate.decode_tok_s.best


@pytest.mark.parametrize(
    ("name", "wide"),
    [
        ("chatglm-6b-int8", "THUDM/chatglm-6b"),
        ("Qwen/Qwen3-30B-A3B-FP8", "Qwen/Qwen3-30B-A3B"),
        ("chatglm-6b", None),  # is unpacked
        ("gpt-oss-20b", None),  # is published packed alone
    ],
)
def test_a_packed_model_is_known_unpacked_by_its_name(name: str, wide: str | None) -> None:
    assert published_wide(model_spec.read_spec(resolve(name))) == wide


def test_a_way_that_is_fast_enough_is_enough() -> None:
    assert advised("qwen2.5-7b-instruct", profile(["RTX 4090"]), ("bf16", "direct")).faster is None


def test_a_model_is_counted_once_for_all_machines() -> None:
    read = [model_spec.read_spec(resolve("qwen2.5-0.5b-instruct")) for _ in range(2)]
    one, other = (Planner(spec, on, here=False) for spec, on in zip(read, (SMALL_CARD, profile(["T4"])), strict=True))
    assert one.counted is other.counted


def test_what_fits_needs_no_other_way() -> None:
    found = advised("qwen2.5-0.5b-instruct", SMALL_CARD, ("bf16", "direct"))
    assert found.best is not None
    assert found.nearest is None


def test_of_a_mixture_it_is_said_why_4_bits_are_not_4() -> None:
    spec = model_spec.read_spec(resolve("mixtral-8x7b-instruct-v0.1"))
    said = left_wide(spec, ["int4", "bf16"])
    assert said is not None
    assert said.startswith("45.1 B of 46.7 B parameters are experts, which bitsandbytes leaves in 16 bits under transformers 5")
    assert left_wide(spec, ["bf16", "fp8"]) is None
    assert left_wide(model_spec.read_spec(resolve("qwen2.5-7b-instruct")), ["int4"]) is None


@pytest.mark.parametrize("name", ["mixtral-8x7b-instruct-v0.1", "qwen3-30b-a3b"])
def test_fp8_packs_experts_and_what_bitsandbytes_makes_of_them_is_as_wide_as_said(name: str) -> None:
    spec = model_spec.read_spec(resolve(name))
    large = profile(["H200 SXM"], ram=256 * GIB)
    held = {}
    for precision in ("bf16", "fp8", "int4"):
        plan = Planner(spec, large, here=False).plan(case(precision, "direct", model=name))
        assert plan.verdict in (Verdict.FITS, Verdict.TIGHT), plan.why
        assert plan.estimate is not None
        held[precision] = plan.estimate.tiers["gpu:0"].weights_bytes
    assert held["fp8"] == pytest.approx(held["bf16"] / 2, rel=0.05)
    assert held["int4"] > 0.9 * held["bf16"]


def test_fp8_replaces_experts_in_transformers_as_well() -> None:
    """And bitsandbytes does not: by the modules that each puts in their place."""
    import torch
    import transformers
    from transformers.quantizers.auto import AutoHfQuantizer

    asked = transformers.FineGrainedFP8Config()
    quantizer = AutoHfQuantizer.from_config(asked, pre_quantized=False)
    sizes: Any = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_local_experts": 2, "vocab_size": 64}
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
    quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map="auto")
    stacked = [parameter for name, parameter in model.named_parameters() if name.endswith("experts.gate_up_proj")]
    assert [parameter.dtype for parameter in stacked] == [torch.float8_e4m3fn]
    assert SCHEMES["fp8"].experts
    assert not any(row.experts for name, row in SCHEMES.items() if name != "fp8")
