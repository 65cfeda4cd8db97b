"""Linear layers whose weights stay packed as two published checkpoints store them, and are unpacked for each use.

Both come from repositories older than transformers' quantisers: ChatGLM-6B's int8 and int4 files (a scale a row), and MOSS's
(the layout of GPTQ-for-LLaMa's triton branch: groups of inputs, each with a scale and a zero).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import nn
from torch.nn import functional

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

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of shape [out, in] in a floating `dtype`."""
        whole: torch.Tensor = self.weight
        if self.bits == 4:
            even, odd = whole >> 4, (whole << 4) >> 4  # int8 shifts keep the sign
            whole = torch.stack((even, odd), dim=-1).flatten(1)
        return whole.to(dtype) * self.weight_scale.to(dtype)[:, None]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, self.unpacked(states.dtype), self.bias)

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

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of shape [in, out] in a floating `dtype`."""
        whole = _fields(self.qweight, self.bits, dim=0)
        zeros = _fields(self.qzeros, self.bits, dim=1) + 1
        group = self.g_idx.long()
        return (whole - zeros[group]).to(dtype) * self.scales.to(dtype)[group]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        product = states @ self.unpacked(states.dtype)
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def _fields(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Unpack the unsigned bit fields of int32 `words` [rows, columns] along `dim`, the lowest bits first."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
    fields = (words.unsqueeze(dim + 1) >> shifts.view((-1, 1) if dim == 0 else (-1,))) & (2**bits - 1)
    return fields.flatten(dim, dim + 1)


def replace_linears(model: nn.Module, names: Collection[str], make: Callable[..., nn.Module]) -> None:
    """Put `make(inputs, outputs, bias=...)` in the place of every Linear below `model` whose own name is among `names`."""
    for path, module in list(model.named_modules()):
        owner, _, name = path.rpartition(".")
        if name in names and isinstance(module, nn.Linear):
            packed = make(module.in_features, module.out_features, bias=module.bias is not None)
            setattr(model.get_submodule(owner), name, packed)
