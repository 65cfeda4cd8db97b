"""A precision and a placement as they load one checkpoint on one machine."""

from __future__ import annotations

from functools import cached_property

from msgspec.structs import replace

from harness.core.methods.cpu_kernels import growth_bits
from harness.core.methods.scheme import PackedScheme
from harness.core.placements import Placement
from harness.core.precisions import Precision
from harness.core.records import Machine
from harness.planning import feasibility
from harness.planning.cost.memory import WeightFormat
from harness.planning.counted import Counted


class AdaptedRow:
    """A precision and a placement as they load one checkpoint on one machine."""

    def __init__(self, counted: Counted, machine: Machine, precision: Precision, placement: Placement) -> None:
        self._counted, self._machine = counted, machine
        self.precision = counted.spec.adapted(precision)
        self.placement = feasibility.row_on(machine, placement, self.precision)

    @cached_property
    def dtype(self) -> str:
        """The dtype of what is not quantized, by the GPU or the processor that it is for."""
        return feasibility.dtype_on(self._machine, self.placement, self.precision)

    @cached_property
    def fmt(self) -> WeightFormat:
        """The format of the weights in memory."""
        on_cards = bool(self._machine.gpus) and "gpu" in self.placement.devices
        fmt, packed = self._counted.weight_format(self.precision, self.dtype, on_cards=on_cards), self._counted.spec.packed
        if on_cards or fmt.packed_bits is None or packed is None or not packed.has_kernels or fmt.dtype == "float32":
            return fmt
        scheme = PackedScheme(method=packed.name, bits=packed.bits, group=packed.group)
        more = growth_bits(scheme, avx512_bf16=feasibility.has_avx512_bf16(self._machine))
        return replace(fmt, packed_bits=fmt.packed_bits + more, counted_bits=fmt.counted_bits or fmt.packed_bits) if more else fmt
