"""The activations of a model on a GPU: as traced if there is a record of it, else by the formulas."""

from __future__ import annotations

from functools import cached_property

from harness.architecture import traces
from harness.architecture.model_spec import ModelSpec
from harness.architecture.traced_memory import TracedMemory, TracedPeak, evaluate
from harness.catalog.wheel_cache import cache_dir
from harness.core.records import Workload
from harness.planning.cost.activations import Activations
from harness.planning.cost.memory import WeightFormat

# The precisions that records go by, and of those that bitsandbytes quantizes the dtype they compute in.
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_QUANTIZED = {"int8": "float16", "int4": "bfloat16", "fp8": "bfloat16"}


class GpuActivations:
    """What one model allocates on a GPU beside weights and KV cache, in one weight format."""

    def __init__(self, spec: ModelSpec, fmt: WeightFormat) -> None:
        self._config, self._fmt = spec.config, fmt
        self._formulas = Activations(spec.skeleton, fmt, "gpu")

    def bytes(self, workload: Workload) -> int:
        """Return the most that generating holds beside weights and final KV cache, in bytes."""
        peak = self.traced_peak(workload)
        return self._formulas.bytes(workload) if peak is None else peak.activation_bytes

    def traced_peak(self, workload: Workload) -> TracedPeak | None:
        """Return the traced peak of a workload, with its largest tensors; None without a record for it."""
        if self._traced is None:
            return None
        return evaluate(self._traced, workload.batch, workload.prompt_tokens, workload.new_tokens)

    @cached_property
    def _traced(self) -> TracedMemory | None:
        fmt = self._fmt
        if fmt.packed_bits is not None or not self._config:
            return None
        precision = _DTYPES.get(fmt.dtype) if fmt.quantizer is None else fmt.quantizer
        if precision is None or (fmt.quantizer is not None and _QUANTIZED.get(fmt.quantizer) != fmt.dtype):
            return None
        return traces.record_for(self._config, precision, cache_dir())
