"""What a run proposes beyond its cases: the answer of the search, which page, Markdown, JSON and site headline as predicted."""

from __future__ import annotations

import csv
import io
import json
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from harness.catalog import resolve
from harness.cli.entry import main
from harness.cli.plan_args import PlanQuestion, advise_on, constants
from harness.core.errors import StoreError
from harness.core.options import OPTIONS
from harness.core.records import Case, Result
from harness.core.units import GIB, format_size
from harness.machine.gpus import profile
from harness.report.export import badges, data, summary
from harness.report.page import figures
from harness.results import compare, selection
from harness.results.needed import predicted_need, scarcest
from harness.run.cases import RUNNABLE
from harness.run.options import Options
from harness.run.session import CaseSubset, Session
from tests.report.test_page import read, rendered
from tests.support import builders, scripted

MODEL = "qwen3-30b-a3b"
SENTENCE = "Predicted to be best, not measured yet: bf16 with placement experts-in-ram"

Make = Callable[..., Session]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Make sessions on a described machine with a card that the model in this directory spills from; close them at the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["synth", MODEL, MODEL, "--hollow"]) == 0
    sessions: list[Session] = []

    def made(**options: Any) -> Session:
        session = Session(Options(given={"model": [MODEL], "results": "results"} | options))
        session.machine = profile(["RTX 4090"], ram=64 * GIB)
        session.worker_main = scripted.by_model
        sessions.append(session)
        return session

    yield made
    for session in sessions:
        session.close()


def come_to_an_end(session: Session) -> list[Result]:
    """Take each case that is not run to its end, as a run does with all of them, and write the page; return the results."""
    cases = session.cases()
    session.prepare(cases)
    for plan in map(session.plan, cases):
        if plan.verdict not in RUNNABLE:
            session.start(plan)
    assert session.render()
    return session.store.read()[0]


def beside(proposed: Result, case: Case) -> Result:
    """A result of the same run, machine and weights that was measured."""
    alike = {name: getattr(proposed, name) for name in ("run", "machine", "weights", "environment")}
    return builders.result(case, **alike)


def plans_answer(session: Session) -> tuple[str, float]:
    """What `fitmatrix plan` answers first, and the speed that it predicts."""
    machine, workload = session.machine, session.cases()[0].workload
    found = advise_on(resolve.resolve(MODEL), machine, workload, PlanQuestion(), constants(session.store.read()[0], machine)).best
    assert found
    assert found.estimate
    return found.case.id, found.estimate.decode_tok_s.best


def test_a_run_records_what_plan_answers_first(make: Make) -> None:
    session = make()
    last = come_to_an_end(session)[-1]
    assert selection.is_proposed(last)
    assert last.estimate
    assert (last.id, last.estimate.decode_tok_s.best) == plans_answer(session)
    assert last.case not in session.cases()
    assert "--placement experts-in-ram" in str(last.command)
    assert "device_map" in str(last.code)


def test_the_command_that_measures_it_can_be_pasted(make: Make, request: pytest.FixtureRequest) -> None:
    last = come_to_an_end(make(vram=["20GiB"]))[-1]
    words = shlex.split(str(last.command))
    assert words[0] == "pytest"
    given, unknown = request.config._parser.parse_known_and_unknown_args(words[1:])
    assert not unknown
    asked = {option.key: getattr(given, f"fitmatrix_{option.key}") for option in OPTIONS}
    assert Session(Options(given=asked)).models.sources.keys() == {MODEL}
    session = make(**{key: value for key, value in asked.items() if value is not None and key not in ("model", "results")})
    assert session.cases() == [last.case]


def test_page_markdown_json_csv_and_site_say_the_same(make: Make, tmp_path: Path) -> None:
    session = make()
    results = come_to_an_end(session)
    last = results[-1]
    tier = scarcest(last.estimate)
    speed = figures.planned_speed(last)
    assert tier
    assert speed
    size = predicted_need(tier[1]).best
    answer = rendered(results).all("div", look="answer")[0]
    (said,) = answer.all("p", look="say")
    assert SENTENCE in said.text
    assert speed.text in said.text
    assert [str(last.command)] in [part.children for part in answer.all("code")]
    assert str(int(size)) in [figure.attrs["value"] for figure in rendered(results).all("data")]
    text = summary.render_summary(results)
    assert f"**{SENTENCE}, {format_size(size)} of " in text
    assert f", {speed.text}.**" in text
    (answered,) = [one for one in json.loads(data.render_json(results))["answers"] if one["predicted"]]
    predicted = answered["predicted"]
    assert (answered["case"], answered["decode_tok_s"]) == (None, None)  # which nothing measured is
    assert (predicted["case"], predicted["needed_bytes"], predicted["decode_tok_s"]) == (last.id, int(size), speed.number)
    assert (predicted["code"], predicted["command"]) == (last.code, last.command)
    assert answered["said"].startswith(SENTENCE)
    row = list(csv.DictReader(io.StringIO(data.render_csv(results))))[-1]
    assert (row["id"], row["status"], row["recommended"]) == (last.id, "predicted to fit", "no")
    assert "fits" not in badges.badges(results)[0].said.partition("does not")[0]  # a badge is about what was measured
    assert main(["publish", "results", "--to", "site"]) == 0
    (page,) = (tmp_path / "site" / "machines").glob("*.html")
    assert SENTENCE in read(page.read_text()).text


def test_where_ways_were_named_nothing_is_searched(make: Make) -> None:
    assert not any(map(selection.is_proposed, come_to_an_end(make(precision=["bf16"]))))
    assert not any(map(selection.is_proposed, come_to_an_end(make(placement=["direct"]))))


def test_a_run_that_was_interrupted_and_a_shard_propose_nothing(make: Make) -> None:
    session = make()
    come = session.cases()
    session.interrupted = True
    assert not [one for one in come_to_an_end(session) if selection.is_proposed(one)]
    session = make(results="shard")
    session._subset = CaseSubset(cases=frozenset(come), since="")
    assert not [one for one in come_to_an_end(session) if selection.is_proposed(one)]


def test_under_a_limit_the_search_stays_within_it_and_so_does_its_case(make: Make) -> None:
    found = [one for one in come_to_an_end(make(vram=["16GiB"], ram="60GiB")) if selection.is_proposed(one)]
    for one in found:
        assert (one.case.vram_bytes, one.case.ram_bytes) == (16 * GIB, 60 * GIB)
        assert one.estimate
        assert one.estimate.tiers["gpu:0"].needed_bytes <= 16 * GIB
    assert found


def test_the_answer_of_the_newest_run_counts(make: Make) -> None:
    last = come_to_an_end(make())[-1]
    assert selection.proposed([last]) == [last]
    measured = replace(beside(last, replace(last.case, precision="int4", placement="auto")), run="later", at="2999-01-01T00:00:00Z")
    assert selection.proposed([last, measured]) == []
    assert selection.proposed([replace(measured, at=last.at), last]) == [last]  # a search comes last, if in the same second
    limited = replace(last, case=replace(last.case, vram_bytes=8 * GIB))
    assert selection.proposed([limited, last]) == [limited, last]
    assert SENTENCE not in rendered([last, measured]).text


def test_beside_what_was_measured_the_prediction_comes_second(make: Make) -> None:
    last = come_to_an_end(make())[-1]
    measured = beside(last, replace(last.case, precision="int4", placement="auto"))
    answer = rendered([measured, last]).all("div", look="answer")[0]
    first, second = answer.all("p")[0], next(part for part in answer.all("p") if SENTENCE in part.text)
    assert "fits this machine: int4" in first.text
    assert second is not first
    found = json.loads(data.render_json([measured, last]))["answers"][0]
    assert (found["case"], found["predicted"]["case"]) == (measured.id, last.id)


def test_what_was_proposed_and_is_measured_then_is_no_prediction_any_more(make: Make) -> None:
    last = come_to_an_end(make())[-1]
    measured = beside(last, last.case)
    assert selection.newest([last, measured]) == [measured]
    assert SENTENCE not in rendered([last, measured]).text


def test_a_gate_does_not_take_a_prediction_for_a_case_that_stopped_working(make: Make) -> None:
    last = come_to_an_end(make())[-1]
    measured = beside(last, last.case)
    found = compare.compare([measured], [last])
    assert not found.failures
    assert not found.compared


def test_a_disk_that_is_full_in_the_end_leaves_the_page_with_the_prediction(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make()
    cases = session.cases()
    session.prepare(cases)
    session.start(next(plan for plan in map(session.plan, cases) if plan.verdict not in RUNNABLE))
    monkeypatch.setattr(session.store, "_append", no_room)
    page = session.render()
    assert page
    assert SENTENCE in read(page.read_text()).text
    assert len(session.store.unwritten) == 1


def no_room(result: Result) -> None:
    raise StoreError("results.jsonl", f"cannot append the result of {result.id}: the disk is full")
