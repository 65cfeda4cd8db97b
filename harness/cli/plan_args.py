"""What the planning commands share: parsing cases, and planning one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from harness.core.attention import ATTENTIONS, KV_FORMS
from harness.core.errors import UsageError, did_you_mean
from harness.core.options import RESULTS
from harness.core.placements import PLACEMENTS, distinct
from harness.core.precisions import PRECISIONS, defaults
from harness.core.records import USUAL_KV, Case, Workload
from harness.core.text import print_note
from harness.machine.garbage import uncollected

if TYPE_CHECKING:
    from pathlib import Path

    from harness.catalog.resolve import Source
    from harness.core.records import Machine, Result
    from harness.planning.calibration import Calibration
    from harness.planning.choice.recommend import Recommendation
    from harness.planning.device_map.infer import Device

FITS, NOTHING_FITS, USAGE = 0, 1, 2
# Options that apply to training alone: on one card, of adapters, on many.
ON_ONE_CARD, OF_ADAPTERS = ("optimizer", "gradient-checkpointing", "sequence-length"), ("rank", "target-modules")
ABOUT_TRAINING = (*ON_ONE_CARD, *OF_ADAPTERS, "nodes")


class AskedCase(NamedTuple):
    """One case as it is asked for; what is None is the question's."""

    precision: str
    placement: str
    kv: str | None = None
    attention: str | None = None


def asked_case(text: str) -> AskedCase:
    """Read a case, "int8/direct", "bf16/cpu@kv-fp8@eager" or a whole id.

    Raises:
        UsageError: there is no such case.
    """
    precision, _, place = text.rpartition("/")
    precision = precision.rpartition("/")[2]
    placement, *more = place.split("@")
    kv = next((name for name in KV_FORMS if f"kv-{name}" in more), None)
    attention = next((name for name in ATTENTIONS if name in more), None)
    unknown = [word for word in more if word not in (f"kv-{kv}", attention)]
    if "/" not in text:
        raise UsageError(f"no case {text!r}: write PRECISION/PLACEMENT, such as int4/cpu")
    for what, given, table in (("precision", precision, PRECISIONS), ("placement", placement, PLACEMENTS)):
        if given not in table:
            raise UsageError(f"no case {text!r}: unknown {what} {given!r}: {did_you_mean(given, table)}")
    if unknown:
        known = [*(f"kv-{name}" for name in KV_FORMS), *ATTENTIONS]
        raise UsageError(f"no case {text!r}: after @ comes how it generates; {did_you_mean(unknown[0], known)}")
    return AskedCase(precision, placement, kv, attention)


def earlier_results(named: Path | None) -> list[Result]:
    """Return the results in a directory that is named, or in the usual one if there are any.

    Raises:
        UsageError: a directory is named, and has none.
    """
    directory = named or RESULTS
    if not (directory / "results.jsonl").is_file():
        if named:
            raise UsageError(f"--results {directory}: no results.jsonl in this directory")
        return []
    from harness.results import store

    return store.read_telling(store.file_of(directory), print_note)


def constants(results: Sequence[Result], machine: Machine) -> Calibration:
    """Return the constants by what was calibrated on this machine and by earlier results of it."""
    from harness.planning.calibrating import kept_calibration

    return kept_calibration.corrected(results, machine)


class PlanQuestion(NamedTuple):
    """What is asked of a model; what is empty is the default."""

    cases: Sequence[AskedCase] = ()  #: single cases
    precisions: Sequence[str] | None = None
    placements: Sequence[str] = ()
    device_map: Mapping[str, Device] | None = None  #: the user's own
    kv: Sequence[str] = (USUAL_KV,)
    attention: Sequence[str | None] = (None,)
    search: bool = False  #: whether the best ways are searched for, whatever is named above
    least_tok_s: float = 0.0  #: of a search, tokens/s that a way must reach
    trust: bool = False  #: whether code that comes with the model may run
    traces: bool = False  #: whether what no record is of is traced now, by a worker
    results: Sequence[Result] = ()  #: earlier ones, which say what quality ways keep
    in_context: bool = False  #: whether images are among the tokens of the prompt, and not on top of them

    @property
    def is_open(self) -> bool:
        """Whether no way of loading is named: then the best there is answers it."""
        named = (self.cases, self.precisions, self.placements, self.device_map)
        return not any(named) and (*self.kv, *self.attention) == (USUAL_KV, None)


@uncollected()
def advise_on(
    source: Source,
    machine: Machine,
    workload: Workload,
    question: PlanQuestion,
    calibration: Calibration | None,
) -> Recommendation:
    """Plan the cases of a question, else every precision with every placement: the default ones if none are named.

    `calibration` is None for a machine that is only described, not this one.

    Raises:
        UsageError, CheckpointError: the model is not found or cannot be planned, or the map does not match it.
    """
    from harness.architecture import model_spec
    from harness.planning.choice.recommend import advise, advise_best, advise_usual
    from harness.planning.device_map import user_map
    from harness.planning.planner import Planner

    spec = model_spec.read_spec(source)
    if question.device_map is not None:
        user_map.check_map(question.device_map, spec.skeleton, len(machine.gpus), model=spec.name)
    if workload.images:
        from harness.planning.images import with_images

        spec, workload = with_images(spec, source, workload, in_context=question.in_context)
    here = calibration is not None
    planner = Planner(spec, machine, here=here, constants=calibration, trust=question.trust, device_map=question.device_map)
    if question.results:
        from harness.planning.quality import known_quality

        planner.known_quality = known_quality(planner.spec, question.results)
    if question.search:
        return advise_best(source, planner, workload, question.least_tok_s)
    places = question.placements or distinct(PLACEMENTS, len(machine.gpus))
    asked = question.precisions or defaults(spec.stored_as)
    pairs = question.cases or [AskedCase(precision, placement) for precision in asked for placement in places]
    cases = [
        Case(model=spec.name, precision=one.precision, placement=one.placement, workload=workload, kv=kv, attention=attention)
        for one in pairs
        for kv in ([one.kv] if one.kv else question.kv)
        for attention in ([one.attention] if one.attention else question.attention)
    ]
    if question.traces and (untraced := planner.untraced(cases)):
        from harness.core.progress import show_progress

        with show_progress() as report:
            planner.trace(untraced, report)
    return advise_usual(source, planner, cases) if question.is_open else advise(source, planner, cases)
