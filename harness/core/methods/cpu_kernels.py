"""CPU_KERNELS: what multiplies GPTQ and AWQ weights on a processor, and which of them it takes.

gptqmodel 7.7.0 tries its kernels by priority and takes the first that the processor, the bits and the groups allow; transformers
asks without a dtype, so that the one for bfloat16 is taken whatever the model is in (integrations/awq.py, optimum's GPTQQuantizer).
The layers then look at each weight, and torch at each product. In float16 a product unpacks its whole weight, or has no fast loop,
and in bfloat16 neither. tests/core/test_packed_kernels.py holds the table against gptqmodel's answers, and against torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.core.methods.kernels import PACKAGE
from harness.core.methods.scheme import PackedScheme
from harness.core.records import Record

# What torch's product of 4-bit weights takes (aten/src/ATen/native/LinearAlgebra.cpp, `_weight_int4pack_mm_cpu`).
INT4_GROUPS, INT4_OUTPUTS = (32, 64, 128, 256), 16
_AWAY: str = "take a GPU, or a checkpoint in groups of 128"
_COLUMNS = 0  # for a group: a whole column
_BOTH = ("gptq", "awq")
LinearSides = tuple[str, int, int]  # the path of a weight, its outputs and its inputs


class CpuKernel(Record, frozen=True, kw_only=True):
    """One row of the table. `groups` has the sizes that it is chosen for, by method; 0: whole columns."""

    name: str
    source: str  #: the file in gptqmodel 7.7.0 that says so
    bits: tuple[int, ...]
    groups: Mapping[str, tuple[int, ...]]
    avx512_bf16: bool = False  #: runs on Linux on processors with AVX512_BF16 alone
    outputs: int = 1  #: of which outputs must be a multiple
    whole_groups: bool = False  #: inputs must be a multiple of the group
    by_torch: bool = False  #: multiplies by torch's product of 4-bit weights
    group_bytes: float | None = None  #: what it keeps of a group and output from the first product on; None: what was stored

    def takes(self, scheme: PackedScheme, *, avx512_bf16: bool) -> bool:
        """Say whether it is chosen for weights packed so, on a processor with or without AVX512_BF16."""
        packed = scheme.bits in self.bits and scheme.group in self.groups.get(scheme.method, ())
        return packed and (avx512_bf16 or not self.avx512_bf16)

    def fault(self, group: int, path: str, outputs: int, inputs: int) -> str | None:
        """Say why it does not multiply by a weight of these sides; None if it does."""
        if self.by_torch and (group or inputs) not in INT4_GROUPS:
            return f"torch has no product of 4-bit {_said(group)} on this processor: {_AWAY}"
        if outputs % self.outputs or (self.whole_groups and group and inputs % group):
            shares = f"{self.outputs} outputs and {group or 1} inputs"
            return f"{PACKAGE} multiplies these weights on this processor by {shares}, and {path} has {outputs} and {inputs}"
        return None


UNPACKED_IN = ("float16",)  # where each kernel unpacks a whole weight for a product, or has a loop that takes as long
CPU_KERNELS = (
    CpuKernel(
        name="TorchCpuAvx512",
        source="gptqmodel/nn_modules/qlinear/torch_cpu_avx512.py",
        bits=(4,),
        groups=dict.fromkeys(_BOTH, (16, 32, 64, 128, 256, 512)),
        avx512_bf16=True,
        outputs=32,
        whole_groups=True,
        group_bytes=5,  # a scale in float32, and a zero point in a byte
    ),
    CpuKernel(
        name="TorchAten",
        source="gptqmodel/nn_modules/qlinear/torch_aten_kernel.py",
        bits=(4,),
        groups=dict.fromkeys(_BOTH, INT4_GROUPS),
        outputs=INT4_OUTPUTS,
        whole_groups=True,
        by_torch=True,
        group_bytes=8,  # a scale and a zero point in 16 bits, and both once more, joined
    ),
    CpuKernel(
        name="TorchFused",
        source="gptqmodel/nn_modules/qlinear/torch_fused.py",
        bits=(4,),
        groups=dict.fromkeys(_BOTH, (_COLUMNS, 16, 32, 64, 128)),
        outputs=INT4_OUTPUTS,
        whole_groups=True,
        by_torch=True,
        group_bytes=8,  # a scale and a zero point in 16 bits, and both once more, joined
    ),
    CpuKernel(
        name="Torch",
        source="gptqmodel/nn_modules/qlinear/torch.py",
        bits=(2, 3, 4, 5, 6, 7, 8),
        groups={"gptq": (_COLUMNS, 16, 32, 64, 128, 256, 512, 1024), "awq": (_COLUMNS, 16, 32, 64, 128)},
    ),
)


def cpu_kernel_for(scheme: PackedScheme, *, avx512_bf16: bool) -> CpuKernel | None:
    """Return the kernel that gptqmodel takes on a processor with or without AVX512_BF16, None if it has none."""
    return next((kernel for kernel in CPU_KERNELS if kernel.takes(scheme, avx512_bf16=avx512_bf16)), None)


def growth_bits(scheme: PackedScheme, *, avx512_bf16: bool | None) -> float:
    """Return the bits of a weight that scales and zero points take more in RAM, from the first product on, than in the files.

    Of a processor that may have AVX512_BF16 or not, the most.
    """
    kinds = (False, True) if avx512_bf16 is None else (avx512_bf16,)
    kept = [kernel.group_bytes for fast in kinds if (kernel := cpu_kernel_for(scheme, avx512_bf16=fast)) and kernel.group_bytes]
    return max((8 * size - 16 - scheme.bits) / scheme.group for size in kept) if kept and scheme.group else 0.0


def cpu_refusal(scheme: PackedScheme, sides: Sequence[LinearSides], *, avx512_bf16: bool | None, some: bool = False) -> str | None:
    """Say why a processor does not multiply by weights packed so, of these paths, outputs and inputs; None if it does.

    With `some` it is not known which of them are packed, and one that is taken lets all pass. Of a processor that may have
    AVX512_BF16 or not, only what both kinds refuse is said.
    """
    kinds = (False, True) if avx512_bf16 is None else (avx512_bf16,)
    whys = [_refusal(scheme, sides, avx512_bf16=fast, some=some) for fast in kinds]
    return whys[0] if all(whys) else None


def _refusal(scheme: PackedScheme, sides: Sequence[LinearSides], *, avx512_bf16: bool, some: bool) -> str | None:
    kernel = cpu_kernel_for(scheme, avx512_bf16=avx512_bf16)
    if kernel is None:
        what = f"{scheme.bits}-bit {scheme.method.upper()} in {_said(scheme.group)}"
        return f"{PACKAGE} has no kernel for {what} on this processor: {_AWAY}"
    whys = [kernel.fault(scheme.group, *one) for one in sides]
    return None if some and None in whys else next(filter(None, whys), None)


def _said(group: int) -> str:
    return f"groups of {group}" if group else "whole columns"
