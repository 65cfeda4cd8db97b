"""Planned load peaks of what packages quantize, and of stored forms that are unpacked, against transformers' own loader.

    pytest -s -o python_files=oracle_*.py tests/oracle/oracle_package_loads.py

On hollow checkpoints of full size, as in `oracle_loads`; apart from it, as transformers imports torchao wherever it is installed.
What is unpacked is Llama 3.1 8B in each form. Left out are those that no fake tensor can pass through:

- quanto-int4: optimum-quanto packs what is of the class torch.Tensor itself (`type(data) is torch.Tensor`, tensor/weights/qbits.py)
  and keeps a byte for each weight of any other.
- GPTQ and AWQ, of experts that transformers stacks as well: their layers are gptqmodel's, which compiles its kernels on loading.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from harness.catalog import shipped
from harness.core.precisions import PRECISIONS
from harness.core.units import GIB, MIB
from harness.worker.trace.load import Cards, trace_load
from tests.oracle.oracle_loads import CONTEXT, SHARE, SLACK, planned, quiet
from tests.strangers import stored_forms
from tests.support import hollow
from tests.support.reporting import Figure, Section, table

for package in ("torchao", "optimum.quanto", "compressed_tensors"):
    pytest.importorskip(package)

__all__ = ["quiet"]  # a fixture
COMMAND = "tox run -e oracle-packages"
QUANTIZING = ("torchao-int8", "torchao-int8-dynamic", "torchao-int4", "quanto-int8")
MODELS = {  # and the dtype of their files
    "llama-3.1-8b-instruct": "bfloat16",
    "gemma-2-2b-it": "bfloat16",
    "phi-2": "float32",
    "mixtral-8x7b-instruct-v0.1": "bfloat16",
}
UNPACKED = ("ct-w4a16", "ct-w8a16", "ct-fp8", "ct-int8", "fp8-blocks", "mxfp8", "metal")


class Compared(NamedTuple):
    """One checkpoint in one precision: bytes at the end and at most, traced and planned."""

    what: str
    precision: str
    held: int
    peak: int
    planned_weights: int
    planned_peak: int

    @property
    def miss(self) -> int:
        return abs(self.planned_peak - self.peak)

    def row(self) -> list[str]:
        over = [f"{size / MIB:,.1f}" for size in (self.peak - self.held, self.planned_peak - self.planned_weights)]
        return [self.what, self.precision, f"{self.held / GIB:.3f}", f"{self.planned_weights / GIB:.3f}", *over]


def compared(folder: Path, what: str, precision: str) -> Compared:
    (most,) = trace_load(folder, precision, {"": 0}, Cards(capability="9.0"), ahead=not PRECISIONS[precision].quantizes)
    tier = planned(folder, precision)
    return Compared(what, precision, most.held_bytes, most.peak_bytes, tier.weights_bytes, tier.load_peak_bytes - CONTEXT)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # which is how transformers is asked to unpack
def test_load_peaks(tmp_path: Path, figures: list[Figure], section: Section) -> None:
    found: list[Compared] = []
    for model, dtype in MODELS.items():
        folder = hollow.write(tmp_path / model, shipped.catalog()[shipped.hub_id(model)].config, dtype=dtype)
        found += [compared(folder, model, precision) for precision in QUANTIZING]
    found += [compared(stored_forms.save_hollow(tmp_path / form, form), form, "bf16") for form in UNPACKED]
    share, nbytes = max(one.miss / one.peak for one in found), max(one.miss for one in found)
    what = "load peaks of what packages quantize or unpack: largest error, as a share and in bytes"
    figures.append(Figure(what=what, found=f"{share:.2%}, {nbytes / MIB:.1f} MiB", wanted="2 % or 64 MiB", rows=len(found)))
    heads = ["checkpoint", "precision", "weights, GiB", "planned", "over, MiB", "planned"]
    section.notes.append("\n".join(table(heads, [one.row() for one in found])))
    assert all(one.miss <= max(SHARE * one.peak, SLACK) for one in found)
