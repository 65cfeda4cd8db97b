"""Linear layers whose weights stay packed as two published checkpoints store them, and are unpacked for each use, block by block.

Both come from repositories older than transformers' quantizers: ChatGLM-6B's int8 and int4 files (a scale a row), and MOSS's
(the layout of GPTQ-for-LLaMa's triton branch: groups of inputs, each with a scale and a zero). No weight is ever there whole: a
block is unpacked, multiplied with and dropped, and on a processor it never leaves the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cache, partial

import torch
from torch import nn
from torch.nn import functional

from harness.core.quantizers import block_elements

_WORD = 32  # bits of the integers that GPTQ packs into


class RowScaledLinear(nn.Module):
    """A Linear with symmetric integers and one scale for each output: W[o, i] = weight[o, i] * weight_scale[o].

    `weight` is int8 of shape [out, in * bits / 8]. With 4 bits a byte holds two inputs, the even one in its upper half, both as
    signed numbers.
    """

    def __init__(self, inputs: int, outputs: int, bits: int, bias: bool = True) -> None:
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"quantization_bit {bits}: ChatGLM-6B was published with 8 and with 4")
        self.bits, self.in_features, self.out_features = bits, inputs, outputs
        packed = torch.empty(outputs, inputs * bits // 8, dtype=torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(outputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        given = states.to(_product_dtype(states))
        product = given.new_empty((*states.shape[:-1], self.out_features))
        for rows in _blocks(states, self.out_features, self.in_features):
            bias = None if self.bias is None else self.bias[rows].to(given.dtype)
            product[..., rows] = functional.linear(given, self._unpacked(rows, states).to(given.dtype), bias)
        return product.to(states.dtype)

    def _unpacked(self, rows: slice, like: torch.Tensor) -> torch.Tensor:
        """Return some rows of the weight, [rows, in], in the dtype that weights for the dtype of `like` are unpacked in."""
        dtype = _working_dtype(like)
        scale = self.weight_scale[rows].to(like.dtype).to(dtype)
        return self._integers(rows).to(dtype).mul_(scale[:, None])

    def _integers(self, rows: slice) -> torch.Tensor:
        whole: torch.Tensor = self.weight[rows]
        if self.bits == 8:
            return whole
        even, odd = whole >> 4, (whole << 4) >> 4  # int8 shifts keep the sign
        return torch.stack((even, odd), dim=-1).flatten(1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class GroupScaledLinear(nn.Module):
    """A Linear in the layout of GPTQ-for-LLaMa: W[i, o] = scales[g, o] * (q[i, o] - zeros[g, o] - 1) with g = g_idx[i].

    `qweight` is int32 [in * bits / 32, out]: bit field j of row r, lowest first, is input r * 32 / bits + j. `qzeros` is int32
    [groups, out * bits / 32], packed along the outputs. `scales` is [groups, out], `g_idx` int32 [in].
    """

    def __init__(self, inputs: int, outputs: int, bits: int, group: int, bias: bool = True) -> None:
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"wbits {bits}: MOSS was published with 8 and with 4")
        self.bits, self.in_features, self.out_features = bits, inputs, outputs
        groups = -(-inputs // group) if group > 0 else 1
        integers = partial(torch.zeros, dtype=torch.int32)
        self.qweight = nn.Parameter(integers(inputs * bits // _WORD, outputs), requires_grad=False)
        self.qzeros = nn.Parameter(integers(groups, outputs * bits // _WORD), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(groups, outputs), requires_grad=False)
        self.g_idx = nn.Parameter(integers(inputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        dtype, fields = _working_dtype(states), _WORD // self.bits
        zeros = (_fields(self.qzeros, self.bits, dim=1) + 1).to(dtype)
        scales = self.scales.to(states.dtype).to(dtype)
        # Words lie in the order of the inputs, so a block gives a part of every sum.
        total = states.new_zeros((*states.shape[:-1], self.out_features), dtype=torch.promote_types(states.dtype, torch.float32))
        given = states.to(_product_dtype(states))
        for rows in _blocks(states, len(self.qweight), fields * self.out_features):
            inputs = slice(rows.start * fields, rows.stop * fields)
            total += given[..., inputs] @ self._unpacked(rows, self.g_idx[inputs], zeros, scales).to(given.dtype)
        product = total.to(states.dtype)
        return product if self.bias is None else product + self.bias

    def _unpacked(self, rows: slice, group: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the weight of the inputs in some rows of words, [inputs, out], in the dtype of `zeros` and `scales`."""
        weight = _fields(self.qweight[rows], self.bits, dim=0).to(zeros.dtype)
        return weight.sub_(zeros.index_select(0, group)).mul_(scales.index_select(0, group))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def _blocks(states: torch.Tensor, rows: int, width: int) -> Iterator[slice]:
    """Cut this many rows, each of `width` weights, into blocks for the product with `states`."""
    each = max(1, block_elements(states.device.type, states.shape[:-1].numel()) // width)
    return (slice(start, min(start + each, rows)) for start in range(0, rows, each))


def _working_dtype(states: torch.Tensor) -> torch.dtype:
    """Return the dtype to unpack in: processors are slow to make 16-bit floats of integers.

    Rounded to the dtype of `states` the weights are the same as if they were unpacked in it: integers below 257 are exact in all of
    them, and the product of two 16-bit floats is in 32 bits.
    """
    return torch.promote_types(states.dtype, torch.float32) if states.device.type == "cpu" else states.dtype


def _product_dtype(states: torch.Tensor) -> torch.dtype:
    """Return the dtype to multiply in: on a processor that of `states` only for a prompt, and where oneDNN has products of it.

    For one token, rounding what is unpacked takes longer than it saves. Where oneDNN has no products of float16, torch's own loop
    makes no blocks: a prompt took 2.4 to 8 times as long in it.
    """
    if states.device.type != "cpu" or (states.shape[:-1].numel() > 1 and _has_products(states.dtype)):
        return states.dtype
    return _working_dtype(states)


@cache
def _has_products(dtype: torch.dtype) -> bool:
    """Say whether oneDNN multiplies 16-bit floats on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype in asked and bool(getattr(torch.ops.mkldnn, asked[dtype])())


def _fields(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Unpack the unsigned bit fields of int32 `words` [rows, columns] along `dim`, the lowest bits first."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
    fields = words.unsqueeze(dim + 1) >> shifts.view((-1, 1) if dim == 0 else (-1,))
    return fields.bitwise_and_(2**bits - 1).flatten(dim, dim + 1)


def replace_linears(model: nn.Module, names: Collection[str], make: Callable[..., nn.Module]) -> None:
    """Put `make(inputs, outputs, bias=...)` in the place of every Linear below `model` whose own name is among `names`."""
    for path, module in list(model.named_modules()):
        owner, _, name = path.rpartition(".")
        if name in names and isinstance(module, nn.Linear):
            packed = make(module.in_features, module.out_features, bias=module.bias is not None)
            setattr(model.get_submodule(owner), name, packed)
