"""What a forward pass allocates beside weights and KV cache: the largest of a few moments, each a sum of live tensors.

The moments and their tensors were read from transformers' code as it ran on fake tensors of a GPU, every storage counted
(`tests/data/traced_peaks.csv`, held against them by `tests/planning/test_activations.py`). B is the batch, S the prompt, T = B S;
H the hidden size, I the width of the MLP, W = heads x width of a head, k experts of width w chosen for a token; e bytes an element.
Kernels' own temporaries (cuBLAS's workspace, a sort) are not in it.
"""

from __future__ import annotations

from msgspec.structs import replace

from harness.architecture.skeleton import Skeleton, is_stacked
from harness.core.families import FAMILIES
from harness.core.methods.kernels import PackedProduct
from harness.core.quantizers import SCHEMES, UNPACKINGS
from harness.core.records import Workload
from harness.planning.cost.memory import PLAIN_GELU, WeightFormat, kv_bytes

# Who computes queries, keys and scores in float32 whatever the dtype, and who keeps even the softmax in the dtype.
FP32_SCORES = frozenset(("codegen", "gpt_neo", "gptj", *(name for name, family in FAMILIES.items() if family.fp32_scores)))
PLAIN_SOFTMAX = frozenset(("gpt_oss",))
# Routers in float32: two of the four copies that joining the experts' outputs makes are in float32 too.
FP32_ROUTER = frozenset(("deepseek_v2", "deepseek_v3", "glm4_moe"))
# A prompt that is read both ways takes a mask for every sequence; these models keep the input of a layer, scaled, as well.
PREFIX_MASK = frozenset(name for name, family in FAMILIES.items() if family.prefix_mask)
# Up to so many rows bitsandbytes multiplies 4-bit weights as they are; more are multiplied with an unpacked copy.
_ROWS_UNPACKED_BEYOND = 4
_PAIR_BYTES = 18  # of a token and an expert: two orders, where its product goes, and its weight
_INDICES_BYTES = 24  # a token's id, position and mask, 8 bytes each


class Activations:
    """The activations of one model in one weight format on one kind of device ("gpu" or "cpu"), which may have flash attention."""

    def __init__(
        self, skeleton: Skeleton, fmt: WeightFormat, device: str, product: PackedProduct | None = None, *, flash: bool = True
    ) -> None:
        self._flash = flash and fmt.element_bytes < 4
        self.skeleton, self.device, self.element, self._product = skeleton, device, fmt.element_bytes, product
        self._fmt = fmt
        self.hidden, self.inner, self.heads = skeleton.hidden_size, skeleton.intermediate_size, skeleton.heads
        self._fused, self._gated = _gate_of_mlp(skeleton)
        self._windows = {kind.window for kind in skeleton.attention}
        self._mask_kinds = len(self._windows)
        self._window = min((window for window in self._windows if window), default=None)
        self._head_dim = max((kind.key_dim for kind in skeleton.attention if kind.expanded is None), default=0)
        self._head_dim = self._head_dim or self.hidden // max(1, self.heads)
        self._grouped = any(0 < kind.heads < self.heads and kind.expanded is None for kind in skeleton.attention)
        linears = [weight.tensor.shape for weight, _ in skeleton.tally if weight.quantizes and len(weight.tensor.shape) == 2]
        self.largest = max((rows * columns for rows, columns in linears), default=0)
        self._stacked = any(is_stacked(weight) for weight, _ in skeleton.tally)
        self._unpacking = UNPACKINGS[fmt.unpacking] if fmt.unpacking else None
        self._phases: dict[Workload, tuple[int, int]] = {}

    def bytes(self, workload: Workload) -> int:
        """Return the most that generating holds beside weights and the final KV cache, in bytes."""
        return max(self.phases(workload))

    def phases(self, workload: Workload) -> tuple[int, int]:
        """Return what is held beside weights and the final KV cache while the prompt is read, and in the steps after it."""
        if workload not in self._phases:  # every placement and KV cache asks for the same
            kept, prefill = self.prompt_kept(workload), max(self.prefill_moments(workload).values())
            decode = max(self.decode(workload.batch), self.logits(workload.batch))
            self._phases[workload] = kept + prefill, kept + decode
        return self._phases[workload]

    def prompt_kept(self, workload: Workload) -> int:
        """Return the bytes by which the KV cache after the prompt exceeds the final one.

        A layer with a sliding window keeps a slice of the keys and values of the whole prompt, whose storage stays whole until the
        next token (`DynamicSlidingWindowLayer.update` of transformers 5), on every layer at once.
        """
        tokens, batch = workload.prompt_tokens, workload.batch
        whole = sum(kv_bytes(self.skeleton, tokens, batch, self.element, windows=False))
        return max(0, whole - sum(kv_bytes(self.skeleton, workload.cached_tokens, batch, self.element)))

    def prefill_moments(self, workload: Workload) -> dict[str, int]:
        """Return the bytes of each moment that may be the peak while the prompt is read, by what is computed then."""
        batch, prompt = workload.batch, workload.prompt_tokens
        tokens = batch * prompt
        around = tokens * self._around
        masks = self._mask(batch, prompt)
        moments = {"attention": around + tokens * self._attention + masks["attention"] + self._scores(batch, prompt)}
        if self.skeleton.experts:
            moments["experts"] = around + masks["between"] + tokens * self._experts
        if not self.skeleton.experts or self._has_dense_mlp:
            moments["mlp"] = around + masks["between"] + tokens * self._mlp
        moments["linear"] = around + masks["between"] + self._linear(tokens)
        return moments

    def decode(self, batch: int) -> int:
        """Return the bytes of one decode step.

        Off the CPU generate() switches experts from grouped_mm to batched_mm, which copies the weights of the experts chosen for
        each sequence (`_optimize_model_for_decode`): batch x k x 3 x H x w elements.
        """
        step = batch * (self._around + max(self._mlp, self._attention)) + self.unpacked(batch)
        if not (self.skeleton.experts and self._stacked) or self.device == "cpu" or self.packs_experts:
            return step
        chosen = batch * max(1, self.skeleton.experts_per_token)
        return step + chosen * 3 * self.hidden * expert_width(self.skeleton) * self.element

    def logits(self, batch: int) -> int:
        """Return the bytes of the logits of the last token (transformers 4.45 and later), and of generate's two float32 copies."""
        return batch * self.skeleton.vocab_size * (self.element + 2 * 4)

    def unpacked(self, rows: int) -> int:
        """Return the bytes that one Linear is unpacked to that is kept packed, for this many rows of input."""
        if self._product is not None:
            return self._product.temporary_bytes(self.largest, self.hidden, rows)
        if self.packs_experts:
            return 0
        if self._unpacking is not None:
            return self._unpacking.temporary_bytes(self.largest, self.device, rows)
        if self._fmt.quantizer is not None and SCHEMES[self._fmt.quantizer].as_packed and self.device == "gpu":
            return 0
        if self._fmt.quantizer is None and self._fmt.packed_bits is None:
            return 0
        by_rows = self.device == "gpu" and self._fmt.quantizer in ("int4", "fp4", "nf4-dq")
        return 0 if by_rows and rows <= _ROWS_UNPACKED_BEYOND else self.largest * self.element

    @property
    def _around(self) -> int:
        """Bytes a token of what every moment holds: the layer's input and residual, cosines and sines, indices."""
        return 2 * self.hidden * self.element + self._mask_kinds * 2 * self._head_dim * self.element + _INDICES_BYTES

    @property
    def _prefix(self) -> bool:
        return self.skeleton.model_type in PREFIX_MASK

    @property
    def _has_dense_mlp(self) -> bool:
        """Whether a model with experts has layers without, or experts beside the routed ones that are wider than those chosen."""
        return self.inner > expert_width(self.skeleton) * max(1, self.skeleton.experts_per_token)

    @property
    def _beside(self) -> int:
        """Elements that the MLP holds beside its inner width: norm and output, and a scaled input if there is one."""
        return (3 if self._prefix else 2) * self.hidden

    @property
    def _mlp(self) -> int:
        """Bytes a token of the MLP.

        Gate, up and their product: 3 I. Where both come of one Linear their halves are views of it: 4 I. Without a gate 2 I, or 4 I
        where GELU is written out.
        """
        widths = 4 if self._fused else 3 if self._gated else 4 if self.skeleton.model_type in PLAIN_GELU else 2
        return (self._beside + widths * self.inner) * self.element

    @property
    def packs_experts(self) -> bool:
        """Whether a GPU multiplies stacked experts as they are stored, with nothing else packed: MXFP4."""
        return self._fmt.packed_experts and not self._fmt.packed_linears and self.device == "gpu"

    @property
    def _experts(self) -> int:
        """Bytes a token of routed experts: while they compute 4 k w + k H, or while their outputs are joined four copies of k H.

        Packed in MXFP4 their activations and outputs: k w + k H, the sum of these, H, and the order of the pairs
        (`harness.worker.trace.quantized_kernels`).
        """
        chosen = max(1, self.skeleton.experts_per_token)
        if self.packs_experts:
            pairs = chosen * (expert_width(self.skeleton) + self.hidden) * self.element + chosen * _PAIR_BYTES
            return (self._beside - self.hidden) * self.element + pairs + self.hidden * self.element
        computing = 4 * expert_width(self.skeleton) * chosen * self.element + chosen * self.hidden * self.element
        wide = 4 if self.skeleton.model_type in FP32_ROUTER else self.element
        joining = chosen * self.hidden * (2 * self.element + 2 * wide)
        return self._beside * self.element + max(computing, joining)

    @property
    def _attention(self) -> int:
        """Bytes a token of attention: query, key and value for every head, the output; float32 copies where scores are in it."""
        width = self.heads * self._head_dim
        if self.skeleton.model_type in FP32_SCORES:
            return 2 * 4 * width + 7 * width * self.element
        more = 1 if self._prefix else 0
        return (4 * width + more * self.hidden) * self.element

    def _mask(self, batch: int, prompt: int) -> dict[str, int]:
        """Return the bytes of masks between attentions and while one is computed.

        sdpa needs none unless a window is shorter than the prompt, or a prefix is read both ways: then a bool for each pair of
        tokens, of which attention makes a copy in the dtype for each sequence, padded keys and values beside it.
        """
        pairs = prompt * prompt
        if self.skeleton.eager:
            made = batch * pairs * self.element * self._mask_kinds
            return {"between": made, "attention": made}
        if self._prefix:
            return {"between": batch * pairs, "attention": batch * (pairs * (1 + self.element) + prompt * self._repeated)}
        if self._window is None or prompt < self._window:
            return {"between": 0, "attention": 0}
        return {"between": pairs, "attention": pairs * (1 + batch * self.element) + batch * prompt * self._repeated}

    @property
    def _repeated(self) -> int:
        """Bytes a token that memory-efficient attention takes beside what flash takes.

        It cannot group heads, so one more tensor of the full width is alive; above 128 wide it sums up in float32.
        """
        width = self.heads * self._head_dim
        return width * self.element + (4 * width if self._head_dim > 128 else 0)

    def _scores(self, batch: int, prompt: int) -> int:
        """Return the bytes of attention written out: scores, their softmax in float32, its copy in the dtype.

        A GPU casts float16 inside the softmax (4 + 2 e bytes a score), bfloat16 before it (10); GPT-OSS stays in the dtype (3 e).
        SDPA writes attention out as well, in float32, where heads are grouped and no mask makes transformers repeat them: flash
        takes 16 bits and no card before 8.0, memory-efficient attention no groups (ATen's sdp_utils.cpp). Its mask is one for
        all; keys are repeated, and of 16 bits queries and values cast as well.
        """
        if not self.skeleton.eager:
            plain = not self._prefix and any(window is None or prompt < window for window in self._windows)
            written_out = self._grouped and not self._flash and self.device == "gpu" and plain
            copies = batch * prompt * self.heads * self._head_dim * (1 if self.element == 4 else 3)
            return ((2 * batch * self.heads + 1) * prompt * prompt + copies) * 4 if written_out else 0
        if self.skeleton.model_type in PLAIN_SOFTMAX:
            each = 3 * self.element
        elif self.element == 4:
            each = 8
        else:
            fuses = self._fmt.dtype == "float16" and self.device == "gpu" and self.skeleton.model_type not in FP32_SCORES
            each = 4 + 2 * self.element if fuses else 8 + self.element
        return batch * self.heads * prompt * prompt * each

    def _linear(self, tokens: int) -> int:
        """Return the bytes of the widest Linear at work: its product, the other half of the gate, and what unpacking takes.

        int8 on a GPU quantizes the input (1 byte) and makes an int32 and a float16 of each output, and a bfloat16 if that is asked.
        """
        rows = self.inner * (2 if self._fused else 1)
        sibling = self.inner * self.element if self._gated and not self._fused else 0
        each = self._beside * self.element + sibling
        if self._fmt.quantizer == "int8" and self.device == "gpu":
            return tokens * (each + rows * (6 if self._fmt.dtype == "float16" else 8) + self.hidden)
        return tokens * (each + rows * self.element) + self.unpacked(tokens)


def with_attention(skeleton: Skeleton, attention: str | None) -> Skeleton:
    """Return a model with the implementation of attention that is asked for; None is what transformers chooses."""
    return skeleton if attention is None else replace(skeleton, eager=attention == "eager")


def expert_width(skeleton: Skeleton) -> int:
    """Return the inner width of one expert: from its stacked weights, [experts, hidden, width] either way round."""
    for weight, _ in skeleton.tally:
        if weight.path.endswith("experts.down_proj"):
            inner = [size for size in weight.tensor.shape[1:] if size != skeleton.hidden_size]
            return inner[0] if inner else skeleton.hidden_size
    return skeleton.intermediate_size


def _gate_of_mlp(skeleton: Skeleton) -> tuple[bool, bool]:
    """Return (fused, gated): whether gate and up come of one Linear of twice the inner width, and whether there is a gate."""
    inner = skeleton.intermediate_size
    fused = gated = False
    for block in skeleton.blocks:
        children = [skeleton.blocks[child.block] for child in block.children]
        rows = [child.tensors[0].shape[0] for child in children if child.linear == "linear" and child.tensors]
        fused |= 2 * inner in rows and inner not in rows
        gated |= rows.count(inner) > 1
    return fused, gated or fused
