"""Tensor parallelism: which models transformers can share among processes, a GPU for each, and what lies in each of them.

transformers 5.24 shares by a plan that an architecture's config has (`base_model_tp_plan`): with tp_plan="auto" every matrix is
cut evenly, embedding and head too, and everything else is whole in each process. Some matrices stay whole as well: those of
WHOLE, and a few small ones (routers, latent projections) which here count as cut.
"""

from __future__ import annotations

from collections.abc import Mapping

from harness.architecture.skeleton import Skeleton, Weight

# model_type of every causal language model of transformers 5.24 whose config has such a plan.
_NAMES = """
    afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba beam codegen cohere cohere2
    cohere2_moe cohere_compass_text cwm deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dory dots1
    dots3_note_text ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1 flex_olmo flint gemma gemma2 gemma3_text
    gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_neox gpt_oss gptj
    granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_loop_text inkling2_text inkling_text internlm3 iquestcoder jais2
    jamba kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4 llama4_text longcat_flash mellum
    mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral nanochat
    nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3
    qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp_text sarvam_mla sarvam_moe seed_oss smollm3
    solar_open starcoder2 vaultgemma youtu
"""
SHARED = frozenset(_NAMES.split())


# Matrices that are cut along their rows ("rowwise" in these plans) by the last part of their modules' names: such a part lies in
# the file in pieces, so that it is copied where the parts of others stay views of the file.
ROWWISE = frozenset(("c_proj", "dense", "dense_4h_to_h", "down_proj", "dt_proj", "fc2", "fc_out", "o_proj", "out_proj"))


# Modules that are whole in each process, by model_type, as loading tiny models of them shows. Others may have some too.
_ATTENTION = "self_attn"
WHOLE: Mapping[str, frozenset[str]] = {
    "qwen2_moe": frozenset(("shared_expert",)),
    "deepseek_v3": frozenset((_ATTENTION,)),
}


def refusal(skeleton: Skeleton, ranks: int, among: str = "GPUs") -> str | None:
    """Say why transformers does not share a model among `ranks` GPUs (or processes, as `among` says); None if it does."""
    if skeleton.model_type not in SHARED:
        return f"transformers has no plan to share {skeleton.model_class} among {among} (no base_model_tp_plan in its config)"
    heads = {skeleton.heads, *(kind.heads for kind in skeleton.attention if kind.expanded is None)} - {0}
    odd = sorted(count for count in heads if count % ranks)
    if odd:
        return f"{ranks} {among} cannot share {odd[0]} attention heads evenly"
    return None


def is_cut(weight: Weight, skeleton: Skeleton) -> bool:
    """Say whether a tensor is cut among processes rather than whole in each."""
    whole = WHOLE.get(skeleton.model_type, frozenset())
    return weight.tensor.kind == "parameter" and len(weight.tensor.shape) > 1 and whole.isdisjoint(weight.path.split("."))


def cuts_cache(skeleton: Skeleton) -> bool:
    """Say whether each process caches keys and values of its own heads alone."""
    return _ATTENTION not in WHOLE.get(skeleton.model_type, ())


def is_copied(weight: Weight, skeleton: Skeleton) -> bool:
    """Say whether the parts of a tensor can be no views of the file."""
    return is_cut(weight, skeleton) and not ROWWISE.isdisjoint(weight.path.split(".")[-2:-1])
