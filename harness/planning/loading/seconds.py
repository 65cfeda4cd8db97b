"""What loading a case takes, by what is done, from the page cache and from the disk; and what would make a slow load faster."""

from __future__ import annotations

from collections.abc import Mapping

from harness.core.precisions import PRECISIONS
from harness.core.records import Plan
from harness.core.units import format_share, format_size
from harness.planning.cost.speed import LoadTime, load_time
from harness.planning.cost.work import count_work
from harness.planning.planner import Planner

SLOW_S = 10.0  # a load that takes less needs no advice
MOST = 0.5  # of it: what takes more is what to change
# Who writes what it has quantized in a form that transformers loads again (`is_serializable` of its quantizer).
_SAVED_BY = ("load_in_4bit", "load_in_8bit")


def timed(planner: Planner, one: Plan) -> LoadTime | None:
    """Return the seconds of loading a case by what is done; None where nothing is known of it."""
    footprint = planner.footprints.get(one.case.id)
    if footprint is None or one.estimate is None:
        return None
    work = count_work(footprint, one.case.precision, planner.machine)
    return load_time(work, footprint.workload, planner.machine, footprint.calibration)


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
    "read": "{share} of a cold load is reading {size} from the disk: copy the files to the fastest local disk",
    "read whole": "{share} of a cold load is reading {size}: save it as safetensors (model.save_pretrained), which is mapped",
    "cast": "{share} of a cold load is casting to {dtype}: save it in that once (model.save_pretrained), and load what you saved",
    "quantize": "{share} of a cold load is quantizing: save what you have loaded (model.save_pretrained), and load that",
}
