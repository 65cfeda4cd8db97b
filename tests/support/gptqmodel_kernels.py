"""Which kernels gptqmodel takes for packed weights: its own selection, with every kernel compiled, for cards that are not there.

And for processors with and without AVX512_BF16, asked as transformers does: without a dtype.

    python -m tests.support.gptqmodel_kernels    # where gptqmodel is installed; writes tests/data/gptqmodel_kernels.csv

A process of its own: importing gptqmodel sets up the whole of one.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

RECORDED = Path(__file__).parents[1] / "data/gptqmodel_kernels.csv"
CARDS = ("6.1", "7.0", "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1")
HOPPER_SHARED_BYTES = 227 << 10  # of a block that asks for it: Machete looks whether they are there
GROUPS = (0, 16, 32, 64, 128, 256)
# What stands for a card where a processor multiplies: the kernel that needs AVX512_BF16 is there, or is not.
PROCESSORS = {"cpu avx512_bf16": True, "cpu": False}
CPU_BITS, CPU_GROUPS = (2, 3, 4, 8), (*GROUPS, 512, 1024)


class Choice(NamedTuple):
    """One question and its answer, the class that gptqmodel takes; empty if it has none."""

    method: str
    bits: int
    group: int
    symmetric: bool
    reorders: bool
    capability: str
    kernel: str


def recorded() -> tuple[str, list[Choice]]:
    """Read the version that was asked and its answers."""
    with RECORDED.open(newline="") as file:
        asked = file.readline().strip().removeprefix("# ")
        lines = csv.reader(file)
        next(lines)
        return asked, [Choice(row[0], int(row[1]), int(row[2]), row[3] == "True", row[4] == "True", *row[5:]) for row in lines]


def choices() -> Iterator[Choice]:
    """Ask for every method, width, group and card, then for processors."""
    import torch
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    kernels = list(_below(BaseQuantLinear))
    for kernel in kernels:
        mock.patch.object(kernel, "cached_validate_once", return_value=(True, None)).start()
    shared = dict.fromkeys(("shared_memory_per_block_optin", "shared_memory_per_block"), HOPPER_SHARED_BYTES)
    facts = SimpleNamespace(name="a card", multi_processor_count=132, **shared)
    known: dict[str, Any] = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": facts}
    for name, answer in known.items():
        mock.patch.object(torch.cuda, name, return_value=answer).start()
    card = mock.patch.object(torch.cuda, "get_device_capability").start()
    both = (False, True)
    for method, bits, group, symmetric, reorders, capability in product(("gptq", "awq"), (4, 8), GROUPS, both, both, CARDS):
        if reorders and (method == "awq" or not group):
            continue
        major, minor = capability.split(".")
        card.return_value = int(major), int(minor)
        asked = Choice(method, bits, group, symmetric, reorders, capability, "")
        yield asked._replace(kernel=_chosen(asked, torch.device("cuda:0"), torch.float16))
    for capability, fast in PROCESSORS.items():
        for kernel in kernels if not fast else ():
            if "Avx512" in kernel.__name__:
                mock.patch.object(kernel, "cached_validate_once", return_value=(False, RuntimeError("no AVX512_BF16"))).start()
        for method, bits, group in product(("gptq", "awq"), CPU_BITS, CPU_GROUPS):
            asked = Choice(method, bits, group, symmetric=True, reorders=False, capability=capability, kernel="")
            yield asked._replace(kernel=_chosen(asked, torch.device("cpu"), None))


def _chosen(asked: Choice, device: Any, dtype: Any) -> str:
    import torch
    from gptqmodel.utils import importer

    importer.clear_validation_cache()
    try:
        return str(
            importer.select_quant_linear(
                bits=asked.bits,
                group_size=asked.group or -1,
                desc_act=asked.reorders,
                sym=asked.symmetric,
                device=device,
                format="gptq" if asked.method == "gptq" else "gemm",
                quant_method=asked.method,
                pack_dtype=torch.int32,
                dtype=dtype,
            ).__name__
        )
    except (ValueError, NotImplementedError):
        return ""


def _below(kind: Any) -> Iterator[Any]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)


def main() -> None:
    """Write the answers of the gptqmodel that is installed to a file, the recorded one unless another is named."""
    path = Path(sys.argv[1]) if sys.argv[1:] else RECORDED
    answers = list(choices())
    with path.open("w", newline="") as file:
        file.write(f"# {version('gptqmodel')}\n")
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(Choice._fields)
        lines.writerows(answers)


if __name__ == "__main__":
    main()
