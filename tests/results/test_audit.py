"""Joining results: what is counted once, what contradicts, what no run of ours can have written, what is private."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core.records import Answer, Interference, Phase, Quality, Result, Timeline, Workload, encode_record
from harness.core.units import GIB
from harness.results import audit, register, store
from harness.results.register import Entry, Refusal, ResultsFile
from tests.support import builders

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 25, tzinfo=timezone.utc)
replace = msgspec.structs.replace


def sound(**changes: Any) -> Result:
    """A result as a run writes it: two rounds of three tokens on a GPU, with figures that agree."""
    case = builders.case("int4", "direct", prompt_tokens=4, new_tokens=3, repeats=2)
    phases = [
        Phase(name="load", start_s=0.1, end_s=2.2, ram_peak_bytes=GIB, vram_peak_bytes={"gpu:0": 5 * GIB}),
        Phase(name="warm", start_s=2.3, end_s=3.0, ram_peak_bytes=2 * GIB, vram_peak_bytes={"gpu:0": 6 * GIB}),
    ]
    given: dict[str, Any] = {
        "machine": builders.machine(builders.gpu()),
        "metrics": {
            "load_s": 2.0,
            "first_token_s": 0.5,
            "ready_s": 2.5,
            "decode_tok_s": 9.0,
            "prefill_tok_s": 40.0,
            "ram_peak_bytes": 2.0 * GIB,
            "vram_peak_bytes": 6.0 * GIB,
            "perplexity": 8.5,
            "top1_agreement": 0.9,
            "kl": 0.03,
            "answers_correct": 1.0,
        },
        "samples": {"decode_tok_s": [8.0, 10.0], "prefill_tok_s": [40.0, 40.0], "token_s": [0.125, 0.125, 0.1, 0.1]},
        "phases": phases,
        "timeline": Timeline(t_s=[0.0, 1.0], ram_bytes=[1, 2], vram_bytes={"gpu:0": [3, 4]}),
        "interference": [Interference(phase="load", start_s=0.1, end_s=2.2)],
        "quality": Quality(probe="p", verdict="intact", why="", answers=[Answer(question="?", answer="!", correct=True)]),
        "environment": {"torch": "2.9.1"},
        "fingerprint": "0123456789abcdef" * 2,
    }
    return builders.result(case, **given | changes)


WRITTEN: dict[str, Result] = {}


def entry(result: Result, source: int = 0, line: int = 1) -> Entry:
    entered = register.entry_of(result, encode_record(result), source, line)
    WRITTEN[entered.digest] = result
    return entered


def join(sources: list[str], entries: list[Entry], refusals: list[Refusal]) -> register.Joined:
    return register.join(sources, entries, refusals, lambda one: WRITTEN[one.digest])


def with_metrics(**metrics: float) -> Callable[[Result], Result]:
    return lambda result: replace(result, metrics=result.metrics | metrics)


def with_samples(**samples: list[float]) -> Callable[[Result], Result]:
    return lambda result: replace(result, samples=result.samples | samples)


def with_load(**load: int) -> Callable[[Result], Result]:
    return lambda result: replace(result, case=replace(result.case, workload=replace(result.case.workload, **load)))


def with_phase(number: int, **changes: Any) -> Callable[[Result], Result]:
    def changed(result: Result) -> Result:
        phases = list(result.phases)
        phases[number] = replace(phases[number], **changes)
        return replace(result, phases=phases)

    return changed


def test_what_a_run_writes_is_not_doubted() -> None:
    assert audit.doubt(sound(), NOW) is None
    assert audit.doubt(builders.result(), NOW) is None


def test_a_divergence_of_nothing_may_be_rounded_below_zero() -> None:
    """Measured: -3e-5 of bf16 against itself, kept in float16."""
    assert audit.doubt(with_metrics(kl=-3e-5)(sound()), NOW) is None


KEPT = [ROOT / "tests/data/results-v1.jsonl", *sorted(ROOT.glob("reports/*/results.jsonl"))]


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.parent.name)
def test_no_result_that_is_kept_here_is_doubted(file: Path) -> None:
    results = store.read(file)[0]
    assert results
    assert [said for result in results if (said := audit.doubt(result, NOW))] == []


TAMPERED: dict[str, tuple[Callable[[Result], Result], str]] = {
    "id": (lambda r: replace(r, id="tiny/int8/direct"), "is called 'tiny/int8/direct', and its case is 'tiny/int4/direct'"),
    "precision": (lambda r: replace(r, case=replace(r.case, precision="fp16")), "its case is 'tiny/fp16/direct'"),
    "limit": (lambda r: replace(r, case=replace(r.case, vram_bytes=8 * GIB)), "its case is 'tiny/int4/direct@vram8GiB'"),
    "fingerprint": (lambda r: replace(r, fingerprint="../x"), "has fingerprint '../x'"),
    "no tokens": (with_load(new_tokens=0), "asks for 4 \\+ 0 tokens"),
    "no date": (lambda r: replace(r, at="yesterday"), "has no date: 'yesterday'"),
    "future": (lambda r: replace(r, at="2027-01-01T00:00:00Z"), "is dated 2027-01-01T00:00:00Z, and now is 2026-11-25T00:00:00Z"),
    "before the run": (lambda r: replace(r, at="2026-11-20T00:00:00Z"), "before its run began: '20261124T080000Z-abc123'"),
    "negative": (with_metrics(energy_j=-1.0), "has 'energy_j' -1.0, which cannot be"),
    "infinite": (with_metrics(energy_j=float("inf")), "has 'energy_j' inf"),
    "not a number": (with_metrics(perplexity=float("nan")), "has 'perplexity' nan"),
    "perplexity": (with_metrics(perplexity=0.5), "has 'perplexity' 0.5"),
    "share": (with_metrics(top1_agreement=1.2), "has 'top1_agreement' 1.2"),
    "divergence": (with_metrics(kl=-0.5), "has 'kl' -0.5"),
    "sample": (with_samples(decode_tok_s=[-1.0, 10.0]), "has -1.0 among its samples of 'decode_tok_s'"),
    "not run": (lambda r: replace(r, stage="plan"), "was not run, and has 'answers_correct'"),
    "faster": (
        with_metrics(decode_tok_s=90.0),
        "says decode 90.0 tokens/s, and the median of its 2 samples is decode 9.00 tokens/s",
    ),
    "prefill": (with_metrics(prefill_tok_s=41.0), "says prefill 41.0 tokens/s, and the median"),
    "faster, samples too": (
        lambda r: with_samples(decode_tok_s=[80.0, 100.0])(with_metrics(decode_tok_s=90.0)(r)),
        "has rounds that took 0.045 s by their speed and 0.45 s by their tokens",
    ),
    "ready": (with_metrics(ready_s=1.0), "says ready 1.00 s, and load and first token take ready 2.50 s"),
    "answers": (with_metrics(answers_correct=9.0), "says 9 answers correct, and 1 are"),
    "RAM": (with_metrics(ram_peak_bytes=17.0 * GIB), "says peak RAM, resident 17.0 GiB, and its machine has 16.0 GiB of RAM"),
    "VRAM": (with_metrics(vram_process_peak_bytes=13.0 * GIB), "peak VRAM, process 13.0 GiB, and its machine has 12.0 GiB of VRAM"),
    "no GPU": (lambda r: replace(r, machine=builders.machine()), "says peak VRAM, allocated 6.00 GiB, and its machine has no GPU"),
    "smaller": (
        with_metrics(vram_peak_bytes=3.0 * GIB),
        "allocated 3.00 GiB, and the highest of its phases is peak VRAM, allocated 6.00",
    ),
    "free": (
        lambda r: replace(r, machine=builders.machine(builders.gpu(free_bytes=13 * GIB))),
        "has 13.0 GiB free of 12.0 GiB in 'gpu:0'",
    ),
    "negative memory": (
        lambda r: replace(r, metrics={}, machine=builders.machine(ram_bytes=-1)),
        "has fewer than 0 bytes in 'cpu'",
    ),
    "backwards": (with_phase(1, end_s=2.25), "has a phase 'warm' from 2.3 s to 2.25 s"),
    "too early": (with_phase(0, start_s=-5.0), "has a phase 'load' from -5.0 s"),
    "order": (with_phase(1, start_s=1.0), "has a phase that begins at 1.0 s, before the one ahead of it ended, at 2.2 s"),
    "endless": (with_phase(1, end_s=float("inf")), "to inf s"),
    "load": (lambda r: with_metrics(load_s=9.0, ready_s=9.5)(r), "says load 9.00 s, and its phase took 2.1 s"),
    "request": (
        lambda r: replace(r, interference=[Interference(phase="load", start_s=2.0, end_s=1.0)]),
        "has a request 'load' from 2.0 s to 1.0 s",
    ),
    "columns": (lambda r: replace(r, timeline=Timeline(t_s=[0.0], ram_bytes=[1, 2])), "whose columns differ in length"),
    "clock": (lambda r: replace(r, timeline=Timeline(t_s=[1.0, 0.0])), "goes back in time"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_cannot_be_is_refused_in_one_sentence(name: str) -> None:
    change, words = TAMPERED[name]
    said = audit.doubt(change(sound()), NOW)
    assert said
    assert len(said.splitlines()) == 1

    assert re.search(words, said), said


@given(
    key=st.sampled_from(["decode_tok_s", "prefill_tok_s", "ready_s", "ram_peak_bytes", "vram_peak_bytes"]),
    factor=st.floats(0.01, 100),
)
def test_no_figure_with_evidence_can_be_changed_alone(key: str, factor: float) -> None:
    honest = sound()
    changed = with_metrics(**{key: honest.metrics[key] * factor})(honest)
    assert (audit.doubt(changed, NOW) is None) == (abs(factor - 1) < 1e-6)


ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(
    metrics=st.dictionaries(st.sampled_from([*sound().metrics, "token_p50_s", "what"]), ANY),
    samples=st.dictionaries(st.sampled_from(["decode_tok_s", "token_s", "what"]), st.lists(ANY, max_size=5)),
    times=st.lists(st.tuples(ANY, ANY), max_size=4),
    load=st.builds(Workload, new_tokens=st.integers(-3, 3), batch=st.integers(-1, 2)),
    at=st.text(max_size=25),
)
def test_whatever_a_line_holds_it_is_judged(
    metrics: dict[str, float], samples: dict[str, list[float]], times: list[tuple[float, float]], load: Workload, at: str
) -> None:
    phases = [Phase(name="load", start_s=start, end_s=end) for start, end in times]
    windows = [Interference(phase="warm", start_s=start, end_s=end, why="x") for start, end in times]
    case = replace(sound().case, workload=load)
    odd = replace(sound(), metrics=metrics, samples=samples, phases=phases, interference=windows, case=case, at=at)
    for check in audit.CHECKS:
        assert all(isinstance(said, str) for said in check(odd, NOW))


@given(values=st.lists(st.integers(0, 30), min_size=1, max_size=9), wanted=st.integers(0, 60))
def test_a_median_of_some_is_found_where_there_is_one(values: list[int], wanted: int) -> None:
    """Half integers, so that two sums are equal or far apart."""
    there = any(one + other == wanted for one, other in combinations_with_replacement(values, 2))
    halves = sorted(value / 2 for value in values)
    assert audit._is_median_of_some(wanted / 4, halves) == there


def test_where_rounds_were_disturbed_the_median_is_of_the_others() -> None:
    disturbed = [Interference(phase="warm", start_s=2.3, end_s=3.0, why="others used 1.1 of 2 cores")]
    of_one = with_metrics(decode_tok_s=10.0)(sound())
    assert "median" in (audit.doubt(of_one, NOW) or "")
    assert audit.doubt(replace(of_one, interference=disturbed), NOW) is None
    said = audit.doubt(replace(with_metrics(decode_tok_s=11.0)(sound()), interference=disturbed), NOW)
    assert said == "says decode 11.0 tokens/s, which is the median of none of its 2 samples"


def test_the_same_result_counts_once_wherever_it_lies() -> None:
    joined = join(["a", "b"], [entry(sound()), entry(sound(), 1, 7)], [])
    assert [(source.results, source.repeated, source.refused) for source in joined.sources] == [(1, 0, 0), (0, 1, 0)]
    assert len(joined.entries) == 1
    assert not joined.refusals


def test_results_that_contradict_are_refused_both_and_say_where_and_how() -> None:
    other = with_metrics(decode_tok_s=9.5)(sound())
    joined = join(["a/results.jsonl", "b/results.jsonl"], [entry(sound(), 0, 3), entry(other, 1, 4)], [])
    assert joined.entries == ()
    assert [joined.where(refusal) for refusal in joined.refusals] == ["a/results.jsonl:3", "b/results.jsonl:4"]
    assert joined.refusals[0].why == (
        "contradicts b/results.jsonl:4, the same case of the same run ('tiny/int4/direct'): "
        "'decode_tok_s' is 9.0 here and 9.5 there; neither is published"
    )
    assert "contradicts a/results.jsonl:3" in joined.refusals[1].why


def test_another_run_of_a_case_contradicts_nothing() -> None:
    later = replace(with_metrics(decode_tok_s=9.5)(sound()), run="20261125T080000Z-ffffff", at="2026-11-24T09:00:00Z")
    assert len(join(["a"], [entry(sound()), entry(later, 0, 2)], []).entries) == 2


@given(seed=st.integers())
def test_the_order_of_files_decides_nothing(seed: int) -> None:
    three = [sound(), replace(sound(), run="other"), with_metrics(kl=0.04)(replace(sound(), run="third"))]
    against = with_metrics(kl=0.05)(three[2])
    entries = [entry(result, number % 2, number + 1) for number, result in enumerate([*three, three[0], against])]
    random.Random(seed).shuffle(entries)
    joined = join(["a", "b"], entries, [])
    assert {one.digest for one in joined.entries} == {audit.digest(encode_record(result)) for result in three[:2]}
    assert len(joined.refusals) == 2


def test_machines_of_one_name_are_told_apart_by_their_hardware_alone() -> None:
    ours = builders.machine(builders.gpu())
    same = replace(ours, system="Linux 7.0", driver="600", tiers=(builders.gpu(free_bytes=GIB), *ours.tiers[1:]))
    assert audit.identity(ours) == audit.identity(same)
    others = [
        replace(ours, cpu="another"),
        replace(ours, cores=3),
        builders.machine(builders.gpu(), builders.gpu(1)),
        builders.machine(builders.gpu(), ram_bytes=64 * GIB),
        replace(ours, tiers=(replace(builders.gpu(), model="RTX 3060 Ti"), *ours.tiers[1:])),
    ]
    assert len({audit.identity(machine) for machine in [ours, *others]}) == 6


def test_a_source_tells_what_came_of_it() -> None:
    refused = [Refusal(source=0, line=9, why="not a result")]
    (source,) = join(["a"], [entry(sound()), entry(sound(), 0, 2)], refused).sources
    assert source == ResultsFile(
        name="a",
        results=1,
        repeated=1,
        refused=1,
        runs=("20261124T080000Z-abc123",),
        first="2026-11-24T08:00:00Z",
        last="2026-11-24T08:00:00Z",
        versions=("torch 2.9.1",),
    )


def test_what_is_private_is_taken_out_of_texts() -> None:
    told = sound(log_tail="File /home/alice/models/x.py\n", why="see https://alice:secret12@host/ and hf_abcDEF0123456789abcd")
    clean = audit.examine(told, NOW)
    assert isinstance(clean, Result)
    assert clean.log_tail == "File ~/models/x.py\n"
    assert "secret12" not in str(clean.why)
    assert "hf_" not in str(clean.why)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"environment": {"torch": "hf_abcDEF0123456789abcd"}}, "tells a secret in its environment"),
        ({"code": 'MODEL = "/home/alice/model"'}, "tells a user's directory in its code"),
        ({"code": 'MODEL = "C:\\\\Users\\\\alice\\\\model"'}, "tells a user's directory in its code"),
        ({"samples": {"sk_live_51Habcdefghijkl": [1.0]}}, "tells a secret in its samples"),
        ({"timeline": Timeline(vram_bytes={"npm_a1B2c3D4e5f6G7h8i9J0": []})}, "tells a secret in its timeline"),
        ({"phases": [Phase(name="hf_abcDEF0123456789", start_s=0, end_s=1)]}, "tells a secret in its phases"),
        ({"allowed_s": {"alice@mail.example.org": 1.0}}, "tells an e-mail address in its allowed_s"),
        ({"environment": {"proxy": "https://alice:x1@10.0.0.3"}}, "tells a secret in its environment"),
        ({"failed": ["test_x[192.168.1.17]"]}, "tells a network address in its failed"),
        ({"stage": "ghp_0123456789abcdefABCD"}, "tells a secret in its stage"),
        ({"log_tail": "x" * 4_000_001}, "holds 4,0"),
        ({"device_map": {"/Users/alice": "cpu"}}, "tells a user's directory in its device_map"),
        ({"machine": replace(builders.machine(builders.gpu()), cpu="C:\\Users\\alice")}, "tells a user's directory in its machine"),
    ],
)
def test_what_is_private_and_must_stay_is_refused(changes: dict[str, Any], said: str) -> None:
    assert str(audit.examine(sound(**changes), NOW)).startswith(said)


def test_packages_may_have_versions_of_four_numbers() -> None:
    told = sound(environment={"torch": "2.9.1", "nvidia-cublas-cu12": "12.1.3.1", "odd": "10.2.0.1"})
    assert audit.examine(told, NOW) == told
