"""The table of kernels for packed weights against gptqmodel: what its own selection takes, on every kind of card."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness.core.methods.kernels import PACKAGE, PACKED_KERNELS, PackedScheme, kernel_for
from tests.support.gptqmodel_kernels import RECORDED, Choice, recorded

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
    version, asked = recorded()
    assert f"gptqmodel {version.rpartition('.')[0]}" == PACKAGE
    assert {(one, ours(one)) for one in asked} == {(one, named(one.kernel)) for one in asked}
    assert {ours(one) for one in asked} == {*NAMES.values(), None}


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed: its recorded answers are held alone")
def test_what_was_recorded_is_what_gptqmodel_answers(tmp_path: Path) -> None:
    """`python -m tests.support.gptqmodel_kernels` records a new release."""
    found = tmp_path / "answers.csv"
    subprocess.run([sys.executable, "-m", "tests.support.gptqmodel_kernels", str(found)], check=True, capture_output=True)
    assert found.read_text().splitlines()[1:] == RECORDED.read_text().splitlines()[1:]
