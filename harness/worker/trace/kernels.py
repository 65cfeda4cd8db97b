"""KERNELS: which kernel a card takes for scaled dot product attention; RULES: what kernels allocate that fakes do not show.

Sources: ATen/native/transformers/cuda/sdp_utils.cpp and attention.cu of torch 2.13, backends/cuda/ops.py of bitsandbytes 0.50.
What a kernel takes only under a condition is noted under its name (`Ledger.only_if`): "unaligned" where the keys are no multiple
of 16, "unpack N K" where bitsandbytes unpacks a weight of that shape (`harness.architecture.traced_memory.Condition`).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 its usual name

from harness.architecture.card_kernels import FLASH_SINCE, CardKernels
from harness.architecture.traced_memory import UNALIGNED, UNALIGNED_WIDE
from harness.worker.trace.ledger import Ledger, swapped
from harness.worker.trace.quantized_kernels import in_place_of_hub_kernels, in_place_of_packages

_aten = torch.ops.aten
MASK_ALIGNMENT = 16  # keys in a bias of the memory-efficient kernel: pad_bias<16> in sdp_utils
WIDEST_ACCUMULATED = (
    128  # wider values are accumulated in float32 in memory (mem_eff_attention/kernel_forward.h, kNeedsOutputAccumulatorBuffer)
)
_HALVES = (torch.float16, torch.bfloat16)


class Kernel(NamedTuple):
    """One row: from which compute capability on, by dtype, and what it takes; tried in order.

    `grouped`: key and value may have fewer heads. `multiple`: of which the widths of the heads must be a multiple in 16 bits, on
    cards with flash attention in 32; flash pads instead.
    """

    name: str
    since: Mapping[torch.dtype, tuple[int, int]]
    masked: bool
    grouped: bool
    widest: int
    one_width: bool
    multiple: tuple[int, int] | None


# check_prefer_cudnn_attention, can_use_*_attention; grouped heads in the memory-efficient kernel are not in torch 2.13.
_FLASH = dict.fromkeys(_HALVES, FLASH_SINCE)
_EFFICIENT = {torch.float16: (5, 0), torch.bfloat16: (8, 0), torch.float32: (5, 0)}
KERNELS = (
    Kernel("cudnn", _FLASH, masked=True, grouped=True, widest=128, one_width=False, multiple=(8, 8)),
    Kernel("flash", _FLASH, masked=False, grouped=True, widest=256, one_width=True, multiple=None),
    Kernel("efficient", _EFFICIENT, masked=True, grouped=False, widest=1 << 16, one_width=False, multiple=(8, 4)),
)


def choose_kernel(query: Any, key: Any, value: Any, mask: Any, card: CardKernels) -> str:
    """Name the kernel that CUDA takes for these tensors [batch, heads, tokens, width]; "math" is attention written out."""
    widths = query.shape[-1], value.shape[-1]
    grouped = not query.shape[1] == key.shape[1] == value.shape[1]
    for kernel in KERNELS:
        since = kernel.since.get(query.dtype)
        if since is None or card.capability < since or (mask is not None and not kernel.masked) or (grouped and not kernel.grouped):
            continue
        if max(widths) > kernel.widest or (kernel.one_width and widths[0] != widths[1]):
            continue
        if kernel.multiple and any(width % kernel.multiple[query.dtype not in _HALVES] for width in widths):
            continue
        if kernel.name == "cudnn" and (not card.takes_cudnn or key.shape[-2] == 1):
            continue
        return kernel.name
    return "math"


class AttentionCall:
    """Stands for F.scaled_dot_product_attention on a fake card; `whole`: whatever the size, take what an unaligned one takes."""

    def __init__(self, ledger: Ledger, card: CardKernels, whole: bool) -> None:
        self._ledger, self._card, self._whole = ledger, card, whole
        self._own = F.scaled_dot_product_attention

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if query.device.type != "cuda":
            more: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
            return self._own(query, key, value, attn_mask=attn_mask, **more)
        kernel = choose_kernel(query, key, value, attn_mask, self._card)
        mask = _additive(attn_mask, query.dtype)
        trains = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        if kernel == "cudnn" and trains:  # which keeps a sum of each row for backward
            return _cudnn(query, key, value, mask, is_causal, scale)
        if kernel == "cudnn":
            return query.new_empty((*query.shape[:-1], value.shape[-1]))  # it takes masks as they are, broadcast, and grouped heads
        if kernel == "flash":
            return _flash(query, key, value, is_causal, scale)
        if kernel == "efficient":
            return self._efficient(query, key, value, mask, (is_causal, scale, trains))
        out: torch.Tensor = _aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return out

    def _efficient(self, query: Any, key: Any, value: Any, mask: Any, how: tuple[bool, float | None, bool]) -> torch.Tensor:
        is_causal, scale, trains = how
        if mask is not None:
            wide = max(query.shape[-1], value.shape[-1]) > KERNELS[0].widest
            mask, _spare = self._padded(mask, UNALIGNED_WIDE if wide else UNALIGNED)  # both are there until the kernel is done
            mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        out: torch.Tensor = _aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, trains, 0.0, is_causal, scale=scale
        )[0]
        if value.shape[-1] > WIDEST_ACCUMULATED and query.dtype is not torch.float32:
            self._ledger.temporary(out.numel() * 4, "accumulator of attention")
        return out

    def _padded(self, mask: torch.Tensor, condition: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a mask whose rows are aligned, and the one that it was copied from or as good as nothing."""
        keys = mask.shape[-1]
        over = MASK_ALIGNMENT if self._whole else (-keys) % MASK_ALIGNMENT  # in records the most, so that sizes are polynomials
        with self._ledger.only_if(condition):
            if not over and not self._whole:
                return mask, mask.new_empty(0)
            return mask.new_empty((*mask.shape[:-1], keys + over))[..., :keys].copy_(mask), mask


def _flash_package(ledger: Ledger) -> Callable[..., Any]:
    """Stand for what transformers imports of the package flash-attn: its kernels allocate the result and a sum for each row."""

    def attend(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        with swapped(ledger, "_operator", "flash_attn"):
            sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
        del sums
        return out

    return lambda *_, **__: ((attend, attend, None, None, None), (lambda **_: {}, None))


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Turn a mask of bools into one to add, as convert_boolean_attn_mask does."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    nothing = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, nothing, torch.full((), -math.inf, dtype=dtype, device=mask.device))


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None) -> torch.Tensor:
    width = query.shape[-1]
    factor = scale if scale is not None else 1 / math.sqrt(width)
    if width % 8:
        query, key, value = (F.pad(part, (0, 8 - width % 8)) for part in (query, key, value))
    out: torch.Tensor = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=factor)[0]
    return out[..., :width]


def _cudnn(query: Any, key: Any, value: Any, mask: Any, is_causal: bool, scale: float | None) -> torch.Tensor:
    out: torch.Tensor = _aten._scaled_dot_product_cudnn_attention(
        query, key, value, mask, True, 0.0, is_causal, False, scale=scale
    )[0]
    return out


def _flash_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:  # noqa: ARG001
    """Do _scaled_dot_product_flash_attention_backward.

    It sums up in float32, and takes keys and values of every head where heads are grouped (flash_attn/flash_api.cpp, mha_bwd).
    """
    batch, heads, tokens, width = query.shape
    rows, columns = -(-tokens // 128) * 128, -(-width // 32) * 32
    made = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    sums = [query.new_empty((batch, heads, rows), dtype=torch.float32)]
    sums.append(query.new_empty((batch, rows, heads, columns), dtype=torch.float32))
    if key.shape[1] != heads:
        sums += [key.new_empty((batch, key.shape[2], heads, width)) for _ in range(2)]
    del sums
    return made


# How bitsandbytes decides whether to unpack a weight: (dtype, rows of the input, outputs, inputs, card) -> it does not.
@functools.cache
def _multiplies_packed() -> Callable[[torch.dtype, int, int, int, CardKernels], bool]:
    """Take bitsandbytes' own heuristic out of its backend for CUDA, which cannot be imported where its library has no CUDA.

    Versions before 0.49 have none: they multiplied packed weights with one row alone.
    """
    from bitsandbytes import _ops

    source = Path(inspect.getfile(_ops)).parent / "backends" / "cuda" / "ops.py"
    card: list[CardKernels] = []
    names: dict[str, Any] = {"torch": torch, "_gpu_dispatch_props": lambda _: (card[0].processors, *card[0].capability)}
    wanted = "_gemm_4bit_use_custom_cuda"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        constant = isinstance(node, ast.Assign) and str(getattr(node.targets[0], "id", "")).startswith("_GEMM_4BIT")
        if isinstance(node, ast.FunctionDef) and node.name == wanted:
            node.decorator_list = []
        elif not constant:
            continue
        exec(compile(ast.Module([node], []), str(source), "exec"), names)  # a function of the library that is installed
    if wanted not in names:
        return lambda dtype, rows, outputs, inputs, of: rows == 1  # noqa: ARG005

    def packed(dtype: torch.dtype, rows: int, outputs: int, inputs: int, of: CardKernels) -> bool:
        card[:] = [of]
        return rows <= MOST_PACKED_ROWS and bool(names[wanted](0, dtype, rows, outputs, inputs))

    return packed


MOST_PACKED_ROWS = 1536  # bitsandbytes' _gemm_4bit_custom_max_m for CUDA
NF4_BLOCK_WEIGHTS = 64  # inputs that are no multiple of a block of scales are unpacked at any size


def packed_rows(dtype: torch.dtype, outputs: int, inputs: int, card: CardKernels) -> list[tuple[int, int]]:
    """Return the ranges of rows (first, last) for which a card multiplies a 4-bit weight as it is, without unpacking it."""
    if inputs % NF4_BLOCK_WEIGHTS:
        return []
    heuristic, runs = _multiplies_packed(), list[tuple[int, int]]()
    for rows in range(1, MOST_PACKED_ROWS + 1):
        if not heuristic(dtype, rows, outputs, inputs, card):
            continue
        runs = [*runs[:-1], (runs[-1][0], rows)] if runs and runs[-1][1] == rows - 1 else [*runs, (rows, rows)]
    return runs


class _Bitsandbytes:
    """What its kernels for CUDA allocate between their input and their result; its own fakes give the results alone."""

    def __init__(self, ledger: Ledger, card: CardKernels, whole: bool) -> None:
        self._ledger, self._card, self._whole = ledger, card, whole

    def quantize(self, inputs: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Do int8_vectorwise_quant: no outliers are taken to be there."""
        statistics = torch.empty(inputs.numel() // inputs.shape[-1], device=inputs.device, dtype=torch.float32)
        out = torch.empty(inputs.shape, device=inputs.device, dtype=torch.int8)
        columns = None
        if threshold > 0.0:
            outliers = inputs.abs() >= threshold
            columns = torch.empty(0, device=inputs.device, dtype=torch.int64)
            del outliers
        return out, statistics, columns

    def multiply(self, given: Any, weight: Any, rows: Any, columns: Any, bias: Any = None, dtype: Any = None) -> torch.Tensor:
        """Do int8_scaled_mm: a product in int32, its result in float16, a cast of that."""
        product = torch.empty((*given.shape[:-1], weight.shape[0]), device=given.device, dtype=torch.int32)
        return self.dequantize(product, rows, columns, dtype, bias)

    def dequantize(self, product: Any, rows: Any, columns: Any, dtype: Any = None, bias: Any = None) -> torch.Tensor:  # noqa: ARG002
        """Do int8_mm_dequant: its kernel writes float16."""
        out = torch.empty_like(product, dtype=torch.float16)
        if bias is not None and bias.dtype != torch.float16:
            out.add_(bias)
        return out.to(dtype or torch.float16)

    def mixed(self, given: Any, packed: Any, weight: Any, *stats: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Do int8_mixed_scaled_mm without outliers: (rows, columns, outlier columns, bias) follow the weight."""
        rows, columns, _, bias = (*stats, None, None)[:4]
        return self.multiply(packed, weight, rows, columns, bias, given.dtype), given.new_empty(0)

    def multiply_4bit(
        self, given: Any, weight: Any, shape: Any, absmax: Any, blocksize: int, kind: str, bias: Any = None, *nested: Any
    ) -> torch.Tensor:
        """Do gemm_4bit: the weight as it is, or unpacked first, as the heuristic says."""
        outputs, inputs = shape
        rows = given.numel() // inputs
        unpacks = self._whole or inputs % blocksize or not _multiplies_packed()(given.dtype, rows, outputs, inputs, self._card)
        with self._ledger.only_if(f"unpack {outputs} {inputs}"):
            scales = torch.empty(nested[0].shape if unpacks and nested and nested[0] is not None else 0, device=given.device)
            unpacked = torch.empty((outputs, inputs) if unpacks else 0, device=given.device, dtype=given.dtype)
        out = torch.empty((*given.shape[:-1], outputs), device=given.device, dtype=given.dtype)
        del scales, unpacked, weight, absmax, kind, bias
        return out


def _grouped(left: Any, right: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> torch.Tensor:  # noqa: ARG001
    """Do _grouped_mm: torch's fake takes bfloat16 alone, its kernel 16 and 32 bits."""
    return torch.empty((left.shape[0], right.shape[-1]), dtype=out_dtype or left.dtype, device=left.device)


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Do equal, which compares element by element (ATen/native/cuda/Equal.cpp): of unknown values it is said that they are."""
    _aten.all.default(_aten.eq.Tensor(left, right))
    return True


def rules(ledger: Ledger, card: CardKernels, whole: bool) -> dict[Any, Callable[..., Any]]:
    """Return the table for `Ledger`; `whole`: take what a kernel takes only under a condition whether or not that holds."""
    found: dict[Any, Callable[..., Any]] = {_aten._grouped_mm.default: _grouped, _aten.equal.default: _equal}
    found[_aten._scaled_dot_product_flash_attention_backward.default] = _flash_backward
    try:
        import bitsandbytes  # noqa: F401 registers its operators
    except ImportError:
        return found
    theirs, own = torch.ops.bitsandbytes, _Bitsandbytes(ledger, card, whole)
    named: dict[str, Callable[..., Any]] = {
        "int8_vectorwise_quant": own.quantize,
        "int8_scaled_mm": own.multiply,
        "int8_mm_dequant": own.dequantize,
        "int8_mixed_scaled_mm": own.mixed,
        "gemm_4bit": own.multiply_4bit,
    }
    return found | {getattr(theirs, name).default: rule for name, rule in named.items() if hasattr(theirs, name)}


@contextlib.contextmanager
def chosen_as_on(card: CardKernels, ledger: Ledger, whole: bool) -> Iterator[None]:
    """Have kernels chosen, and take memory, as on this card."""
    from transformers import modeling_flash_attention_utils

    with (
        swapped(modeling_flash_attention_utils, "lazy_import_flash_attention", _flash_package(ledger)),
        swapped(ledger, "rules", {**ledger.rules, **rules(ledger, card, whole)}),
        swapped(F, "scaled_dot_product_attention", AttentionCall(ledger, card, whole)),
        in_place_of_hub_kernels(),
        in_place_of_packages(ledger, card, whole),
    ):
        yield
