"""Method: the record of a row of METHODS, with all that is asked of a method; Foreign: that of one which transformers lacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from harness.core.methods import compressed
from harness.core.methods.scheme import PackedScheme
from harness.core.methods.settings import PackedTables, Setting
from harness.core.precisions import Config
from harness.core.records import Record


class Method(Record, frozen=True, kw_only=True):
    """One row of the table: what transformers does with a checkpoint whose weights are stored by a method."""

    name: str  #: the key of transformers' AUTO_QUANTIZER_MAPPING
    title: str
    written: str | None = None  #: the `quant_method` of a config, where it is another word (transformers' QuantizationMethod)
    # Says from a config what its weights are, beside bits and groups.
    variant: Callable[[Mapping[str, Any]], str] | None = None
    settings: tuple[Setting, ...] = ()  #: what its config may say: anything else ends in transformers' errors
    tables: PackedTables | None = None  #: what its config must say, which nobody asks for while the config is made
    needs: tuple[str, ...] = ()  #: modules that it cannot be loaded without (REQUIREMENTS)
    packs_on: frozenset[str] = frozenset(("gpu", "cpu"))  #: kinds of device that weights stay packed on
    packs_with: tuple[str, ...] = ()  #: modules that it needs for that: without them it unpacks
    packs_from: float = 0.0  #: the compute capability from which on they stay packed
    unpacked: Config | None = None  #: the `quantization_config` that asks for 16- or 32-bit weights; None: it keeps what is stored
    dtypes: tuple[str, ...] = ()  #: the only dtypes that the rest of the model may be in; empty: any
    counted: float | None = None  #: bytes of an element when a device map is inferred; None: those of the tensors as replaced
    margin: bool = False  #: a tenth of the memory is kept free when a device map is inferred
    refuses: Mapping[str, str] = {}  #: trait of a placement -> why weights that are stored so cannot be loaded that way
    copies: bool = False  #: every product makes a 16-bit copy of its weight
    held: str = "uint8"  #: the dtype that Linear weights have in memory, where the headers of the files were not read
    floats: Literal["stored", "asked", "float32"] = "stored"  #: the dtype that scales and codebooks have in memory
    cpu_dtypes: tuple[str, ...] = ()  #: the only dtypes that the rest may be in on a processor; empty: any
    cpu_lacks: Mapping[str, str] = {}  #: end of the format that weights are packed in -> why a processor has no layers
    # Says from a config, and the classes of tensors that a pickle holds, whether the rest of the model has no dtype but its own.
    binds: Callable[[Mapping[str, Any], Collection[str]], bool] | None = None
    bits: int = 4  #: of a weight, where the config does not say
    packs_linears: bool = True  #: Linear weights are packed
    packs_experts: bool = False  #: stacked experts of a mixture are
    stacks_pass: bool = False  #: a stack of experts that is unpacked passes through larger integers
    counts_scales: bool = True  #: scales count when a device map is inferred; they may come into their module afterward
    counts_by_name: bool = (
        False  #: what its config keeps out by name counts as it is when a device map is inferred, and tables may not
    )
    wide_bias: bool = False  #: the biases of packed experts are in float32
    blocks: bool = False  #: a scale is for a block of outputs x inputs
    group: int = 0  #: inputs that share a scale in nearly all that are published; 0: the method has no groups of its own
    only_of: str | None = None  #: the only `model_type` that is stored so
    keeps_dtype: bool = False  #: what is not packed keeps the dtype of the files, whichever is asked for; only biases take that
    layout: str | None = None  #: whose row of LAYOUTS its files follow, where it is another method's
    writes: Mapping[str, Any] = {}  #: what its config says beside bits and groups, of a checkpoint that is made here
    plain_when: Mapping[str, tuple[Any, ...]] = {}  #: key of the config -> values (None: no word) of 16-bit weights in the files
    spares: tuple[str, ...] = ()  #: parts of its layout that its files need not hold
    formats: frozenset[str] | None = None  #: words of a config for version or format that mean its layout; None: all do
    in_words: bool = False  #: an integer of several weights has the name of the weight, with a ".weight_scale" beside it
    by_blocks: bool = False  #: Linears and Conv1Ds of the blocks are packed (optimum); else Linears that a config does not keep
    kept_as_made: bool = False  #: stored weights lie in memory as those that its library packs while loading, and peft adapts them
    whole_blocks: str | None = None  #: why no Linear may be left in 16 bits, but those that the config keeps so
    not_packed: str | None = None  #: ... and what its library does, which packs no other, where the files hold one packed
    takes_experts_apart: bool = False  #: its package does so with a mixture before it loads the weights
    scales_decide: bool = False  #: unpacked weights are in the dtype of their scales, whichever is asked for
    unsupported: str | None = None  #: why nothing that is stored so can be loaded
    faults: Callable[[Mapping[str, Any]], str | None] | None = None  #: says why its package does not take a config
    undivided: Callable[[Mapping[str, Any]], str | None] | None = None  #: says why no inferred map can divide the weights
    casts: Callable[[str], bool] | None = None  #: says whether scales of a class that a pickle holds take the dtype asked for
    # Reads from a config how Linears are packed, for the rows of PACKED_KERNELS and CPU_KERNELS that multiply them.
    scheme: Callable[[Mapping[str, Any]], PackedScheme | None] | None = None
    # Says from a config, and from whether the files hold weights in a format, what becomes of them on loading.
    loading: Callable[[Mapping[str, Any], Callable[[str], bool] | None], compressed.FormatLoading] | None = None

    def is_plain(self, settings: Mapping[str, Any]) -> bool:
        """Say whether a config means 16-bit weights in the files, with scales beside them that nothing is multiplied by yet."""
        return any(settings.get(key) in values for key, values in self.plain_when.items())

    @property
    def has_kernels(self) -> bool:
        """Whether rows of PACKED_KERNELS multiply its weights on a card, and of CPU_KERNELS on a processor."""
        return self.scheme is not None

    def unpacks_on(self, kind: str, capability: float | None) -> bool:
        """Say whether weights become 16-bit for lack of hardware on a "cpu" or "gpu" of this compute capability (None: unknown)."""
        old = kind == "gpu" and capability is not None and capability < self.packs_from
        return self.unpacked is not None and (kind not in self.packs_on or old)


class Foreign(Record, frozen=True, kw_only=True):
    """A method that transformers does not know, and what reads it."""

    title: str
    readers: str
