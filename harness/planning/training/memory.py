"""What training a model on one card takes: a traced step, and the optimizer's arithmetic on top.

A worker traces forward and backward of this very setup on fake tensors (`harness.worker.training`), once: the answer is kept.
Torch is never imported here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from harness.architecture.ask_worker import ask_worker
from harness.architecture.model_spec import ModelSpec
from harness.architecture.skeleton import Skeleton, is_stacked
from harness.core.errors import UsageError, did_you_mean
from harness.core.families import is_native
from harness.core.records import Machine, Tier, Verdict
from harness.core.training.setup import OPTIMIZERS, TracedStep, TrainingSetup
from harness.machine.cache import cache_dir, keep, kept
from harness.planning.calibration import Bytes, default, gpu_context

STEP_S = 600.0
BF16_SINCE = (8, 0)  # compute capability; on older cards weights are float16, which Trainer's scaler refuses to train
# Names that peft 0.21 takes for the routed experts where these are stacked (utils/transformers_weight_conversion.py).
OF_EXPERTS = frozenset(("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
_KEPT = "step1"


class TrainingPlan(NamedTuple):
    """One setup on one card. `parts` are bytes on the card at the peak by what they are, in the order of a table.

    `paged` are bytes of the optimizer that go to RAM where the card is full. `needed` is the peak with its interval.
    """

    setup: TrainingSetup
    card: Tier
    step: TracedStep
    parts: Mapping[str, int]
    paged: int
    needed: Bytes

    @property
    def trained(self) -> int:
        """The number of parameters that are trained."""
        return sum(one.elements for one in self.step.trained)

    @property
    def peak_bytes(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def verdict(self) -> Verdict:
        """Whether it fits the card: all of the interval, its middle, or not."""
        capacity = self.card.capacity_bytes
        if capacity is None:
            return Verdict.UNKNOWN
        return Verdict.FITS if self.needed.high <= capacity else Verdict.TIGHT if self.needed.best <= capacity else Verdict.TOO_BIG


def plan_training(spec: ModelSpec, machine: Machine, setup: TrainingSetup) -> TrainingPlan:
    """Plan a setup, whose targets are settled, on the card with the most memory.

    Raises:
        UsageError: the model, or a card of this kind, cannot be trained so.
    """
    card = largest_card(machine)
    step = traced_step(spec, setup, card)
    optimizer = OPTIMIZERS[setup.optimizer]
    states = sum(optimizer.state_bytes(one) for one in step.trained)
    gradients = sum(one.nbytes for one in step.trained)
    here = 0 if optimizer.paged else states
    at_rest = step.weights_bytes + step.adapters_bytes
    parts = {"weights": step.weights_bytes, "adapters": step.adapters_bytes, "optimizer": here}
    scratch = optimizer.step_bytes(step.trained)
    if at_rest + gradients + scratch > step.peak_bytes:  # the optimizer's own step is the worst moment
        parts |= {"gradients": gradients, "activations": 0, "logits and loss": 0, "temporary": scratch}
    else:
        parts |= {"gradients": step.gradients_bytes, "activations": step.activations_bytes}
        parts |= {"logits and loss": step.logits_bytes, "temporary": step.temporary_bytes}
    parts["fragmentation"] = step.fragmentation_bytes
    around = gpu_context(machine).amount() + default()["gpu_workspace_bytes"].amount()
    parts["CUDA context"] = round(around.best)
    held = sum(parts.values()) - parts["CUDA context"]
    return TrainingPlan(setup, card, step, parts, states - here, Bytes(low=held, best=held, high=held) + around)


def largest_card(machine: Machine) -> Tier:
    """Return the card with the most memory.

    Raises:
        UsageError: the machine has none.
    """
    if not machine.gpus:
        raise UsageError('--training needs a GPU, and this machine has none: describe one, e.g. --gpu "RTX 3090"')
    return max(machine.gpus, key=lambda gpu: gpu.capacity_bytes or 0)


def settled(spec: ModelSpec, machine: Machine, setup: TrainingSetup) -> TrainingSetup:
    """Return a setup with the names of its targets, after a look at what the model and the card can do.

    Raises:
        UsageError: they cannot; the sentence says what they have.
    """
    refused = _refusal(spec, largest_card(machine), setup)
    if refused is not None:
        raise UsageError(refused)
    if setup.method == "full":
        return setup
    names = linear_names(spec.skeleton)
    unknown = [name for name in setup.targets if name not in names]
    if unknown:
        there = f"it has {', '.join(names)}"
        near = did_you_mean(unknown[0], names) if names else "LoRA does not apply to it"
        raise UsageError(f"--target-modules: {spec.name} has no Linear called {unknown[0]!r}: {near}; {there}")
    if not names:
        raise UsageError(
            f"--training {setup.method}: {spec.name} has no Linear beside which adapters could stand: try --training full"
        )
    return msgspec.structs.replace(setup, targets=setup.targets or names)


def _refusal(spec: ModelSpec, card: Tier, setup: TrainingSetup) -> str | None:
    longest, length = spec.context_length, setup.sequence_length
    if longest is not None and length > longest:
        return f"--sequence-length {length} is beyond the context of {spec.name}, {longest} tokens: lower it"
    if spec.stored_as is not None or not spec.config or not spec.has_class or is_native(spec.config):
        stored = f"is stored as {spec.stored_as}" if spec.stored_as else "has no class in transformers"
        return f"--training {setup.method}: {spec.name} {stored}, and training starts from 16-bit weights: name the original model"
    since = tuple(map(int, (card.compute_capability or "8.0").split(".")))
    if setup.method == "full" and since < BF16_SINCE:
        named = f"{card.model or card.name} has compute capability {card.compute_capability}"
        return f"--training full needs bfloat16 (compute capability 8.0), and {named}: try --training lora"
    return None


def linear_names(skeleton: Skeleton) -> tuple[str, ...]:
    """Return the names of the Linears that adapters may stand beside, in the order of the model: all but the head.

    Where routed experts are stacked they are no Linears, and peft takes the names of some for them.
    """
    stacked = any(is_stacked(weight) for weight, _ in skeleton.tally)
    blocks = (module for kind in skeleton.kinds for module in kind.inside if module.block.linear and not module.block.exempt)
    names = dict.fromkeys(module.path.rpartition(".")[2] for module in blocks)
    return tuple(name for name in names if not (stacked and name in OF_EXPERTS))


def left_out(skeleton: Skeleton, setup: TrainingSetup) -> str | None:
    """Say what of a model gets no adapters though all Linears do: routed experts that are stacked parameters; None if nothing."""
    if setup.method == "full" or not any(is_stacked(weight) for weight, _ in skeleton.tally):
        return None
    packed = " and stay in 16 bits" if setup.method == "qlora" else ""
    return f"Routed experts get no adapters{packed}: they are stacked parameters, and peft stands beside Linears."


def traced_step(spec: ModelSpec, setup: TrainingSetup, card: Tier) -> TracedStep:
    """Return what a step holds, as it was traced once, else have a worker trace it (seconds) and keep it.

    Raises:
        UsageError: the worker could not trace it.
    """
    from importlib.metadata import version  # slow to import

    forward = msgspec.structs.replace(setup, optimizer=next(iter(OPTIMIZERS)))  # of which a trace knows nothing
    asked = {"config": spec.config, "setup": msgspec.to_builtins(forward), "capability": card.compute_capability or "8.0"}
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    place = cache_dir() / f"{_KEPT}-{version('transformers')}-{version('torch')}-{key}.json"
    found = kept(place, TracedStep)
    if found is not None:
        return found
    text = ask_worker("training", asked, f"--training {setup.method}: no trace of {spec.name}", STEP_S)
    keep(place, text)
    return msgspec.json.decode(text, type=TracedStep)
