"""PACKED_KERNELS: what multiplies GPTQ and AWQ weights on a card, which of them a card takes, and the memory that each takes.

gptqmodel 7.7.0 tries its kernels by priority and takes the first that the card, the bits and the zero points allow
(gptqmodel/utils/importer.py, `select_quant_linear`); tests/core/test_packed_kernels.py holds the table against its answers. Those
of Blackwell, Hopper, Marlin and ExLlamaV2 are compiled when they are first used, which needs nvcc: without it Triton's is taken for
GPTQ, which unpacks every weight for its product, and for AWQ one that is not in this table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from harness.core.methods.config import method_name, settings_of
from harness.core.methods.scheme import PackedScheme
from harness.core.methods.table import METHODS
from harness.core.records import Record

PACKAGE = "gptqmodel 7.7"
NO_KERNEL = f"no kernel of {PACKAGE} is known that takes these weights on this card: a 16-bit copy of the largest is counted"
MXFP4_KERNEL = "experts are taken to be multiplied as they are stored by gpt-oss-triton-kernels, without a copy in 16 bits"
# Marlin adds up in float32: for each multiprocessor a tile of at most so many rows, which come 16 at a time, and so many columns
# (gptqmodel_ext/marlin/marlin_scratch.cuh, marlin.cuh).
TILE_ROWS, TILE_STEP, TILE_COLUMNS = 64, 16, 256


class PackedKernel(Record, frozen=True, kw_only=True):
    """One row of the table. `since` has the compute capability from which on a card takes it, by method."""

    name: str
    source: str  #: the file in gptqmodel 7.7.0 that says what it allocates
    since: Mapping[str, float]
    before: float = math.inf  #: the compute capability of the first cards that take it no more
    bits: tuple[int, ...] = (4, 8)
    groups: tuple[int, ...] = (0, 32, 64, 128)
    symmetric: tuple[str, ...] = ()  #: methods of which it takes no zero points
    plain_8_bits: bool = False  #: neither are 8 bits with zero points or in another order
    multiple: tuple[int, int] = (1, 1)  #: of which outputs and inputs must be multiples
    reduces: bool = False  #: sums up in float32 beside its product
    unpacks_from: Mapping[int, int] = {}  #: by bits, the rows from which on it makes a 16-bit copy of the weight
    # By method, for products of how many rows it keeps room as long as the model is there, beside that for the largest weight in
    # 16 bits; none: it keeps no room.
    kept_rows: Mapping[str, int] = {}
    sorts: bool = True  #: copies its input in order, where that is asked
    # Methods of which packed zero points stay in memory, even where they say nothing.
    keeps_zeros: tuple[str, ...] = ("gptq", "awq")

    def takes(self, scheme: PackedScheme, capability: float) -> bool:
        """Say whether it is for weights packed so, on a card of this compute capability."""
        since = self.since.get(scheme.method)
        known = since is not None and since <= capability < self.before
        zeros = scheme.method in self.symmetric and not scheme.symmetric
        odd = self.plain_8_bits and scheme.bits == 8 and (scheme.reorders or not scheme.symmetric)
        return known and scheme.bits in self.bits and scheme.group in self.groups and not zeros and not odd

    def fits(self, outputs: int, inputs: int) -> bool:
        """Say whether it takes a weight of these sides."""
        return not outputs % self.multiple[0] and not inputs % self.multiple[1]

    def reduction_bytes(self, rows: int, processors: int) -> int:
        """Return the bytes that a product of this many rows takes to sum up in float32, on a card with so many multiprocessors."""
        tile = min(-(-rows // TILE_STEP) * TILE_STEP, TILE_ROWS)
        return 4 * processors * tile * TILE_COLUMNS if self.reduces else 0

    def unpacks(self, bits: int, rows: int) -> bool:
        """Say whether it makes a 16-bit copy of a weight for a product of this many rows."""
        return bits in self.unpacks_from and rows >= self.unpacks_from[bits]

    def kept_bytes(self, method: str, outputs: int, inputs: int) -> int:
        """Return the room that it keeps for a weight of these sides; a model keeps the most that one of its weights asks for."""
        rows = self.kept_rows.get(method)
        return 0 if rows is None else 2 * outputs * inputs + 4 * outputs * rows + 256


class PackedProduct(Record, frozen=True, kw_only=True):
    """A kernel at work on weights that are packed in one way, on a card with so many multiprocessors."""

    kernel: PackedKernel
    scheme: PackedScheme
    processors: int

    def temporary_bytes(self, elements: int, inputs: int, rows: int) -> int:
        """Return what the product of the largest weight takes beside its input and result."""
        copy = 2 * elements if self.kernel.unpacks(self.scheme.bits, rows) else 0
        order = 2 * rows * inputs if self.scheme.reorders and self.kernel.sorts else 0
        return copy + order + self.kernel.reduction_bytes(rows, self.processors)

    @property
    def said(self) -> str:
        """Say which kernel is assumed, and what else would take more."""
        takes = f"weights are taken to be multiplied by {self.kernel.name}, the kernel of {PACKAGE} for this card"
        return (
            takes if self.kernel.name == "Triton" else f"{takes}; without nvcc to compile it another is taken, which unpacks them"
        )


_EVERY_ROW = {4: 1, 8: 1}
_SWORDFISH = PackedKernel(
    name="Swordfish",
    source="gptqmodel_ext/swordfish/libtorch_stable/quantization/swordfish/swordfish_mm.cu",
    since={"gptq": 10.0},
    before=12.0,
    plain_8_bits=True,
    multiple=(64, 64),
    unpacks_from={4: 4096, 8: 1024},  # dense_tier_min_m, of cards with 100 multiprocessors and more
    keeps_zeros=(),
)
_MACHETE = PackedKernel(
    name="Machete",
    source="gptqmodel_ext/machete/machete_mm_launcher.cuh",
    since={"gptq": 9.0},
    before=9.1,
    groups=(0, 64, 128),
    multiple=(128, 64),
    keeps_zeros=(),
)
PACKED_KERNELS = (
    _SWORDFISH,
    replace(_SWORDFISH, since={"awq": 10.0}, bits=(4,)),
    _MACHETE,
    replace(_MACHETE, since={"awq": 9.0}, groups=(0, 32, 64, 128)),
    PackedKernel(
        name="Marlin",
        source="gptqmodel_ext/marlin/gptq_marlin.cu",
        since={"gptq": 7.5, "awq": 8.0},
        symmetric=("gptq",),
        reduces=True,
        keeps_zeros=("awq",),
    ),
    PackedKernel(
        name="ExLlamaV2",
        source="gptqmodel/nn_modules/qlinear/exllamav2.py",
        since={"gptq": 0.0, "awq": 0.0},
        bits=(4,),
        multiple=(32, 32),
        sorts=False,
        # nn_modules/qlinear/exllamav2.py and exllamav2_awq.py, `scratch_space_fixed`; utils/model.py, `gptqmodel_post_init`
        kept_rows={"gptq": 2048 * 8, "awq": 2048},
    ),
    PackedKernel(
        name="Triton",
        source="gptqmodel/nn_modules/triton_utils/dequant.py",
        since={"gptq": 0.0},
        groups=(0, 16, 32, 64, 128, 256, 512, 1024),
        multiple=(32, 32),
        sorts=False,
        unpacks_from=_EVERY_ROW,
    ),
)


def kernel_for(scheme: PackedScheme, capability: float) -> PackedKernel | None:
    """Return the kernel that a card of this compute capability takes by default, None if none of the table is for such weights."""
    return next((kernel for kernel in PACKED_KERNELS if kernel.takes(scheme, capability)), None)


def scheme_of(config: Mapping[str, Any]) -> PackedScheme | None:
    """Return how a config says that weights are packed which these kernels multiply; None of all others."""
    settings = settings_of(config) or {}
    row = METHODS.get(method_name(settings))
    return row.scheme(settings) if row is not None and row.scheme is not None else None
