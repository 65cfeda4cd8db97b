"""What torch's allocator takes of a card beyond what it hands out, and the option that decides whether a case fits."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from harness.architecture.traced_memory import Gaps
from harness.core.records import Plan, Tier, TierEstimate, Verdict
from harness.core.units import GIB
from harness.machine.gpus import profile
from harness.planning.calibration import default
from harness.planning.code import loading_program
from harness.planning.cost.fragmentation import SEGMENT_BYTES, fragmentation
from tests.planning.test_cost import case, planner

OPTION = 'import os\n\nos.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")'
LOAD = 64, 512  # batch, prompt


def plan(gpu_bytes: int, system: str | None = None, of: str = "bf16/direct") -> Plan:
    """Plan a workload whose KV cache is large, on a card of this size."""
    gpu = Tier(name="gpu:0", kind="gpu", total_bytes=gpu_bytes, free_bytes=gpu_bytes)
    bare = profile([], ram=64 * GIB)
    machine = replace(bare, tiers=(gpu, *bare.tiers), cores=2, system=system)
    asked = case(of)
    load = replace(asked.workload, batch=LOAD[0], prompt_tokens=LOAD[1])
    return planner(machine=machine).plan(replace(asked, workload=load))


def on_gpu(found: Plan) -> TierEstimate:
    assert found.estimate is not None
    return found.estimate.tiers["gpu:0"]


def test_a_record_says_what_its_model_takes_and_the_constants_what_others_do() -> None:
    gaps = Gaps(least=(0.1, 0.2, 0.3), kept=(0.2, 0.4, 0.6))
    least, kept = fragmentation(gaps, default(), 10e9, expandable=False)
    assert (least.low, least.best, least.high) == pytest.approx((1e9, 2e9, 3e9 + SEGMENT_BYTES))
    assert kept.best == pytest.approx(4e9)
    usual, expandable = (fragmentation(None, default(), 10e9, expandable=option)[0] for option in (False, True))
    assert expandable.best < usual.best / 3


def test_a_segment_is_the_least_that_is_taken_and_nothing_of_nothing() -> None:
    least, _ = fragmentation(None, default(), 1e6, expandable=False)
    assert least.best == SEGMENT_BYTES
    assert fragmentation(None, default(), 0, expandable=False)[0].high == 0


def test_what_is_cached_counts_where_there_is_room_and_goes_where_there_is_none() -> None:
    roomy = on_gpu(plan(640 * GIB))
    assert roomy.needed_bytes < roomy.peak_bytes < roomy.high_bytes
    short = on_gpu(plan(roomy.peak_bytes - 2 * SEGMENT_BYTES, "Windows 11"))
    assert short.needed_bytes == roomy.needed_bytes < short.peak_bytes == short.capacity_bytes


def test_the_code_turns_on_what_lets_a_case_fit_and_the_verdict_says_so() -> None:
    usual = on_gpu(plan(640 * GIB))
    for size in (usual.needed_bytes - 8, usual.needed_high_bytes - 8):  # too big, tight
        found = plan(size)
        assert found.verdict is Verdict.FITS
        assert found.expandable_segments
        assert found.why is not None
        assert found.why.startswith("fits gpu:0 with expandable segments, which the code turns on: torch's usual ones need ")
        assert on_gpu(found).needed_high_bytes <= size
        assert loading_program("MODEL = 'x'\n\n", found).startswith(f"{OPTION}  # else it may not fit\n\nMODEL")
        ordered = loading_program("MODEL = 'x'\n\n", found, in_order=True)
        assert ordered.index("CUDA_DEVICE_ORDER") < ordered.index("PYTORCH_ALLOC_CONF") < ordered.index("MODEL")
        assert ordered.count("import os") == 1


def test_windows_has_no_expandable_segments_and_is_told_what_it_lacks() -> None:
    size = on_gpu(plan(640 * GIB)).needed_high_bytes - 8
    found = plan(size, "Windows 11")
    assert found.verdict is Verdict.TIGHT
    assert not found.expandable_segments
    assert found.why is not None
    assert found.why.endswith("It would fit with expandable segments, which torch does not have on Windows.")


def test_where_they_decide_nothing_the_code_leaves_them_off() -> None:
    for size in (640 * GIB, 1 * GIB):  # fits without, and does not fit with
        found = plan(size)
        assert not found.expandable_segments
        assert "PYTORCH_ALLOC_CONF" not in loading_program("", found)


def test_a_machine_without_a_card_is_not_asked() -> None:
    machine = replace(profile([], ram=1 * GIB), cores=2)
    assert not planner(machine=machine).plan(case("bf16/cpu")).expandable_segments
