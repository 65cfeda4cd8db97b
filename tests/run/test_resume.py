"""What is kept from an earlier run, and why the rest runs again."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from harness.core.records import Case, Machine, Outcome, Quality, Result, Tier, Verdict
from harness.core.units import GIB
from harness.results import selection
from harness.run import resume
from harness.run.resume import Kept
from tests.support import builders

CODE = 'model = load(MODEL, max_memory={"cpu": 1000})\n'


def earlier(of: Case | None = None, **changes: Any) -> Result:
    """A result that is whole."""
    of = of or builders.case(repeats=2)
    given: dict[str, Any] = {
        "metrics": {"load_s": 1.5},
        "samples": {"round_s": [0.1, 0.1]},
        "quality": Quality(probe="1", verdict="intact", why="is the reference"),
        "fingerprint": "abc",
        "allowed_s": {"case-timeout": 60.0},
        "environment": {"torch": "2.6.0", "python": "3.11.7"},
        "code": CODE,
    }
    return builders.result(of, **given | changes)


def now(**changes: Any) -> Result:
    """What can be said of the same case before it runs."""
    given: dict[str, Any] = {"outcome": Outcome.SKIPPED, "stage": "plan", "metrics": {}, "samples": {}, "quality": None}
    return earlier(**given | changes)


def with_tier(machine: Machine, name: str, **changes: Any) -> Machine:
    tiers = tuple(replace(tier, **changes) if tier.name == name else tier for tier in machine.tiers)
    return replace(machine, tiers=tiers)


@pytest.mark.parametrize(
    ("then", "here"),
    [
        pytest.param({}, {}, id="the same"),
        pytest.param({"outcome": Outcome.UNSUPPORTED}, {}, id="not supported"),
        pytest.param({"outcome": Outcome.OOM}, {}, id="out of memory"),
        pytest.param({"outcome": Outcome.OOM, "failed": ["test_load"]}, {}, id="an out-of-memory that was a surprise"),
        pytest.param({"outcome": Outcome.TIMEOUT}, {"allowed_s": {"case-timeout": 60.0}}, id="timed out, with the limit of now"),
        pytest.param({"outcome": Outcome.TIMEOUT}, {"allowed_s": {"case-timeout": 10.0}}, id="timed out, with a longer limit"),
        pytest.param({}, {"allowed_s": {"case-timeout": 10.0}}, id="worked, with a longer limit"),
        pytest.param({}, {"code": CODE.replace("1000", "2000")}, id="less memory free"),
        pytest.param({}, {"code": None}, id="too big now, but measured"),
        pytest.param({}, {"machine": with_tier(builders.machine(), "cpu", free_bytes=GIB, bytes_per_s=1e9)}, id="other RAM free"),
        pytest.param({}, {"machine": builders.machine(ram_bytes=16 * GIB + 4096)}, id="a page more of RAM"),
        pytest.param(
            {"outcome": Outcome.OOM},
            {"machine": with_tier(builders.machine(), "disk", free_bytes=GIB)},
            id="out of memory, other disk free",
        ),
        pytest.param(
            {"outcome": Outcome.OOM, "machine": with_tier(builders.machine(), "cpu", free_bytes=10 * GIB)},
            {"machine": with_tier(builders.machine(), "cpu", free_bytes=10 * GIB + GIB // 2)},
            id="out of memory, some more of it free",
        ),
    ],
)
def test_what_still_holds_is_kept(then: dict[str, Any], here: dict[str, Any]) -> None:
    assert resume.why_again(earlier(**then), now(**here)) is None


@pytest.mark.parametrize(
    ("then", "here", "why"),
    [
        pytest.param({"outcome": Outcome.CRASH}, {}, "crashed", id="crash"),
        pytest.param({"outcome": Outcome.SKIPPED, "stage": "plan"}, {}, "not run before", id="only planned"),
        pytest.param({"outcome": Outcome.UNSUPPORTED, "stage": "plan"}, {}, "not run before", id="could not work"),
        pytest.param({}, {"fingerprint": "abd"}, "the model's files have changed", id="files"),
        pytest.param({}, {"weights": "synthetic"}, "the model's files have changed", id="weights"),
        pytest.param({"fingerprint": ""}, {}, "of what files it was measured is not recorded", id="before fingerprints"),
        pytest.param({}, {"environment": {"torch": "2.7.0", "python": "3.11.7"}}, "torch 2.6.0 is 2.7.0 now", id="version"),
        pytest.param({}, {"environment": {"torch": "2.6.0"}}, "python 3.11.7 is absent now", id="package gone"),
        pytest.param({}, {"code": "model = load(MODEL, trust_remote_code=True)"}, "the code that loads it has changed", id="code"),
        pytest.param({}, {"machine": builders.machine(builders.gpu())}, "the machine has changed", id="a card more"),
        pytest.param({}, {"machine": builders.machine(ram_bytes=32 * GIB)}, "the machine has changed", id="more RAM"),
        pytest.param({}, {"machine": replace(builders.machine(), driver="560")}, "the machine has changed", id="driver"),
        pytest.param(
            {}, {"machine": with_tier(builders.machine(), "cpu", limit_bytes=GIB)}, "the machine has changed", id="a limit"
        ),
        pytest.param(
            {"outcome": Outcome.TIMEOUT},
            {"allowed_s": {"case-timeout": 120.0}},
            "timed out, and --case-timeout is 2 min 00 s now",
            id="more time",
        ),
        pytest.param(
            {"outcome": Outcome.TIMEOUT, "allowed_s": {}}, {}, "timed out, and --case-timeout is 60.0 s now", id="what limit?"
        ),
        pytest.param(
            {"outcome": Outcome.OOM, "machine": with_tier(builders.machine(), "cpu", free_bytes=8 * GIB)},
            {},
            "out of memory, and cpu has 16.0 GiB now, not 8.00 GiB",
            id="more memory",
        ),
        pytest.param({"samples": {"round_s": [0.1]}}, {}, "measured in part", id="a round is missing"),
        pytest.param({"quality": None}, {}, "measured in part", id="not scored"),
        pytest.param({"metrics": {}}, {}, "measured in part", id="not loaded"),
        pytest.param({"failed": ["test_load", "test_quality"]}, {}, "failed test_load, test_quality", id="failed"),
    ],
)
def test_what_does_not_hold_runs_again_and_says_why(then: dict[str, Any], here: dict[str, Any], why: str) -> None:
    assert resume.why_again(earlier(**then), now(**here)) == why


@pytest.mark.parametrize("outcome", list(Outcome))
def test_all_that_ran_out_of_memory_can_be_asked_for(outcome: Outcome) -> None:
    asked, otherwise = (resume.why_again(earlier(outcome=outcome), now(), run_all=run_all) for run_all in (True, False))
    assert asked == ("out of memory, and --run-all asks for it" if outcome is Outcome.OOM else otherwise)


def test_what_was_never_measured_runs() -> None:
    assert resume.why_again(None, now()) == resume.NEW


def test_the_newest_result_of_a_case_on_this_machine_counts() -> None:
    case, other = builders.case(), builders.case(batch=2)
    elsewhere = replace(builders.machine(), name="another machine")
    results = [
        earlier(case, run="first"),
        earlier(other, run="other workload"),
        earlier(case, run="second"),
        earlier(case, run="third", machine=elsewhere),
        earlier(case, run="random", weights="synthetic"),
    ]
    found = selection.last_on(builders.machine(), results)
    assert {key: result.run for key, result in found.items()} == {
        (case, "real"): "second",
        (other, "real"): "other workload",
        (case, "synthetic"): "random",
    }


# What is not run


def refused(**changes: Any) -> Result:
    given = {"verdict": Verdict.TOO_BIG, "outcome": Outcome.SKIPPED, "stage": "plan", "why": "needs 16.1 GiB, free 11.6"}
    return earlier(**given | changes)


def test_a_refusal_that_was_recorded_is_not_recorded_again() -> None:
    less_free = with_tier(builders.machine(), "cpu", free_bytes=GIB)
    assert resume.finds_the_same(refused(), refused(why="needs 16.1 GiB, free 11.5", machine=less_free))


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": Verdict.UNAVAILABLE},
        {"stage": "load"},
        {"environment": {}},
        {"fingerprint": "abd"},
        {"machine": builders.machine(builders.gpu())},
    ],
)
def test_another_refusal_is_recorded(changes: dict[str, Any]) -> None:
    assert not resume.finds_the_same(refused(), refused(**changes))
    assert not resume.finds_the_same(None, refused())


# What quality was judged by


@pytest.mark.parametrize(
    ("judged", "by", "reference", "again"),
    [
        ("int8", "tiny/fp32/cpu", "fp32", False),
        ("fp32", None, "fp32", False),
        ("int8", "tiny/bf16/cpu", "fp32", True),
        ("bf16", None, "fp32", True),
        ("int8", "tiny/fp32/cpu", "bf16", False),
        ("int8", "tiny/fp32/direct", "bf16", False),  # of a larger matrix than this run's
    ],
)
def test_quality_is_judged_again_where_there_is_a_wider_reference(judged: str, by: str | None, reference: str, again: bool) -> None:
    order = [builders.case(precision) for precision in ("fp32", "bf16", "int8")]
    quality = Quality(probe="1", verdict="intact", why="", reference=by)
    why = resume.judged_by_a_lesser(earlier(builders.case(judged), quality=quality), builders.case(reference), order)
    assert why == (f"not compared with tiny/{reference}/cpu before" if again else None)


# What is said


def test_a_kept_case_ends_every_test_with_when_it_was_measured() -> None:
    kept = Kept(earlier())
    assert [str(kept.end()), str(kept.end())] == ["kept from 2026-11-24 08:00 UTC"] * 2
    assert (kept.end().outcome, kept.ended) == (Outcome.OK, None)


def test_a_kept_out_of_memory_is_told_once() -> None:
    kept = Kept(earlier(outcome=Outcome.OOM, why="out of memory during loading"))
    end = kept.end()
    assert (end.outcome, str(end)) == (Outcome.OOM, "kept from 2026-11-24 08:00 UTC: out of memory during loading")
    assert kept.ended is end


@pytest.mark.parametrize(
    ("kept", "again", "reloaded", "said"),
    [
        (12, [], [], "--resume: 12 cases kept, 0 run"),
        (1, ["crashed"], [], "--resume: 1 case kept, 1 run: 1 crashed"),
        (
            2,
            [resume.NEW, "crashed", resume.NEW],
            ["tiny/fp32/cpu"],
            "--resume: 2 cases kept, 3 run: 2 not measured before, 1 crashed; loaded tiny/fp32/cpu once more, which others are "
            "compared with",
        ),
    ],
)
def test_the_summary_counts_what_was_kept_and_why_the_rest_ran(kept: int, again: list[str], reloaded: list[str], said: str) -> None:
    assert resume.describe_kept(kept, again, reloaded) == said


def test_tiers_without_a_total_are_the_same_machine() -> None:
    bare = replace(builders.machine(), tiers=(Tier(name="cpu", kind="cpu"),))
    assert resume.why_again(earlier(machine=bare), now(machine=bare)) is None
    assert (
        resume.why_again(earlier(machine=bare), now(machine=with_tier(bare, "cpu", total_bytes=GIB))) == "the machine has changed"
    )
