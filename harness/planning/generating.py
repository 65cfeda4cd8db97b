"""Why a model does not generate as a case asks for: with its KV cache in a form, by an implementation of attention, in parts."""

from __future__ import annotations

from harness.architecture.model_spec import ModelSpec
from harness.core.attention import ATTENTIONS, GROUP, KV_FORMS, Implementation, lacks, own_attention
from harness.core.placements import Placement
from harness.core.precisions import PRECISIONS
from harness.core.records import USUAL_KV, Case, Machine, Verdict
from harness.planning.device_map.experts import experts_of

# Classes whose `generate` makes no Cache (transformers 5.24, `_supports_default_dynamic_cache`).
NO_CACHE = frozenset(("ReformerModelWithLMHead", "MiniMaxForCausalLM", "XLNetLMHeadModel", "RwkvForCausalLM", "xLSTMForCausalLM"))


def generating_refusal(spec: ModelSpec, machine: Machine, case: Case, placement: Placement) -> tuple[Verdict, str] | None:
    """Say why a model does not keep its KV cache, or compute attention, as a case asks for; None if it does."""
    return (
        _experts_refusal(spec, case, placement)
        or _kv_refusal(spec, machine, case, placement)
        or _attention_refusal(spec, machine, case, placement)
    )


def _experts_refusal(spec: ModelSpec, case: Case, placement: Placement) -> tuple[Verdict, str] | None:
    """Say why routed experts cannot stay behind in RAM; None if they can."""
    if not placement.experts_in_ram:
        return None
    if not experts_of(spec.skeleton):
        return Verdict.INVALID, f"{spec.skeleton.model_class} has no routed experts that could stay in RAM: take gpu+cpu"
    if PRECISIONS[case.precision].scheme is not None or spec.packed is not None or spec.gguf is not None:
        return Verdict.INVALID, f"experts stay in RAM as they are computed, and {case.precision} packs weights for one device"
    return None


def _kv_refusal(spec: ModelSpec, machine: Machine, case: Case, placement: Placement) -> tuple[Verdict, str] | None:
    """Say why transformers keeps the KV cache of this model in no such form; None if it does."""
    form, found = KV_FORMS[case.kv], spec.skeleton
    if case.kv == USUAL_KV:
        return None
    if found.model_class in NO_CACHE:
        return Verdict.INVALID, f"{found.model_class} keeps what it remembers in a way of its own, not in a KV cache: drop --kv"
    if form.in_ram and "gpu" not in placement.devices:
        return Verdict.INVALID, f"with placement {placement.name} the KV cache lies in RAM already: drop --kv {form.name}"
    if form.in_ram and not machine.gpus:
        why = machine.gpu_problem or "no NVIDIA GPU detected"
        return Verdict.UNAVAILABLE, f"--kv {form.name} brings the KV cache from RAM to a GPU: {why}"
    odd = next((kind for kind in found.attention if kind.window or kind.keeps_state), None)
    if form.full_attention_only and odd is not None:
        has = f"a sliding window of {odd.window:,} tokens" if odd.window else "states of fixed size"
        what = f"transformers quantizes the KV cache of full attention alone, and {found.model_class} has layers with {has}"
        return Verdict.INVALID, f"{what}: drop --kv {form.name}"
    widths = [kind.heads * size for kind in found.attention for size in (kind.key_dim, kind.value_dim) if size]
    if form.grouped and any(width % GROUP for width in widths):
        what = f"{form.title} shares a scale among {GROUP} elements, and keys and values have {min(widths):,} in a token"
        return Verdict.INVALID, f"{what}: take --kv fp8 or leave it"
    odd_groups = [width // GROUP for width in widths if case.workload.batch * width // GROUP % 2]
    if form.in_pairs and odd_groups:
        what = (
            f"{form.title} packs groups of {GROUP} elements in pairs, and a token has {odd_groups[0]}: odd prompts end in an error"
        )
        return Verdict.INVALID, f"{what}: take --kv hqq-int8 or quanto-int4"
    return None


def _attention_refusal(spec: ModelSpec, machine: Machine, case: Case, placement: Placement) -> tuple[Verdict, str] | None:
    """Say why a model does not compute attention so, or this machine does not; None if both do."""
    asked = case.attention or own_attention(spec.config)
    refused = attention_fault(spec, machine, case, placement, ATTENTIONS[asked]) if asked else None
    if refused is None or case.attention is not None:
        return refused
    return refused[0], f"config.json asks for {asked}, and {refused[1]}: take --attention sdpa"


def attention_fault(
    spec: ModelSpec, machine: Machine, case: Case, placement: Placement, row: Implementation
) -> tuple[Verdict, str] | None:
    """Say what of a model, a machine or a case an implementation of attention does not take; None if it takes all."""
    found = spec.skeleton
    if spec.native:
        return Verdict.INVALID, f"{found.model_class} has attention of its own: drop --attention {row.name}"
    if lacks(found.model_class, row.name):
        return Verdict.INVALID, f"{found.model_class} of transformers has no {row.name}: take --attention eager or leave it"
    if row.gpu_only and not (machine.gpus and "gpu" in placement.devices):
        why = "no part of this case" if machine.gpus else machine.gpu_problem or "no NVIDIA GPU detected"
        return Verdict.INVALID if machine.gpus else Verdict.UNAVAILABLE, f"{row.name} runs on NVIDIA GPUs alone: {why}"
    old = [gpu for gpu in machine.gpus if float(gpu.compute_capability or "inf") < row.least_capability]
    if old:
        has = f"{old[0].model or old[0].name} has {old[0].compute_capability}"
        return Verdict.UNAVAILABLE, f"{row.name} needs compute capability {row.least_capability}, and {has}"
    width = max((max(kind.key_dim, kind.value_dim) for kind in found.attention), default=0)
    if row.most_head_dim is not None and width > row.most_head_dim:
        return Verdict.INVALID, f"{row.name} takes heads of {row.most_head_dim} at most, and {found.model_class} has {width}"
    dtype = spec.adapted(PRECISIONS[case.precision]).dtype
    if row.dtypes and dtype not in row.dtypes:
        return Verdict.INVALID, f"{row.name} computes in {' or '.join(row.dtypes)}, and {case.precision} in {dtype}"
    return None
