"""The smallest RAM that works: the search stops near the truth wherever it lies, and what works is told from what thrashes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.cli import prove_min_ram
from harness.core.records import Case, Estimate, Outcome, Plan, Result, Span, TierEstimate, Verdict
from harness.core.units import GIB, MIB
from harness.run import min_ram
from harness.run.min_ram import failed, prove
from harness.run.session import Session
from tests.support import builders

NOTHING = Span(low=0, best=0, high=0)


def session(needed: int) -> Session:
    """A session that only plans, with this need of RAM in it, on 16 GiB."""
    sizes = dict.fromkeys(("weights", "kv", "activation", "overhead", "allocated", "peak", "load_peak", "low", "high"), 0)
    tier = TierEstimate(
        **{f"{name}_bytes": size for name, size in sizes.items()},
        capacity_bytes=16 * GIB,
        needed_bytes=needed,
        needed_high_bytes=2 * needed,
    )
    estimate = Estimate(tiers={"cpu": tier}, load_s=NOTHING, first_token_s=NOTHING, decode_tok_s=NOTHING)
    plan = Plan(case=builders.case(), verdict=Verdict.FITS, estimate=estimate)
    return cast(Session, SimpleNamespace(plan=lambda _: plan, machine=builders.machine()))


@pytest.mark.parametrize("needed", [300 * MIB, 2 * GIB, 40 * GIB])
@pytest.mark.parametrize("truth", [70 * MIB, 299 * MIB, 1900 * MIB, 15 * GIB])
def test_the_search_ends_within_5_percent_of_the_truth(monkeypatch: pytest.MonkeyPatch, needed: int, truth: int) -> None:
    tried: list[int] = []

    def measure(_: Any, case: Case) -> Result:
        assert case.ram_bytes is not None
        tried.append(case.ram_bytes)
        return builders.result(case, outcome=Outcome.OK if case.ram_bytes >= truth else Outcome.OOM, why="too little")

    monkeypatch.setattr(min_ram, "measure", measure)
    found = prove(session(needed), builders.case())
    assert found.works_bytes is not None
    assert found.fails_bytes is not None
    assert found.fails_bytes < truth <= found.works_bytes <= found.fails_bytes * 1.05
    assert (found.runs, found.why, found.estimate_bytes) == (len(tried), "too little", needed)
    assert len(tried) == len(set(tried))
    assert max(tried) <= 16 * GIB


def test_a_name_or_a_reason_moves_no_cursor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    evil = builders.result(builders.case(model="a\x1b[2Jb"), outcome=Outcome.OOM, why="gone\x1b]0;title\x07\nmore")
    monkeypatch.setattr(min_ram, "measure", lambda *_: evil)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    prove_min_ram.tell(evil)
    prove_min_ram.show_minimums([prove(session(9 * GIB), evil.case)])
    said = "".join(capsys.readouterr())
    assert "title" in said
    assert not {"\x1b", "\x07"} & set(said)


def test_what_works_nowhere_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(min_ram, "measure", lambda _, case: builders.result(case, outcome=Outcome.OOM, why="too little"))
    found = prove(session(9 * GIB), builders.case())
    assert (found.works_bytes, found.fails_bytes) == (None, 16 * GIB)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"metrics": {"token_disk_bytes": 10.0}}, None),
        ({"metrics": {"token_disk_bytes": 500.0}}, "too little for what every token reads: 500 bytes came from the disk for each"),
        ({"outcome": Outcome.TIMEOUT, "why": "cold round was not done"}, "cold round was not done"),
    ],
)
def test_what_rereads_its_weights_does_not_work(changes: dict[str, Any], why: str | None) -> None:
    assert failed(builders.result(loaded=builders.loaded(), **changes)) == why
