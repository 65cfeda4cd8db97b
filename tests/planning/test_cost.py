"""The cost model against what was published and measured, and what must hold of any estimate."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from msgspec.structs import replace

from harness.architecture import model_spec, skeleton_source
from harness.architecture.model_spec import ModelSpec
from harness.catalog import resolve
from harness.catalog.shipped import catalog as known
from harness.checkpoint.reader import read
from harness.core.errors import CheckpointError
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.quantizers import SCHEMES, UNPACKINGS
from harness.core.records import Case, Machine, Plan, Tier, TierEstimate, Verdict, Workload
from harness.core.units import GIB, MIB
from harness.machine.gpus import profile
from harness.planning.calibration import default
from harness.planning.choice.recommend import choose_best
from harness.planning.cost import estimate, memory
from harness.planning.cost.footprint import Footprint
from harness.planning.cost.inventory import Inventory
from harness.planning.cost.memory import WeightFormat
from harness.planning.planner import Planner
from tests.support.builders import weight_bytes
from tests.support.checkpoint_files import write_safetensors

CHATGLM = model_spec.read_spec(resolve.resolve("chatglm-6b"))
RTX_3060 = profile(["RTX 3060 12GB"], ram=32 * GIB)


def planner(spec: ModelSpec = CHATGLM, machine: Machine = RTX_3060) -> Planner:
    return Planner(spec, machine, here=False)


def case(text: str, spec: ModelSpec = CHATGLM, **workload: int) -> Case:
    precision, placement = text.split("/")
    return Case(model=spec.name, precision=precision, placement=placement, workload=Workload(**workload))


def tier(plan: Plan, name: str) -> TierEstimate:
    assert plan.estimate is not None
    return plan.estimate.tiers[name]


# ---- weights ----------------------------------------------------------------------------------------------------------


def weights(name: str, kept: WeightFormat) -> int:
    return sum(weight_bytes(skeleton_source.named(name), kept).values())


def test_weights_of_chatglm_are_as_its_own_quantizer_leaves_them() -> None:
    """Facts: 6.25 GiB in int8 with a 16-bit scale a row; LLM.int8's are of 32 bits."""
    rows = 28 * (12288 + 4096 + 16384 + 4096)
    assert weights("chatglm-6b", WeightFormat(dtype="float16", quantizer="int8")) == pytest.approx(6.71e9 + 2 * rows, rel=0.005)
    assert weights("chatglm-6b", WeightFormat(dtype="float16")) == pytest.approx(2 * 6_173_286_400, rel=0.001)


@pytest.mark.parametrize(
    ("name", "bits"), [("llama-2-7b-hf", 4.5), ("llama-2-13b-hf", 4.5), ("phi-2", 4.5), ("qwen2.5-0.5b-instruct", 4.5)]
)
def test_int4_holds_linears_in_4_bits_and_a_float_for_64_and_leaves_the_rest(name: str, bits: float) -> None:
    found = skeleton_source.named(name)
    linear = sum(weight.elements for weight in found.weights if weight.quantizes)
    others = found.parameters - linear
    expected = linear * bits / 8 + others * 2
    assert weights(name, WeightFormat(dtype="bfloat16", quantizer="int4")) == pytest.approx(expected, rel=0.001)


def test_experts_that_are_stacked_stay_in_16_bits() -> None:
    """transformers 5 stacks them, and bitsandbytes replaces Linear modules only."""
    plain, packed = (weights("mixtral-8x7b-instruct-v0.1", WeightFormat(dtype="bfloat16", quantizer=how)) for how in (None, "int4"))
    assert packed > 0.9 * plain


def test_a_checkpoint_that_is_quantized_already_has_the_size_it_has_on_the_hub() -> None:
    """Of those in one .bin see tests/planning/test_stored.py."""
    assert model_spec.read_spec(resolve.resolve("gpt-oss-20b")).checkpoint_bytes == pytest.approx(13.761e9, rel=0.001)


# ---- KV cache -----------------------------------------------------------------------------------------------------------


def test_the_kv_cache_knows_grouped_heads_windows_and_latents() -> None:
    one = {name: sum(memory.kv_bytes(skeleton_source.named(name), 1, 1, 2)) for name in ("chatglm-6b", "chatglm2-6b")}
    assert one == {"chatglm-6b": 458_752, "chatglm2-6b": 28_672}
    gemma = skeleton_source.named("gemma-2-9b-it")
    short, long = (sum(memory.kv_bytes(gemma, tokens, 1, 2)) for tokens in (4096, 8192))
    assert long == short * 3 // 2  # half of the layers keep 4096 tokens and no more


# ---- VRAM -----------------------------------------------------------------------------------------------------------------

# Qwen2.5 speed benchmark: transformers 4.46, one A100, 2048 tokens generated, GiB. With an input of 1 the cache at the end counts,
# with longer ones prefill.
PUBLISHED = [
    ("Qwen2.5-0.5B-Instruct", 6144, 1.23),
    ("Qwen2.5-1.5B-Instruct", 1, 2.95),
    ("Qwen2.5-1.5B-Instruct", 30720, 5.62),
    ("Qwen2.5-3B-Instruct", 14336, 7.47),
    ("Qwen2.5-7B-Instruct", 1, 14.38),
    ("Qwen2.5-7B-Instruct", 30720, 19.97),
    ("Qwen2.5-14B-Instruct", 14336, 31.95),
    ("Qwen2.5-32B-Instruct", 1, 61.58),
    ("Qwen2.5-32B-Instruct", 30720, 74.47),
]


def allocated(name: str, prompt: int, new: int, kept: WeightFormat) -> int:
    spec = model_spec.read_spec(resolve.resolve(name))
    count = Footprint(Inventory(spec, kept), "gpu:0", Workload(prompt_tokens=prompt, new_tokens=new), default())
    return estimate.memory(count, RTX_3060)["gpu:0"].allocated_bytes


def test_vram_is_what_was_published() -> None:
    kept = WeightFormat(dtype="bfloat16")
    errors = [abs(allocated(f"Qwen/{name}", prompt, 2048, kept) / (size * GIB) - 1) for name, prompt, size in PUBLISHED]
    assert statistics.median(errors) < 0.01
    assert max(errors) < 0.03


def test_llama_in_nf4_is_what_was_published() -> None:
    """GPTQ-for-LLaMa on an RTX 3090, 2048 tokens: 5102 MiB in nf4; its fp16 row leaves 72 MiB beside weights and cache."""
    found = allocated("llama-2-7b-hf", 1, 2048, WeightFormat(dtype="float16", quantizer="int4"))
    assert found / MIB == pytest.approx(5102, rel=0.04)


# ---- estimates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatglm-6b", "gpt-oss-20b", "deepseek-v2-lite-chat", "gemma-2-9b-it", "smollm2-135m-instruct"])
@pytest.mark.parametrize("machine", [RTX_3060, profile([], ram=64 * GIB), profile([], ram=8 * GIB)], ids=lambda found: found.name)
def test_every_estimate_is_in_order(name: str, machine: Machine) -> None:
    spec = model_spec.read_spec(resolve.resolve(name))
    cases = [case(f"{precision}/{placement}", spec) for precision in PRECISIONS for placement in PLACEMENTS]
    for plan in planner(spec, machine).plans(cases):
        if plan.estimate is None:
            continue
        for found in plan.estimate.tiers.values():
            assert found.low_bytes <= found.peak_bytes <= found.high_bytes
            assert found.load_peak_bytes <= found.peak_bytes
            assert found.allocated_bytes == pytest.approx(found.weights_bytes + found.kv_bytes + found.activation_bytes, abs=2)
            if plan.verdict is Verdict.FITS and found.capacity_bytes is not None:
                assert found.needed_high_bytes <= found.capacity_bytes
        for span in (plan.estimate.load_s, plan.estimate.first_token_s, plan.estimate.decode_tok_s):
            assert 0 < span.low <= span.best <= span.high
        if plan.needs_checkpoint or "fp32_cpu_offload" in str(plan.code):
            continue  # other forms are held against files in tests/strangers, maps of two against a loader in test_load_peak_gpu
        held = sum(found.weights_bytes for found in plan.estimate.tiers.values())
        dtype = "float32" if plan.case.precision == "fp32" else "float16"
        on_cards = any(tier.startswith("gpu") for tier in plan.estimate.tiers)
        kept = estimate.weight_format(PRECISIONS[plan.case.precision], dtype, spec, on_cards=on_cards)
        assert held == pytest.approx(weights(name, kept), rel=0.001)


def test_more_tokens_and_more_prompts_need_more() -> None:
    few, many, batch = (
        tier(planner().plan(case("int8/direct", prompt_tokens=prompt, batch=prompts)), "gpu:0").allocated_bytes  # loading apart
        for prompt, prompts in ((64, 1), (2000, 1), (2000, 4))
    )
    assert few < many < batch


def test_what_is_mapped_may_be_dropped_while_copying_but_not_while_running() -> None:
    """A bf16 model of 11.5 GiB is mapped and read for each token: 8 GiB of RAM do not do, though nearly nothing is anonymous."""
    small = profile([], ram=8 * GIB)
    assert planner(machine=small).plan(case("fp16/cpu")).verdict is Verdict.TOO_BIG
    plan = planner(machine=profile([], ram=16 * GIB)).plan(case("bf16/cpu"))
    assert plan.verdict is Verdict.FITS
    assert tier(plan, "cpu").peak_bytes <= 16 * GIB  # file and copy would be 23 GiB: pages of the file go first


def test_loading_through_the_ram_needs_the_ram() -> None:
    tight = profile(["RTX 4090"], ram=8 * GIB)
    assert planner(machine=tight).plan(case("bf16/direct")).verdict is Verdict.FITS
    assert planner(machine=tight).plan(case("bf16/ram-to-gpu")).verdict is Verdict.TOO_BIG


# ---- verdicts -------------------------------------------------------------------------------------------------------------


def test_too_big_says_what_is_needed_of_what_and_what_to_try() -> None:
    cases = [case("fp16/direct"), case("int8/direct"), case("fp16/gpu+cpu")]
    why = planner().plans(cases)[0].why
    assert why is not None
    # Its files hold the tied head twice, and transformers lays both on the card and compares them before it drops one.
    assert why.startswith("too big for gpu:0: needs 13.4 GiB (weights 11.5, ")
    assert "more while loading 1.4" in why
    assert why.endswith("free 11.8. Try --precision int8 or --placement gpu+cpu.")


def test_bitsandbytes_is_too_big_where_auto_would_spill() -> None:
    plan = planner(machine=profile(["4GiB"], ram=32 * GIB)).plan(case("int8/auto"))
    assert plan.verdict is Verdict.TOO_BIG
    assert plan.why is not None
    assert "weights would lie on cpu" in plan.why


def test_an_unknown_size_is_not_guessed() -> None:
    unknown = planner(machine=profile(["12GiB"]))
    assert unknown.plan(case("int8/direct")).verdict is Verdict.FITS
    plan = unknown.plan(case("int8/cpu"))
    assert (plan.verdict, plan.why) == (Verdict.UNAVAILABLE, "memory size of cpu is unknown; pass --ram SIZE")


def test_a_quantized_checkpoint_is_not_quantized_again() -> None:
    spec = model_spec.read_spec(resolve.resolve("moss-moon-003-sft-int4"))
    assert planner(spec).plan(case("int8/direct", spec)).verdict is Verdict.INVALID
    assert planner(spec).plan(case("gptq-int4/direct", spec)).verdict.is_good


def test_the_recommendation_fits_and_says_why() -> None:
    everything = [case(f"{precision}/{placement}") for precision in PRECISIONS for placement in PLACEMENTS]
    best = choose_best(planner().plans(everything))
    assert best is not None
    assert best[0].case.id == "chatglm-6b/int8/direct"
    assert "times as fast as" in best[1]
    roomy = choose_best(planner(machine=profile(["A100 80GB"], ram=64 * GIB)).plans(everything))
    assert roomy is not None
    assert roomy[0].case.id == "chatglm-6b/bf16/direct"
    assert choose_best(planner(machine=profile(["1GiB"], ram=GIB)).plans(everything)) is None


def test_the_largest_context_is_where_it_stops_to_fit() -> None:
    spec = model_spec.read_spec(resolve.resolve("llama-3.1-8b-instruct"))
    asked = planner(spec, profile(["RTX 4090"], ram=32 * GIB))
    plan = asked.plan(case("bf16/direct", spec))
    most = asked.max_context(plan)
    assert most is not None
    assert 4096 < most < 131072
    for context, fits in ((most, True), (most + 200, False)):
        longer = asked.plan(case("bf16/direct", spec, prompt_tokens=context - Workload().new_tokens))
        assert (longer.verdict.is_good) == fits


# ---- models nobody knows ---------------------------------------------------------------------------------------------------


def test_an_unknown_architecture_is_planned_from_its_tensors_and_says_so(tmp_path: Path) -> None:
    hidden, layers, vocabulary = 64, 3, 1000
    shapes = {"tok.embed_tokens.weight": (vocabulary, hidden), "norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes[f"blocks.{layer}.attn.qkv.weight"] = (3 * hidden, hidden)
        shapes[f"blocks.{layer}.mlp.up_proj.weight"] = (256, hidden)
        shapes[f"blocks.{layer}.ln_1.weight"] = (hidden,)
    write_safetensors(tmp_path / "model.safetensors", shapes)
    config = (
        '{"model_type": "nobody-knows", "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 1000}'
    )
    (tmp_path / "config.json").write_text(config)
    spec = model_spec.of_checkpoint("odd", str(tmp_path), read(tmp_path), tmp_path)
    assert spec.rough
    assert "planned from its tensors" in spec.notes[0]
    found = spec.skeleton
    linear = layers * hidden * (3 * hidden + 256)
    assert sum(weight.elements for weight in found.weights if weight.quantizes) == linear
    assert sum(memory.kv_bytes(found, 10, 1, 2)) == layers * 10 * 2 * hidden * 2


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"model.norm.weight": (64,), "model.embed_tokens.weight": (1000, 64)})
    (tmp_path / "config.json").write_text(json.dumps(known()["HuggingFaceTB/SmolLM2-135M-Instruct"].config))
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is 64, the config asks for 576 \(and 1 more\)"):
        model_spec.of_checkpoint("odd", str(tmp_path), read(tmp_path), tmp_path)


def test_a_machine_is_described_by_its_tiers() -> None:
    """A tier that is emulated smaller is what counts."""
    cpu = Tier(name="cpu", kind="cpu", total_bytes=64 * GIB, free_bytes=60 * GIB, limit_bytes=4 * GIB)
    limited = Machine(name="limited", tiers=(cpu, Tier(name="disk", kind="disk")))
    assert planner(machine=limited).plan(case("fp16/cpu")).verdict is Verdict.TOO_BIG


@pytest.mark.parametrize(("way", "anonymous", "pages"), [("fp16/cpu", 0, 1), ("bf16/cpu", 1, 1), ("int8/cpu", 0, 1)])
def test_a_tied_head_that_is_stored_again_takes_memory_until_it_is_tied(way: str, anonymous: int, pages: int) -> None:
    """Views: its pages are read to compare it and stay mapped with its file. Casts: it is made as well, and dropped."""
    head = next(2 * weight.elements for weight in CHATGLM.skeleton.weights if weight.tied_to)
    once = replace(CHATGLM, repeated=frozenset())
    twice, without = (tier(planner(spec, profile([], ram=64 * GIB)).plan(case(way)), "cpu") for spec in (CHATGLM, once))
    assert twice.load_anon_bytes - without.load_anon_bytes == anonymous * head
    assert twice.peak_bytes - without.peak_bytes == pytest.approx((anonymous + pages) * head, abs=2)
    assert twice.weights_bytes == without.weights_bytes


def test_a_cache_that_keeps_what_few_experts_read_leaves_nothing_below_zero() -> None:
    spec = model_spec.read_spec(resolve.resolve("mixtral-8x7b-instruct-v0.1"))
    for ram in (24, 48, 80):
        plan = planner(spec, with_disk(profile([], ram=ram * GIB), 2e9)).plan(case("bf16/disk", spec))
        assert plan.estimate is not None
        for span in (plan.estimate.first_token_s, plan.estimate.decode_tok_s):
            assert 0 < span.low <= span.best <= span.high


def test_a_file_that_the_system_does_not_map_is_too_big_however_it_is_placed() -> None:
    spec, machine = model_spec.read_spec(resolve.resolve("codegen-16b-mono")), profile(["A100 80GB"], ram=24 * GIB)
    small = replace(machine, mapping_bytes=24 * GIB)
    for way in ("fp16/direct", "int4/direct", "fp16/disk"):
        plan = planner(spec, small).plan(case(way, spec))
        assert plan.verdict is Verdict.TOO_BIG
        assert plan.why is not None
        assert plan.why.startswith(
            "too big for cpu: its only file, a .bin, has 30.0 GiB, and Linux maps no file larger than 24.0 GiB"
        )
    for other in (machine, replace(machine, mapping_bytes=32 * GIB)):
        assert planner(spec, other).plan(case("fp16/direct", spec)).verdict is Verdict.FITS
    shards = replace(spec, largest_file=("pytorch_model-00001-of-00004.bin", 10 * GIB))
    assert planner(shards, small).plan(case("fp16/direct", shards)).verdict is Verdict.FITS


def with_disk(machine: Machine, bytes_per_s: float) -> Machine:
    disk = Tier(name="disk", kind="disk", free_bytes=1 << 40, bytes_per_s=bytes_per_s)
    return replace(machine, tiers=(*(one for one in machine.tiers if one.name != "disk"), disk))


def allowed(ram: int) -> Machine:
    """A machine with 64 GiB of RAM, of which a cgroup allows so much."""
    cpu = Tier(name="cpu", kind="cpu", total_bytes=64 * GIB, free_bytes=64 * GIB, limit_bytes=ram)
    return Machine(name="allowed", tiers=(cpu,))


def idle(ram: int) -> Machine:
    """A machine without a GPU, all of whose RAM is free: of one that is only described the system takes some."""
    return Machine(
        name="idle", tiers=(Tier(name="cpu", kind="cpu", total_bytes=ram, free_bytes=ram), Tier(name="disk", kind="disk"))
    )


def test_what_the_page_cache_does_not_hold_whole_comes_from_the_disk_for_every_token() -> None:
    """Measured: in 8 GiB of a cgroup every byte of ChatGLM 6B and CodeGen 6B; of codegen-16b, without a limit, 24 of 32 GB."""
    rate, speeds = 1e9, {}
    machines = {"allowed": allowed(11 * GIB), "small": idle(11 * GIB), "large": idle(15 * GIB)}
    for name, machine in machines.items():
        plan = planner(machine=with_disk(machine, rate)).plan(case("fp16/disk"))
        assert plan.estimate is not None
        speeds[name] = plan.estimate.decode_tok_s
    seconds = 1 / (rate * default()["disk_fault_share"].best)
    kept = default()["page_cache_kept_share"].best * 11 * GIB
    read = 2 * CHATGLM.skeleton.parameters
    assert 1 / speeds["allowed"].best == pytest.approx(read * seconds, rel=0.2)
    assert 1 / speeds["allowed"].best - 1 / speeds["small"].best == pytest.approx(kept * seconds, rel=0.1)
    assert speeds["large"].best > 4 * speeds["small"].best
    assert speeds["small"].low <= speeds["small"].best <= speeds["small"].high


def test_nothing_is_read_twice_for_the_first_token_where_every_token_reads_all() -> None:
    """Measured: 9.0 s to the first token of ChatGLM 6B in 8 GiB and 8.9 s to each of the next."""
    plan = planner(machine=with_disk(allowed(8 * GIB), 2e9)).plan(case("fp16/disk", prompt_tokens=1))
    assert plan.estimate is not None
    assert plan.estimate.first_token_s.best < 1.1 / plan.estimate.decode_tok_s.best


def test_one_file_stays_mapped_whole_and_of_several_those_that_the_ram_holds_nothing_of_go() -> None:
    """Measured: CodeGen 6B fills 8 GiB from its one .bin, ChatGLM 6B from eight takes what lies in RAM."""
    spec = model_spec.read_spec(resolve.resolve("codegen-6b-mono"))
    shards = replace(spec, largest_file=("a file", spec.checkpoint_bytes // 8))
    plans = [planner(one, profile([], ram=64 * GIB)).plan(case("fp16/disk", one)) for one in (spec, shards)]
    alone, several = (tier(plan, "cpu") for plan in plans)
    written = tier(plans[0], "disk").weights_bytes
    assert alone.peak_bytes - several.load_peak_bytes > several.weights_bytes * 0.9
    assert alone.load_peak_bytes == several.load_peak_bytes == pytest.approx(written, rel=0.1)
    assert several.peak_bytes == max(several.load_peak_bytes, several.needed_bytes)
    assert several.high_bytes - several.needed_bytes > spec.checkpoint_bytes // 8
    assert alone.needed_bytes == several.needed_bytes


def test_what_is_being_written_leaves_less_of_the_ram_to_what_is_read() -> None:
    """Measured: of 14 GiB that MOSS writes into its offload folder 13.2 to 14.9 were resident in 22 GiB."""
    spec = model_spec.read_spec(resolve.resolve("moss-moon-003-sft"))
    roomy, full = (tier(planner(spec, idle(ram * GIB)).plan(case("fp16/disk", spec)), "cpu") for ram in (64, 22))
    assert full.load_peak_bytes == pytest.approx(22 * GIB * default()["ram_resident_share_writing"].best, abs=2)
    assert roomy.load_peak_bytes > 1.1 * full.load_peak_bytes


@pytest.mark.parametrize(
    ("way", "file_format", "anonymous"),
    [
        ("fp16/disk", "safetensors", False),
        ("bf16/disk", "safetensors", True),
        ("bf16/disk", "bin", False),
        ("fp16/dispatch", "bin", True),
    ],
)
def test_what_comes_from_the_disk_is_mapped_unless_it_is_cast_each_time(way: str, file_format: str, anonymous: bool) -> None:
    """accelerate's own dispatch copies what it wrote; transformers writes what it cast in another format, and maps that."""
    one = planner(replace(CHATGLM, file_format=file_format), allowed(9 * GIB))
    plan = one.plan(case(way))
    part = one.footprints[plan.case.id].terms()["cpu"]
    assert tier(plan, "disk").weights_bytes > GIB
    assert tier(plan, "cpu").activation_bytes > 100 * MIB
    assert (part.activation.best > 100 * MIB, part.brought > 100 * MIB) == (anonymous, not anonymous)


def test_what_a_run_leaves_to_the_machine_is_not_counted_on() -> None:
    """A run's guard ends a case before the last 2 % are taken; pages of files can be dropped. What is described has no guard."""
    found = tier(planner(machine=idle(64 * GIB)).plan(case("fp32/cpu")), "cpu")
    for ram, verdicts in (
        (found.needed_bytes + 100 * MIB, (Verdict.TIGHT, Verdict.TOO_BIG)),
        (found.needed_high_bytes + 100 * MIB, (Verdict.FITS, Verdict.TIGHT)),
        (found.needed_high_bytes + GIB, (Verdict.FITS, Verdict.FITS)),
    ):
        plans = [Planner(CHATGLM, idle(ram), here=here).plan(case("fp32/cpu")) for here in (False, True)]
        assert tuple(plan.verdict for plan in plans) == verdicts
        left = ", of which a run leaves 0.5" in str(plans[1].why)
        assert left == (plans[1].verdict is not Verdict.FITS)
    mapped = tier(planner(machine=idle(64 * GIB)).plan(case("fp16/cpu")), "cpu")
    small = idle(mapped.needed_high_bytes + 100 * MIB)
    assert Planner(CHATGLM, small).plan(case("fp16/cpu")).verdict is Verdict.FITS


@pytest.mark.parametrize(("spare", "verdict"), [(100 * MIB, Verdict.TIGHT), (GIB, Verdict.FITS)])
def test_under_a_limit_the_machine_keeps_what_is_beyond_it(spare: int, verdict: Verdict) -> None:
    needed = tier(planner(machine=profile([], ram=64 * GIB)).plan(case("fp32/cpu")), "cpu").needed_high_bytes + MIB
    cpu = Tier(name="cpu", kind="cpu", total_bytes=needed + spare, free_bytes=needed + spare, limit_bytes=needed)
    limited = replace(case("fp32/cpu"), ram_bytes=needed)
    assert Planner(CHATGLM, Machine(name="limited", tiers=(cpu,))).plan(limited).verdict is verdict


def test_own_dispatch_holds_a_file_whole_that_is_no_safetensors() -> None:
    """accelerate reads it by torch.load, without mapping it: the weights are anonymous, and beside them what others hold of it."""
    spec = model_spec.read_spec(resolve.resolve("codegen-6b-mono"))
    shards = replace(spec, largest_file=("a file", GIB))
    card = profile(["RTX 3060 12GB"], ram=64 * GIB)
    plans = [planner(one, card).plan(case("fp16/dispatch", one)) for one in (spec, shards)]
    alone, several = (tier(plan, "cpu") for plan in plans)
    assert alone.load_anon_bytes - several.load_anon_bytes == pytest.approx(tier(plans[0], "gpu:0").weights_bytes - GIB, rel=0.02)
    assert several.anon_bytes > several.weights_bytes + GIB
    mapped = tier(planner(spec, card).plan(case("fp16/gpu+cpu", spec)), "cpu")
    assert mapped.anon_bytes < GIB


# ---- what a quantizer leaves as it is ---------------------------------------------------------------------------------


def derived(spec: ModelSpec) -> ModelSpec:
    """Return a model whose Linear are of a class of its own, as Falcon's are: bitsandbytes takes exactly Linear."""
    skeleton = spec.skeleton
    blocks = [replace(one, class_name="FalconLinear", linear=None) if one.linear else one for one in skeleton.blocks]
    return replace(spec, skeleton=replace(skeleton, blocks=type(skeleton.blocks)(blocks)))


@pytest.mark.parametrize("bf16", [True, False, None])
def test_a_model_of_which_nothing_is_quantized_is_as_fast_as_in_its_dtype(bf16: bool | None) -> None:
    spec = derived(model_spec.read_spec(resolve.resolve("qwen2.5-7b-instruct")))
    machine = replace(profile([], ram=64 * GIB), avx512_bf16=bf16)
    speeds = []
    for quantizer in (None, "int8", "int4", "fp4", "nf4-dq"):
        kept = Inventory(spec, WeightFormat(dtype="bfloat16", quantizer=quantizer))
        count = Footprint(kept, "cpu", Workload(), default())
        speeds.append(estimate.estimate(count, quantizer or "bf16", machine).decode_tok_s)
    assert speeds == speeds[:1] * 5


def test_every_row_that_names_constants_has_them_all() -> None:
    """What a scheme or an unpacking is `like` names constants of speed in `calibration.toml`: none may be missing."""
    stored = [one.like for one in UNPACKINGS.values()]
    unpacked = [*stored, "int4_unpacked"]
    packed = {one.like for one in SCHEMES.values()}
    wanted = {f"cpu_operations_per_linear_{like}" for like in (*packed, *unpacked)}
    wanted |= {f"gpu_operations_per_linear_{like}" for like in (*packed, *stored)}
    wanted |= {f"ram_bandwidth_share_{like}" for like in packed}
    wanted |= {f"unpacked_elements_per_core_s_{like}" for like in unpacked}
    assert wanted <= default().constants.keys()
