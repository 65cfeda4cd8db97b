"""OPTIMIZERS: what each keeps of a parameter and takes for a step; what is trained, and what one traced step held."""

from __future__ import annotations

import math
from collections.abc import Mapping

from harness.core.records import Record

TRAINING_METHODS: Mapping[str, str] = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
DEFAULT_OPTIMIZER = "adamw_torch_fused"  # of TrainingArguments
_BLOCK, _LEAST_IN_8_BITS = 256, 4096  # bitsandbytes 0.50, optim/optimizer.py: elements that share a scale; smaller stay in float32


class Trainable(Record, frozen=True, kw_only=True, array_like=True):
    """Parameters that are trained: one shape, bytes an element, how many there are so, whether they are rows of an embedding."""

    shape: tuple[int, ...]
    itemsize: int
    count: int = 1
    embeds: bool = False

    @property
    def elements(self) -> int:
        """Of all of them."""
        return self.count * math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of all of them: parameters, and as many again for their gradients."""
        return self.elements * self.itemsize


class Optimizer(Record, frozen=True, kw_only=True):
    """One row, under the name that TrainingArguments has for it; held against the optimizers themselves by a test.

    `paged`: its states lie in managed memory, and go to RAM where the card is full. `factored`: of a matrix a row and a column.
    """

    name: str
    states: int  #: how many values it keeps of each element
    itemsize: int | None = None  #: bytes of such a value; None: as the parameter
    paged: bool = False
    factored: bool = False
    copies: int = 0  #: values of each element, as wide as the parameter, that a step makes of all parameters at once
    scratch: Mapping[int, int] = {}  #: bytes an element of the largest parameter that a step makes, by the parameter's own

    def state_bytes(self, one: Trainable) -> int:
        """Return the bytes that it keeps of some parameters."""
        each = math.prod(one.shape)
        if self.factored and len(one.shape) > 1:
            kept = (math.prod(one.shape[:-1]) + math.prod((*one.shape[:-2], one.shape[-1]))) * (self.itemsize or one.itemsize)
        elif self.itemsize == 1:  # Trainer keeps those of embeddings in 32 bits (Trainer.create_optimizer)
            kept = each * 4 if one.embeds or each < _LEAST_IN_8_BITS else each + 4 * -(-each // _BLOCK)
        else:
            kept = each * (self.itemsize or one.itemsize)
        return one.count * self.states * kept

    def step_bytes(self, trained: tuple[Trainable, ...]) -> int:
        """Return the bytes that a step takes beside parameters, gradients and states."""
        whole = self.copies * sum(one.nbytes for one in trained)
        return max([whole, *(self.scratch.get(one.itemsize, 0) * math.prod(one.shape) for one in trained)])


_ROWS = (
    Optimizer(name="adamw_torch_fused", states=2),
    Optimizer(name="adamw_torch", states=2, copies=1),
    Optimizer(name="adamw_8bit", states=2, itemsize=1),
    Optimizer(name="paged_adamw_8bit", states=2, itemsize=1, paged=True),
    Optimizer(name="paged_adamw_32bit", states=2, itemsize=4, paged=True),
    Optimizer(name="lion_32bit", states=1, itemsize=4),
    Optimizer(name="lion_8bit", states=1, itemsize=1),
    Optimizer(name="adafactor", states=1, itemsize=4, factored=True, scratch={2: 17, 4: 9}),
    Optimizer(name="sgd", states=0),
)
OPTIMIZERS: Mapping[str, Optimizer] = {row.name: row for row in _ROWS}


class TrainingSetup(Record, frozen=True, kw_only=True):
    """What is trained on one card, how, and on how many tokens at a time.

    `targets` are the last names of the Linears that have adapters, in float32; weights are in 16 bits, or for qlora in nf4.
    """

    method: str  #: of TRAINING_METHODS
    sequence_length: int
    batch: int = 1
    rank: int = 16
    targets: tuple[str, ...] = ()
    checkpointing: bool = False
    optimizer: str = DEFAULT_OPTIMIZER

    @property
    def precision(self) -> str:
        """The row of the table of precisions in which the weights are loaded."""
        return "nf4-dq" if self.method == "qlora" else "bf16"


class TracedStep(Record, frozen=True, kw_only=True):
    """What forward and backward hold on a card, without the optimizer: bytes before them, and by what they are at their peak.

    `fragmentation_bytes` is what torch's allocator needs beyond all that. `source` names the libraries that ran.
    """

    weights_bytes: int
    adapters_bytes: int
    gradients_bytes: int
    activations_bytes: int
    logits_bytes: int
    temporary_bytes: int
    fragmentation_bytes: int
    trained: tuple[Trainable, ...]
    source: str

    @property
    def peak_bytes(self) -> int:
        """All that is alive at the peak."""
        held = self.weights_bytes + self.adapters_bytes
        return held + self.gradients_bytes + self.activations_bytes + self.logits_bytes + self.temporary_bytes
