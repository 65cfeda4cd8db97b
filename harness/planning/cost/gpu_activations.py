"""The activations of a model on a GPU: as traced if there is a record of it, else by the formulas."""

from __future__ import annotations

from functools import cached_property

from harness.architecture import traces
from harness.architecture.card_kernels import FLASH_SINCE, kernels_of
from harness.architecture.model_spec import ModelSpec
from harness.architecture.traced_memory import Gaps, TracedMemory, TracedPeak, evaluate
from harness.checkpoint.quantization import config_in
from harness.core.errors import UsageError
from harness.core.methods import kernels
from harness.core.methods.config import settings_of
from harness.core.methods.kernels import PackedProduct
from harness.core.precisions import PRECISIONS
from harness.core.records import Workload
from harness.machine.cache import cache_dir
from harness.planning.cost.activations import Activations, with_attention
from harness.planning.cost.memory import WeightFormat

# The precisions that records go by where nothing is quantized.
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_NOT_TRACED = "this model has not been traced in this precision"


class GpuActivations:
    """What one model allocates on a GPU beside weights and KV cache, in one weight format.

    `capability` is the compute capability of the card, of the oldest if there are several: which kernels run goes by it.
    `attention` is the implementation that is asked for; None is what transformers chooses.
    """

    def __init__(self, spec: ModelSpec, fmt: WeightFormat, capability: str | None = None, attention: str | None = None) -> None:
        self._config, self._fmt, self._capability, self._spec, self._attention = spec.config, fmt, capability, spec, attention
        self.product = self._product()
        self._built: TracedMemory | None = None
        self._phases: dict[Workload, tuple[int, int]] = {}
        self.why_formulas = _NOT_TRACED

    @cached_property
    def _formulas(self) -> Activations:
        """What is counted where no trace tells."""
        flash = kernels_of(self._capability).capability >= FLASH_SINCE
        return Activations(with_attention(self._spec.skeleton, self._attention), self._fmt, "gpu", self.product, flash=flash)

    def bytes(self, workload: Workload) -> int:
        """Return the most that generating holds beside weights and final KV cache, in bytes."""
        return max(*self.phases(workload), 0)

    def phases(self, workload: Workload) -> tuple[int, int]:
        """Return what is held beside weights and final KV cache while the prompt is read, and in the steps after it."""
        if workload not in self._phases:  # every placement and KV cache asks for the same
            peak = self.traced_peak(workload)
            prefill, decode = self._formulas.phases(workload) if peak is None else peak.phases
            self._phases[workload] = self._room + prefill, self._room + decode
        return self._phases[workload]

    def _product(self) -> PackedProduct | None:
        """Return what multiplies weights that are stored as GPTQ or AWQ, as the config or the form of the checkpoint says."""
        packed = self._spec.packed
        if self._fmt.packed_bits is None or packed is None or not packed.has_kernels:
            return None
        scheme = kernels.scheme_of(self._config if settings_of(self._config) else config_in(packed, self._config))
        card = kernels_of(self._capability)
        kernel = kernels.kernel_for(scheme, card.capability[0] + card.capability[1] / 10) if scheme is not None else None
        return None if kernel is None or scheme is None else PackedProduct(kernel=kernel, scheme=scheme, processors=card.processors)

    @property
    def kernel(self) -> str:
        """Say which kernel is taken to multiply weights that are stored packed; "" of others."""
        if self.product is not None:
            return self.product.said
        packed = self._spec.packed
        if self._fmt.packed_bits is not None and packed is not None and packed.has_kernels:
            return kernels.NO_KERNEL
        return kernels.MXFP4_KERNEL if self._formulas.packs_experts else ""

    @cached_property
    def _room(self) -> int:
        """Bytes that a kernel keeps for itself as long as the model is there."""
        if self.product is None:
            return 0
        linears = [
            weight.tensor.shape for weight, _ in self._spec.skeleton.tally if weight.quantizes and len(weight.tensor.shape) == 2
        ]
        method, kept = self.product.scheme.method, self.product.kernel.kept_bytes
        return max((kept(method, outputs, inputs) for outputs, inputs in linears), default=0)

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
            self._built = traces.build_record(self._config, self.precision, cache_dir(), self._capability, self._attention)
        except UsageError as error:
            self.why_formulas = str(error)
        self._phases.clear()

    def gaps(self, *, expandable: bool) -> Gaps | None:
        """Return what torch's allocator takes beyond what is allocated, as shares of that; None without a record that tells."""
        record = self._built or self._at_hand
        reserved = record.reserved if record is not None else None
        return None if reserved is None else reserved.expandable if expandable else reserved.usual

    @cached_property
    def precision(self) -> str | None:
        """The precision whose record holds for this format; None of formats that are not traced."""
        fmt, packed = self._fmt, self._spec.packed
        if not self._config or (fmt.packed_bits is not None and not settings_of(self._config)):
            return None  # of a form in which it is not stored there is no config
        name = fmt.quantizer or _DTYPES.get(fmt.dtype)
        if fmt.packed_bits is not None:
            name = packed.precision if packed is not None and not packed.own else None
        row = PRECISIONS.get(name or "")
        traceable = row is not None and row.is_traceable and row.dtype_on(self._capability) == fmt.dtype
        return name if traceable else None

    @cached_property
    def _at_hand(self) -> TracedMemory | None:
        if self.precision is None:
            return None
        shipped = traces.shipped_trace(self._config, self.precision, self._capability, self._attention)
        if shipped is not None:  # of most models: then no cache is looked for
            return shipped
        return traces.built_trace(self._config, self.precision, cache_dir(), self._capability, self._attention)
