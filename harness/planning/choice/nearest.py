"""Where nothing fits, or only what is too slow to use: the nearest way that works.

By another precision or placement, with a package, with a checkpoint of another form, or on other hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from functools import lru_cache

from msgspec.structs import replace

from harness.architecture.model_spec import read_spec
from harness.catalog.resolve import of_name
from harness.core.errors import CheckpointError
from harness.core.methods.packages import asked_of_pip, how_to_install, lacking, quoted
from harness.core.placements import PLACEMENTS, distinct
from harness.core.precisions import DEFAULT_PRECISIONS, PRECISIONS, Precision, defaults
from harness.core.records import Case, Machine, Plan, Verdict, Workload
from harness.core.units import significant
from harness.machine.gpus import profile
from harness.planning.choice.search import promising
from harness.planning.other_form import published_in, published_wide, stored_for
from harness.planning.planner import Planner
from harness.planning.verdict import with_article

# Cards that people can get, smallest first; the last more than once.
_CARDS = ("RTX 3060 12GB", "RTX 4060 Ti 16GB", "RTX 4090", "RTX 5090", "L40S", "A100 80GB", "H100 PCIe 80GB", "H200 SXM")
_MOST_CARDS = 8
SLOW_TOK_S = 1.0  # below it nobody waits for an answer
READ_TOK_S = 10.0  # about as fast as people read
_MUCH = 2.0  # times as fast is worth another download
_HOST_RAM = 1 << 40  # enough that only the cards decide


Choose = Callable[[Sequence[Plan]], tuple[Plan, str] | None]


def nearest_way(planner: Planner, plans: Sequence[Plan], choose: Choose) -> str | None:
    """Say which way of loading a model comes closest where none of `plans` fits; None if nothing that is known here does.

    `choose` picks the best of plans that fit.
    """
    reasons = {one.why for one in plans if one.verdict is Verdict.INVALID}
    if planner.spec.packed is not None and len(reasons) == 1 and all(one.verdict is Verdict.INVALID for one in plans):
        return None  # no hardware helps, and the reason says what reads it
    if not plans or planner.judge.context_refusal(plans[0].case.workload):
        return None
    workload = plans[0].case.workload
    # On a machine that is only described no package is asked for: what was planned and does not fit, does not.
    known = set() if planner.here else {one.case for one in plans}
    return _here(planner, workload, choose, known) or _otherwise(planner, workload, choose)


def faster_way(planner: Planner, best: Plan, choose: Choose) -> str | None:
    """Say in a sentence what would make a model faster than SLOW_TOK_S whose best way here is slower; None if nothing is known.

    Of one that is read faster than it answers, whether it would be much faster unpacked: unpacking for each token takes long.
    """
    if best.estimate is None or best.estimate.decode_tok_s.best >= READ_TOK_S:
        return None
    speed = best.estimate.decode_tok_s.best
    if speed >= SLOW_TOK_S:
        unpacked = _unpacked(planner, best.case.workload, choose, _MUCH * speed)
        return f"Faster here: {unpacked}." if unpacked else None
    ways = _otherwise(planner, best.case.workload, choose, SLOW_TOK_S)
    return f"Faster than {SLOW_TOK_S:g} token a second: {ways}." if ways else None


def _otherwise(planner: Planner, workload: Workload, choose: Choose, least_tok_s: float = 0.0) -> str | None:
    """Say what else than this checkpoint on this machine would do."""
    stored = _stored_otherwise(planner, workload, choose, least_tok_s)
    unpacked = _unpacked(planner, workload, choose, least_tok_s)
    *most, last = [*filter(None, [stored, unpacked]), *_elsewhere(planner, workload, least_tok_s)] or [""]
    return f"{', '.join(most)} and {last}" if most else last or None


def _stored_otherwise(planner: Planner, workload: Workload, choose: Choose, least_tok_s: float) -> str | None:
    """Say in which form this machine would hold the model if it were stored so, how fast, who publishes it and what it needs."""
    planned = []
    for row in PRECISIONS.values():
        other = stored_for(planner.spec, row)
        if other is not None:
            there = Planner(other, planner.machine, here=False, constants=planner.constants, trust=planner.trust)
            # How much quality it keeps is by the rule, for this model is the measure of it.
            planned += [replace(one, kept_share=None) for one in promising(there, _cases(there, [row.name], workload))]
    chosen = choose([one for one in planned if one.estimate and one.estimate.decode_tok_s.best >= least_tok_s])
    if chosen is None or chosen[0].verdict is not Verdict.FITS or chosen[0].estimate is None:
        return None
    case, speed = chosen[0].case, chosen[0].estimate.decode_tok_s.best
    row = PRECISIONS[case.precision]
    published = published_in(planner.spec, row)
    who = f", published as {published[0]}" if published else ""
    asked = _asked_of_pip(planner, row)
    needs = f", needs pip install {quoted(asked)}" if asked else ""
    told = f"{significant(speed, 2)} tokens/s{who}{needs}"
    return f"{case.way} fits with {with_article(str(row.requires_checkpoint))} checkpoint ({told})"


def _unpacked(planner: Planner, workload: Workload, choose: Choose, least_tok_s: float) -> str | None:
    """Say which checkpoint holds a model unpacked that is stored packed, and how fast this machine would run it."""
    hub_id = published_wide(planner.spec)
    if hub_id is None:
        return None
    try:
        spec = read_spec(of_name(hub_id, hub_id))
    except CheckpointError:  # what is here of it is damaged, which its own plan says
        return None
    there = Planner(spec, planner.machine, here=planner.here, constants=planner.constants, trust=planner.trust)
    planned = [there.plan(case, in_words=False) for case in _cases(there, DEFAULT_PRECISIONS, workload) if there.can_hold(case)]
    chosen = choose([one for one in planned if one.estimate and one.estimate.decode_tok_s.best >= least_tok_s])
    if chosen is None or chosen[0].verdict is not Verdict.FITS or chosen[0].estimate is None:
        return None
    speed = significant(chosen[0].estimate.decode_tok_s.best, 2)
    return f"{hub_id}, the same model unpacked, fits as {chosen[0].case.way} ({speed} tokens/s)"


def _asked_of_pip(planner: Planner, row: Precision) -> list[str]:
    """Return the packages that a form needs: those that are missing here, or all on a machine that is only described."""
    form = stored_for(planner.spec, row)
    needs = form.adapted(row).needs if form is not None else ()
    return asked_of_pip(lacking(needs) if planner.here else needs)


def _here(planner: Planner, workload: Workload, choose: Choose, known: Set[Case]) -> str | None:
    """Say what else than the cases `known` not to fit does fit this machine: as it is, or once packages are installed."""
    anyhow = Planner(planner.spec, planner.machine, here=False, constants=planner.constants, trust=planner.trust)
    asked = dict.fromkeys((*defaults(planner.spec.stored_as), *DEFAULT_PRECISIONS, *PRECISIONS))
    # What needs a checkpoint of another form never fits as this one is.
    loadable = [name for name in asked if planner.spec.stored_as is not None or PRECISIONS[name].requires_checkpoint is None]
    cases = [case for case in _cases(anyhow, loadable, workload) if case not in known and anyhow.can_hold(case)]
    chosen = choose([anyhow.plan(case, in_words=False) for case in cases])
    if chosen is None:
        return None
    one = chosen[0]
    missing = lacking(planner.spec.adapted(PRECISIONS[one.case.precision]).needs) if planner.here else ()
    named = f"--precision {one.case.precision} --placement {one.case.placement}"
    return f"{named} fits with {how_to_install(missing)}" if missing else f"{named} fits"


def _elsewhere(planner: Planner, workload: Workload, least_tok_s: float) -> list[str]:
    """Return which card, or how many of the largest, the model would fit on as it is stored, and which in FP8 or 4 bits."""
    stored = planner.spec.stored_as is not None
    asked = (*defaults(planner.spec.stored_as, ("bf16",))[-1:], *(() if stored else ("fp8", "int4")))
    found: dict[str, str] = {}
    for precision in asked:
        machine = _smallest(planner, precision, workload, least_tok_s)
        if machine is not None:
            found.setdefault(_named(machine), f"{precision}/{_placement(machine)}")
    return [f"{case} fits {where}" for where, case in found.items()]


def _smallest(planner: Planner, precision: str, workload: Workload, least_tok_s: float) -> Machine | None:
    """Return the first of the machines on whose cards a precision fits and is as fast as asked.

    Those too small for the weights alone are passed over.
    """
    weights = 0
    for machine in _machines():
        if weights > sum(gpu.capacity_bytes or 0 for gpu in machine.gpus):
            continue
        case = Case(model=planner.spec.name, precision=precision, placement=_placement(machine), workload=workload)
        one = Planner(planner.spec, machine, here=False).plan(case, in_words=False)
        is_slow = one.estimate is not None and one.estimate.decode_tok_s.best < least_tok_s
        held = {name: tier.weights_bytes for name, tier in one.estimate.tiers.items()} if one.estimate else {}
        if one.verdict.is_good and not is_slow and not any(size for name, size in held.items() if not name.startswith("gpu")):
            return machine
        weights = sum(held.values())
    return None


def _placement(machine: Machine) -> str:
    return "direct" if len(machine.gpus) == 1 else "auto"


@lru_cache(maxsize=1)
def _machines() -> tuple[Machine, ...]:
    single = [profile([card], ram=_HOST_RAM) for card in _CARDS]
    return *single, *(profile([_CARDS[-1]] * count, ram=_HOST_RAM) for count in range(2, _MOST_CARDS + 1, 2))


def _named(machine: Machine) -> str:
    card = machine.gpus[0].model or machine.gpus[0].name
    return f"{len(machine.gpus)} cards like {card}" if len(machine.gpus) > 1 else f"a card like {card}"


def _cases(planner: Planner, precisions: Sequence[str], workload: Workload) -> Iterable[Case]:
    for placement in distinct(PLACEMENTS, len(planner.machine.gpus)):
        for precision in precisions:
            yield Case(model=planner.spec.name, precision=precision, placement=placement, workload=workload)
