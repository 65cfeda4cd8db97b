"""The tables of kernels for packed weights against gptqmodel: what its own selection takes, on every kind of card and processor."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from harness.core.methods.cpu_kernels import CPU_KERNELS, INT4_GROUPS, INT4_OUTPUTS, cpu_kernel_for, cpu_refusal
from harness.core.methods.kernels import PACKAGE, PACKED_KERNELS, kernel_for
from harness.core.methods.scheme import PackedScheme
from tests.support.gptqmodel_kernels import PROCESSORS, RECORDED, Choice, recorded

NAMES = {kernel.name.casefold(): kernel.name for kernel in PACKED_KERNELS}


def named(chosen: str) -> str | None:
    """Return the table's name of a class of gptqmodel; None of those that are not in it."""
    plain = chosen.removeprefix("Awq").removesuffix("Linear").casefold()
    return NAMES.get(plain) or NAMES.get(plain.removesuffix("v2"))


def ours(asked: Choice) -> str | None:
    scheme = PackedScheme(
        method=asked.method, bits=asked.bits, group=asked.group, symmetric=asked.symmetric, reorders=asked.reorders
    )
    kernel = kernel_for(scheme, float(asked.capability))
    return kernel.name if kernel else None


def test_the_table_takes_the_kernels_that_gptqmodel_takes() -> None:
    version, answers = recorded()
    asked = [one for one in answers if one.capability not in PROCESSORS]
    assert f"gptqmodel {version.rpartition('.')[0]}" == PACKAGE
    assert {(one, ours(one)) for one in asked} == {(one, named(one.kernel)) for one in asked}
    assert {ours(one) for one in asked} == {*NAMES.values(), None}


def scheme(of: Choice) -> PackedScheme:
    return PackedScheme(method=of.method, bits=of.bits, group=of.group)


def test_the_table_takes_the_kernels_that_gptqmodel_takes_on_processors() -> None:
    asked = [one for one in recorded()[1] if one.capability in PROCESSORS]
    taken = {one: cpu_kernel_for(scheme(one), avx512_bf16=PROCESSORS[one.capability]) for one in asked}
    names = {one: kernel.name if kernel else "" for one, kernel in taken.items()}
    assert names == {one: one.kernel.removesuffix("Linear").replace("Awq", "") for one in asked}
    assert set(names.values()) == {*(kernel.name for kernel in CPU_KERNELS), ""}


@pytest.mark.parametrize("outputs", [8, 16, 24, 32, 48])
@pytest.mark.parametrize("inputs", [32, 48, 64, 96, 128, 160, 256, 384, 512, 768])
def test_torch_multiplies_4_bits_on_a_processor_in_the_sides_of_the_table(outputs: int, inputs: int) -> None:
    kernel, given = CPU_KERNELS[1], torch.ones(1, inputs, dtype=torch.bfloat16)
    assert kernel.by_torch
    assert kernel.outputs == INT4_OUTPUTS
    for group in (16, *INT4_GROUPS, 512, inputs):
        scales = torch.ones(-(-inputs // group), outputs, 2, dtype=torch.bfloat16)
        try:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.zeros(outputs, inputs, dtype=torch.int32), 1)
            torch.ops.aten._weight_int4pack_mm_for_cpu(given, packed, group, scales)
        except RuntimeError:
            assert kernel.fault(group, "weight", outputs, inputs), (group, outputs, inputs)
        else:
            assert kernel.fault(group, "weight", outputs, inputs) is None, (group, outputs, inputs)


WIDE = [("mlp.up_proj.weight", 704, 256), ("mlp.down_proj.weight", 256, 704)]
SMALL = [("self_attn.q_proj.weight", 256, 256), ("self_attn.k_proj.weight", 64, 256)]
# method, bits, group, sides, with AVX512_BF16 (None: not known), what is said
ON_PROCESSORS = [
    ("gptq", 4, 0, SMALL, True, None),
    ("gptq", 4, 0, WIDE, True, "torch has no product of 4-bit whole columns"),
    ("awq", 4, 0, SMALL, False, None),
    ("awq", 4, 0, WIDE, False, "torch has no product of 4-bit whole columns"),
    ("gptq", 4, 16, SMALL, True, None),
    ("gptq", 4, 16, SMALL, None, None),
    ("gptq", 4, 16, SMALL, False, "torch has no product of 4-bit groups of 16"),
    ("gptq", 4, 512, SMALL, False, None),
    ("gptq", 4, 512, SMALL, True, "by 32 outputs and 512 inputs"),
    ("awq", 4, 512, SMALL, False, "gptqmodel 7.7 has no kernel for 4-bit AWQ in groups of 512"),
    ("gptq", 3, 16, WIDE, True, None),
    ("gptq", 8, 0, WIDE, False, None),
    ("gptq", 4, 128, WIDE, True, "down_proj.weight has 256 and 704"),
    ("gptq", 4, 128, WIDE, None, "down_proj.weight has 256 and 704"),
]


@pytest.mark.parametrize(("method", "bits", "group", "sides", "fast", "said"), ON_PROCESSORS)
def test_what_a_processor_does_not_multiply_is_refused_with_the_reason(
    method: str, bits: int, group: int, sides: list[tuple[str, int, int]], fast: bool | None, said: str | None
) -> None:
    found = cpu_refusal(PackedScheme(method=method, bits=bits, group=group), sides, avx512_bf16=fast)
    assert (found is None) if said is None else (said in (found or ""))


def test_where_only_some_weights_are_packed_one_that_is_taken_lets_all_pass() -> None:
    whole = PackedScheme(method="gptq", bits=4, group=0)
    assert cpu_refusal(whole, [*SMALL, *WIDE], avx512_bf16=True, some=True) is None
    assert cpu_refusal(whole, WIDE[1:], avx512_bf16=True, some=True) is not None


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed: its recorded answers are held alone")
def test_what_was_recorded_is_what_gptqmodel_answers(tmp_path: Path) -> None:
    """`python -m tests.support.gptqmodel_kernels` records a new release."""
    found = tmp_path / "answers.csv"
    subprocess.run([sys.executable, "-m", "tests.support.gptqmodel_kernels", str(found)], check=True, capture_output=True)
    assert found.read_text().splitlines()[1:] == RECORDED.read_text().splitlines()[1:]
