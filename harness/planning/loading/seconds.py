"""What loading a case takes, by what is done, from the page cache and from the disk; and what would make a slow load faster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from harness.core.precisions import PRECISIONS
from harness.core.records import Estimate, Plan
from harness.core.units import format_seconds, format_share, format_size
from harness.planning.cost.speed import IN_CACHE, ON_DISK, LoadTime, load_time
from harness.planning.planner import Planner

READY = "Ready is load and first token: at first from the disk, again while the page cache holds the files."
READY_EACH_TIME = "Ready is load and first token, from the disk each time: the page cache has no room for the files."
SLOW_S = 10.0  # a load that takes less needs no advice
MOST = 0.5  # of it: what takes more is what to change
# Who writes what it has quantized in a form that transformers loads again (`is_serializable` of its quantizer).
_SAVED_BY = ("load_in_4bit", "load_in_8bit")


def timed(planner: Planner, one: Plan) -> LoadTime | None:
    """Return the seconds of loading a case by what is done; None where nothing is known of it."""
    found = planner.timings.get(one.case.id)
    return load_time(found) if found is not None and one.estimate is not None else None


def ready_in(expected: Estimate) -> str:
    """Say when a case is ready at first and again; `ready_means` says what that is."""
    spent = {files: format_seconds(span.best) for files, span in expected.ready_s.items()}
    again = f", again in {spent[IN_CACHE]}" if IN_CACHE in spent else ""
    return f"ready in {spent[ON_DISK]}{again}"


def load_takes(expected: Estimate) -> str:
    """Say how long loading takes from the disk, without the first token, whose time is that of the longest prompt planned for."""
    low, best, high = (format_seconds(seconds) for seconds in (expected.load_s.low, expected.load_s.best, expected.load_s.high))
    return f"about {best} ({low} to {high}), less while the page cache holds the files"


def ready_times(shown: Iterable[Plan]) -> set[str]:
    """Return where the files of some cases can come from when one of them is loaded: ON_DISK, IN_CACHE."""
    return {files for one in shown if one.estimate is not None for files in one.estimate.ready_s}


def ready_means(shown: Iterable[Plan]) -> str:
    """Say what the times until these cases are ready are; empty if none has one."""
    times = ready_times(shown)
    return READY if IN_CACHE in times else READY_EACH_TIME if times else ""


def speed_up(planner: Planner, one: Plan) -> str | None:
    """Say in a sentence what to change where a load is slow and one thing makes it so."""
    footprint, time = planner.footprints.get(one.case.id), timed(planner, one)
    if footprint is None or time is None or time.cold_s.best < SLOW_S:
        return None
    done = {**time.by_phase, "read": time.read_s.best}
    slowest = max(done, key=done.__getitem__)
    share = done[slowest] / time.cold_s.best
    if share < MOST or (slowest == "quantize" and not _can_be_saved(one)):
        return None
    is_mapped = footprint.spec.file_format == "safetensors"
    wording = _ADVICE.get("read whole" if slowest == "read" and not is_mapped else slowest)
    size = format_size(footprint.spec.checkpoint_bytes)
    return wording and wording.format(share=format_share(share), size=size, dtype=footprint.fmt.dtype)


def _can_be_saved(one: Plan) -> bool:
    asked = PRECISIONS[one.case.precision].quantization
    return isinstance(asked, Mapping) and any(key in asked for key in _SAVED_BY)


_ADVICE = {
    "read": "{share} of the first load is reading {size} from the disk: copy the files to the fastest local disk",
    "read whole": "{share} of the first load is reading {size}: save it as safetensors (model.save_pretrained), which is mapped",
    "cast": "{share} of the first load is casting to {dtype}: save it in that once (model.save_pretrained), and load that",
    "quantize": "{share} of the first load is quantizing: save what you have loaded (model.save_pretrained), and load that",
}
