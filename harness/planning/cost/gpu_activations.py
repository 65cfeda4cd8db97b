"""The activations of a model on a GPU: as traced if there is a record of it, else by the formulas."""

from __future__ import annotations

from functools import cached_property

from harness.architecture import traces
from harness.architecture.model_spec import ModelSpec
from harness.architecture.traced_memory import Gaps, TracedMemory, TracedPeak, evaluate
from harness.core.errors import UsageError
from harness.core.precisions import PRECISIONS
from harness.core.records import Workload
from harness.machine.cache import cache_dir
from harness.planning.cost.activations import Activations
from harness.planning.cost.memory import WeightFormat

# The precisions that records go by where nothing is quantized.
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_NOT_TRACED = "this model has not been traced in this precision"


class GpuActivations:
    """What one model allocates on a GPU beside weights and KV cache, in one weight format.

    `capability` is the compute capability of the card, of the oldest if there are several: which kernels run goes by it.
    """

    def __init__(self, spec: ModelSpec, fmt: WeightFormat, capability: str | None = None) -> None:
        self._config, self._fmt, self._capability = spec.config, fmt, capability
        self._formulas = Activations(spec.skeleton, fmt, "gpu")
        self._built: TracedMemory | None = None
        self._bytes: dict[Workload, int] = {}
        self.why_formulas = _NOT_TRACED

    def bytes(self, workload: Workload) -> int:
        """Return the most that generating holds beside weights and final KV cache, in bytes."""
        if workload not in self._bytes:  # every placement asks for the same
            peak = self.traced_peak(workload)
            self._bytes[workload] = self._formulas.bytes(workload) if peak is None else peak.activation_bytes
        return self._bytes[workload]

    def traced_peak(self, workload: Workload) -> TracedPeak | None:
        """Return the traced peak of a workload, with its largest tensors; None without a record for it."""
        record = self._built or self._at_hand
        if record is None:
            return None
        return evaluate(record, workload.batch, workload.prompt_tokens, workload.new_tokens, self._capability)

    @property
    def lacks_trace(self) -> bool:
        """Whether a trace could be made that nobody has made yet."""
        return self.precision is not None and (self._built or self._at_hand) is None

    def build(self) -> None:
        """Have the record that is missing traced by a worker, which takes seconds; say in `why_formulas` why it cannot be."""
        if self.precision is None or not self.lacks_trace:
            return
        try:
            self._built = traces.build_record(self._config, self.precision, cache_dir(), self._capability)
        except UsageError as error:
            self.why_formulas = str(error)
        self._bytes.clear()

    def gaps(self, *, expandable: bool) -> Gaps | None:
        """Return what torch's allocator takes beyond what is allocated, as shares of that; None without a record that tells."""
        record = self._built or self._at_hand
        reserved = record.reserved if record is not None else None
        return None if reserved is None else reserved.expandable if expandable else reserved.usual

    @cached_property
    def precision(self) -> str | None:
        """The precision whose record holds for this format; None of formats that are not traced."""
        fmt = self._fmt
        if fmt.packed_bits is not None or not self._config:
            return None
        name = fmt.quantizer or _DTYPES.get(fmt.dtype)
        row = PRECISIONS.get(name or "")
        traceable = row is not None and row.is_traceable and row.dtype_on(self._capability) == fmt.dtype
        return name if traceable else None

    @cached_property
    def _at_hand(self) -> TracedMemory | None:
        return traces.record_for(self._config, self.precision, cache_dir(), self._capability) if self.precision else None
