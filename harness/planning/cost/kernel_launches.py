"""How many operations the host starts for one token: what eager decoding at batch 1 waits for, besides the bytes it reads.

Counted with torch's dispatch mode in transformers 5.23 with torch 2.13, one cached step in bfloat16, on Llama, Qwen2, Qwen3,
GPT-NeoX, Gemma 2 and 3, CodeGen, GPT-2, OPT, Phi, BLOOM, Mixtral, Qwen2-MoE, Qwen3-MoE and DeepSeek-V3: the sum is within 10 % of
the count for most of them and within 25 % for all.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.architecture.skeleton import Block, Skeleton, reads_text
from harness.core.records import Record
from harness.planning.cost.memory import PLAIN_GELU

LINEAR = 4
LORA = 2  # a product and a sum beside the two Linears of each module that has one
# A norm with a bias is torch's one kernel; one without is written out: casts, square, mean, root, two products.
LAYER_NORM, RMS_NORM = 1, 8
# A layer beside its modules: views, cache, attention, activation, residuals; and where positions are turned into rotations.
LAYER, ROTARY = 20, 14
LATENT = 34  # keys and values of multi-head latent attention are split, expanded and joined again
WRITTEN_OUT = 26  # attention that is computed step by step, where a class has no SDPA
GELU = 8
ROUTER = 27  # scores, the best of them, sorting tokens by expert and back
TOKEN_LAUNCHES = 60  # generate itself: inputs, masks, logits processors, the choice
# Positions that enter as a bias of the scores: nothing rotates, and no second embedding says so.
_BIASED = frozenset(("bloom", "mpt"))


class Operations(Record, frozen=True, kw_only=True):
    """What one token starts: `linears` and of them `quantizable` as modules, products of single `experts`, and `others`."""

    linears: float
    quantizable: float
    experts: int
    others: float


def count(skeleton: Skeleton, adapted: int = 0) -> Operations:
    """Count what one token starts, from the blocks and how often each occurs, and with LoRA on `adapted` modules."""
    linears = quantizable = others = 0.0
    experts = routers = embeddings = 0
    for block, times in _occurrences(skeleton):
        if block.linear:
            linears += times
            quantizable += 0.0 if block.exempt else times
        elif _is_norm(block):
            others += times * (LAYER_NORM if any(tensor.name == "bias" for tensor in block.tensors) else RMS_NORM)
        elif "Embedding" in block.class_name and block.tensors and "Rotary" not in block.class_name:
            embeddings += 1
        stacks = [tensor for tensor in block.tensors if len(tensor.shape) == 3 and tensor.shape[0] == skeleton.experts > 0]
        products = sum(not tensor.name.endswith("bias") for tensor in stacks)
        experts += int(times) * skeleton.experts * products
        routers += int(times) * bool(products)
    return Operations(
        linears=linears + 2 * adapted,
        quantizable=quantizable,
        experts=experts,
        others=others
        + routers * ROUTER
        + _layers(skeleton, rotates=embeddings < 2 and skeleton.model_type not in _BIASED)
        + LORA * adapted
        + TOKEN_LAUNCHES,
    )


def _layers(skeleton: Skeleton, *, rotates: bool) -> int:
    """Count what layers do beside their modules."""
    each = LAYER
    each += ROTARY if rotates else 0
    each += WRITTEN_OUT if skeleton.eager else 0
    each += GELU if skeleton.model_type in PLAIN_GELU else 0
    latent = [kind.expanded is not None for kind in skeleton.attention]
    return sum(each + LATENT * latent[kind] for kind in skeleton.layers)


def _is_norm(block: Block) -> bool:
    return any(tensor.name == "weight" and len(tensor.shape) == 1 for tensor in block.tensors)


def _occurrences(skeleton: Skeleton) -> Iterator[tuple[Block, float]]:
    """Say how often a token passes each block: of experts that are modules of their own, those chosen alone; none that sees."""
    times = [0.0] * len(skeleton.blocks)
    times[-1] = 1.0
    chosen = skeleton.experts_per_token / skeleton.experts if skeleton.experts else 1.0
    for index in range(len(times) - 1, -1, -1):
        block = skeleton.blocks[index]
        yield block, times[index]
        for child in block.children:
            share = (
                0.0
                if not reads_text(child.name)
                else chosen
                if child.name == "experts" and not skeleton.blocks[child.block].tensors
                else 1.0
            )
            times[child.block] += times[index] * child.count * share
