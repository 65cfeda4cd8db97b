"""How much more than is allocated torch's allocator needs and keeps: replayed for workloads of many sizes, summed up in shares.

How blocks of a model fall into one another changes from one length of the prompt to the next, by a quarter of what is allocated and
without a rule that would be shorter than the replay. What is told of a model is therefore the middle and both ends of some sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import median
from typing import Any, NamedTuple

from harness.architecture.card_kernels import WITH_FLASH, CardKernels, kernels_of
from harness.architecture.traced_memory import Gaps, Reserved, Spread
from harness.worker.trace import fake_model, kernels, workload
from harness.worker.trace.allocator import Replayed, needs, round_size
from harness.worker.trace.fake_model import Layers
from harness.worker.trace.ledger import Ledger, fake_card
from harness.worker.trace.whole import Events, stand_ins, whole

# Batch and prompt: from where segments of 20 MiB are no longer most of it, powers of two and others.
SIZES = ((1, 1024), (1, 1500), (2, 1100), (1, 3000), (1, 4096), (4, 1500), (1, 8192), (8, 1500), (8, 2048), (4, 7000))
GENERATED = 4


class Weights(NamedTuple):
    """What lies on a card before anything runs: the size of every tensor, which loading puts into one block."""

    sizes: list[int]

    @classmethod
    def on(cls, ledger: Ledger) -> Weights:
        """Read from a ledger what is alive."""
        live: dict[int, None] = {}
        for event in ledger.events:
            if event >= 0:
                live[event] = None
            else:
                del live[~event]
        return cls([ledger.allocations[number].nbytes for number in live])

    def before(self, events: Events) -> Events:
        """Return the events of a run behind those that allocate the weights."""
        count = len(self.sizes)
        moved = (event + count if event >= 0 else event - count for event in events.events)
        return Events([*self.sizes, *events.sizes], [*range(count), *moved])


class ReplayedWorkload(NamedTuple):
    """One workload without and with expandable segments; `held` are the bytes alive at its peak beside those of the weights."""

    held: int
    weights: int
    usual: Replayed
    expandable: Replayed


def replay_workload(
    ledger: Ledger, model: Any, layers: Layers | None, stands: Sequence[int], weights: Weights, size: tuple[int, int, int]
) -> ReplayedWorkload:
    """Trace a workload (batch, prompt, new tokens) of some layers and replay that of all."""
    traced = workload.run(ledger, model, layers, *size)
    plain = Events([one.nbytes for one in traced.allocations], traced.events)
    events = weights.before(whole(traced, stands) if layers is not None else plain)
    own = sum(round_size(nbytes) for nbytes in weights.sizes if nbytes)
    usual, expandable = (needs(*events, own, expandable=option) for option in (False, True))
    return ReplayedWorkload(_peak(events) - own, own, usual, expandable)


def _peak(events: Events) -> int:
    """Return the most bytes alive at once, without what is lost where the rest of a block is not worth splitting off."""
    signs = (1 if event >= 0 else -1 for event in events.events)
    sizes = (events.sizes[max(event, ~event)] for event in events.events)
    return max(accumulate(sign * round_size(nbytes) for sign, nbytes in zip(signs, sizes, strict=True) if nbytes))


def reserved(
    ledger: Ledger, model: Any, layers: Layers | None, stands: Sequence[int], weights: Weights, card: CardKernels
) -> Reserved | None:
    """Replay workloads of SIZES on a card and return what is needed and kept beyond what is allocated, as shares of that.

    None where some layers do not stand for all.
    """
    try:
        with kernels.chosen_as_on(card, ledger, whole=False):
            workload.run(ledger, model, layers, 1, 3, 2)  # what is made once and kept is there before a trace begins
            cases = [replay_workload(ledger, model, layers, stands, weights, (*size, GENERATED)) for size in SIZES]
    except ValueError:  # of `whole`: a layer frees what another has made
        return None
    return Reserved(
        usual=_gaps((case.usual, case) for case in cases),
        expandable=_gaps((case.expandable, case) for case in cases),
    )


def reserved_of(config: Mapping[str, Any], precision: str, capability: str = WITH_FLASH) -> Reserved | None:
    """Build an architecture in a precision and replay it, which takes seconds where a record takes longer.

    Raises:
        ValueError: transformers has no class for it, or no trace is made in this precision.
    """
    card, model = kernels_of(capability), fake_model.build_fake(config, precision, capability=capability)
    with fake_card({}, card.capability) as ledger:
        fake_model.place_on_card(model)
        weights, layers = Weights.on(ledger), fake_model.layers_of(model)
        kinds = layers.kinds if layers is not None else (0,)
        chosen = fake_model.representatives(kinds)
        kept = fake_model.keep(model, layers, chosen) if layers is not None else None
        return reserved(ledger, model, kept, stand_ins(kinds, chosen), weights, card)


def _gaps(found: Iterable[tuple[Replayed, ReplayedWorkload]]) -> Gaps:
    rows = [[(size - case.weights) / case.held - 1 for size in (one.least, one.reserved)] for one, case in found]
    least, kept = (_spread(column) for column in zip(*rows, strict=True))
    return Gaps(least=least, kept=kept)


def _spread(shares: Sequence[float]) -> Spread:
    low, best, high = (round(share, 3) for share in (min(shares), median(shares), max(shares)))
    return low, best, high
