"""Contracts, shards and what is handed out again: cut by models, known by their digests, numbered by attempts."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from harness.cli.entry import build_parser
from harness.core.errors import UsageError
from harness.core.options import OPTIONS
from harness.fleet import shards, status
from harness.fleet.collect import collect
from harness.fleet.contract import CONTRACT, Contract, Expected, digest_of, parse_utc, read_contract, utc, write_record
from harness.fleet.status import State, progress, to_hand_out
from tests.support import builders
from tests.support.fleets import NOW, contract, deliver, machine_class, measured

# A value for each option of a run that does not take a 1.
GIVEN = {"weights": "real", "precision": "bf16", "placement": "cpu", "kv": "dynamic", "attention": "eager", "new-tokens": "2"}
GIVEN |= {"vram": "8GiB", "ram": "8GiB"}


def test_the_cases_of_a_model_stay_on_one_machine() -> None:
    made, cut = contract(machine_class(machines=("1", "2")), models=("a", "b", "c"))
    assert [sorted({case.model for case in shard.cases}) for shard in cut] == [["a", "c"], ["b"]]
    assert sorted(shard.key(case) for shard in cut for case in shard.cases) == sorted(one.key for one in made.terms.cases)
    assert [shard.models for shard in cut] == [{"a": "./a", "c": "./c"}, {"b": "./b"}]


def test_there_are_no_more_shards_than_machines_or_models() -> None:
    assert len(contract(machine_class(machines=("1", "2", "3")), models=("a", "b"))[1]) == 2
    assert len(contract(machine_class(), models=("a", "b"))[1]) == 1


def test_the_largest_models_are_dealt_first() -> None:
    made, _ = contract(machine_class(machines=("1", "2")), models=("a", "b"))
    terms = replace(
        made.terms, cases=tuple(one for one in made.terms.cases if one.case.model == "b" or one.case.precision == "int8")
    )
    more = Expected(machine_class="small", case=builders.case("int8", model="aa"))
    cut = shards.cut(terms, made.digest, "small", [*terms.cases[:1], more, *terms.cases[1:]], 1)
    assert [[case.model for case in shard.cases] for shard in cut] == [["b", "b"], ["a", "aa"]]


def test_attempts_are_counted_for_each_class() -> None:
    made, _ = contract(machine_class("a"), machine_class("b"))
    for name, attempt in (("a", 2), ("a", 3), ("b", 2)):
        made, (again,) = shards.issue(made, [one.key for one in made.terms.cases if one.machine_class == name])
        assert (again.name, again.attempt) == (f"{name}-1-try{attempt}", attempt)


def test_a_contract_knows_no_shard_that_could_not_be_written(tmp_path: Path) -> None:
    made, cut = contract()
    (tmp_path / "shards").touch()
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        shards.write_issued(tmp_path / CONTRACT, made, cut)
    assert not (tmp_path / CONTRACT).exists()


def test_a_contract_is_read_back_and_refused_once_its_terms_were_changed(tmp_path: Path) -> None:
    made, cut = contract()
    (place,) = shards.write_issued(tmp_path / CONTRACT, made, cut)
    assert read_contract(tmp_path) == made
    assert digest_of(shards.read_shard(place)) == made.issued[0].digest
    text = (tmp_path / CONTRACT).read_text(encoding="utf-8")
    (tmp_path / CONTRACT).write_text(text.replace('"attempts": 3', '"attempts": 9'), encoding="utf-8")
    with pytest.raises(UsageError, match="it was changed; plan it again"):
        read_contract(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": 99}', "\x00"])
def test_what_is_no_contract_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / CONTRACT).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as wrong:
        read_contract(tmp_path)
    assert str(tmp_path) in str(wrong.value)


def test_what_is_missing_is_handed_out_again_until_the_attempts_are_used_up(tmp_path: Path) -> None:
    made, (first,) = contract()
    paths = [deliver(tmp_path / "1", first, [measured(first.cases[0])])]
    for attempt in (2, 3):
        found = to_hand_out(made, collect(made, paths, NOW), NOW, expected=())
        assert (found.again, found.spent) == ([first.key(first.cases[1])], [])
        made, (again,) = shards.issue(made, found.again)
        assert (again.name, again.attempt, again.cases) == (f"small-1-try{attempt}", attempt, first.cases[1:])
    assert to_hand_out(made, collect(made, paths, NOW), NOW, expected=()) == ([], [first.key(first.cases[1])], [], [])


def test_what_was_just_handed_out_is_waited_for_until_it_is_due(tmp_path: Path) -> None:
    """Whoever asks twice does not hand out twice; what is due, or is known not to come, is handed out again."""
    made, (first,) = contract(case_timeout_s=60.0)
    key = first.key(first.cases[1])
    heard = collect(made, [deliver(tmp_path / "1", first, [measured(first.cases[0])])], NOW)
    made, _ = shards.issue(made, [key])
    at = parse_utc(made.issued[-1].at)
    assert to_hand_out(made, heard, at) == ([], [], [], [key])
    assert to_hand_out(made, heard, at + timedelta(minutes=31)) == ([], [], [], [key])
    assert to_hand_out(made, heard, at + timedelta(minutes=31, seconds=1)) == ([key], [], [], [])
    assert to_hand_out(made, heard, at, expected=(State.RUNNING,)) == ([key], [], [], [])


def test_what_still_runs_is_not_handed_out_again(tmp_path: Path) -> None:
    made, (shard,) = contract(case_timeout_s=1800.0)
    path = deliver(tmp_path, shard, [measured(shard.cases[0])], ended_at=None)
    heard = collect(made, [path], NOW)
    just = NOW - timedelta(hours=2, minutes=50)
    assert to_hand_out(made, heard, just) == ([], [], [shard.key(shard.cases[1])], [])
    assert to_hand_out(made, heard, NOW).again == [shard.key(shard.cases[1])]
    assert [one.state for one in progress(made, heard.deliveries, just)] == [State.RUNNING]
    assert [one.state for one in progress(made, heard.deliveries, NOW)] == [State.SILENT]


@pytest.mark.parametrize(
    ("started_min", "heard_min", "state"),
    [
        (10, 1, State.RUNNING),
        (10, 1.5, State.RUNNING),
        (10, 3, State.SILENT),  # longer than two cases may take
        (40, 1, State.SILENT),  # past its deadline of half an hour and a minute for each case
    ],
)
def test_a_shard_is_silent_when_it_was_quiet_for_two_cases_or_is_overdue(
    started_min: int, heard_min: float, state: State, tmp_path: Path
) -> None:
    made, (shard,) = contract(case_timeout_s=60.0)
    moments = {"started_at": utc(NOW - timedelta(minutes=started_min)), "heard_at": utc(NOW - timedelta(minutes=heard_min))}
    heard = collect(made, [deliver(tmp_path, shard, [], ended_at=None, machine="lab-1", **moments)], NOW)
    (found,) = progress(made, heard.deliveries, NOW)
    assert (found.state, found.machine) == (state, "lab-1")


def test_a_shard_that_was_begun_again_is_where_its_last_receipt_says(tmp_path: Path) -> None:
    made, (shard,) = contract()
    first = deliver(tmp_path / "1", shard, [measured(shard.cases[0])], heard_at="2026-11-24T09:00:00Z", problem="no room")
    second = deliver(tmp_path / "2", shard, heard_at="2026-11-24T10:00:00Z")
    for paths in ([first, second], [second, first]):
        (found,) = progress(made, collect(made, paths, NOW).deliveries, NOW)
        assert (found.state, found.done, found.heard_at) == (State.ENDED, 2, "2026-11-24T10:00:00Z")
        assert found.machine == "machine-1"  # which was given no name


def test_progress_tells_every_state(tmp_path: Path) -> None:
    made, cut = contract(*(machine_class(name) for name in "abc"))
    heard = collect(made, [deliver(tmp_path / "a", cut[0]), deliver(tmp_path / "b", cut[1], [], problem="no room")], NOW)
    found = status.progress(made, heard.deliveries, NOW)
    assert [(one.state, one.done, one.cases) for one in found] == [
        (State.ENDED, 2, 2),
        (State.STOPPED, 0, 2),
        (State.WAITING, 0, 2),
    ]


def test_a_shard_decides_every_option_but_a_machine_s_own() -> None:
    _, (shard,) = contract(options={"new-tokens": "3", "vram": ["8GiB"]})
    given = dict.fromkeys((option.key for option in OPTIONS), None)
    found = shards.run_options(shard, given | {"results": "there", "resume": True})
    assert found == {
        "new_tokens": "3", "vram": ["8GiB"], "results": "there", "resume": True, "model": ["./tiny"],
        "precision": ["bf16", "int8"], "placement": ["cpu"], "kv": ["dynamic"], "attention": [],
    }  # fmt: skip
    for option in OPTIONS:
        if option.name not in ("shard", "results", "html", "baseline", "resume", "calibrate"):
            with pytest.raises(UsageError, match=f"{option.flag} stands beside --shard, and shard small-1 decides it"):
                shards.run_options(shard, given | {option.key: ["x"] if option.repeat else "x"})


def test_a_fleet_is_planned_with_every_option_of_a_run_that_no_machine_decides() -> None:
    """As pytest means them: --ram of fitmatrix plan describes another machine's, that of a run limits this one's."""
    for option in OPTIONS:
        words = ["fleet", "plan", option.flag, *([] if option.switch else [GIVEN.get(option.name, "1")])]
        if option.name in ("shard", "results", "html", "baseline", "resume", "calibrate"):
            with pytest.raises(SystemExit):
                build_parser().parse_args(words)
        else:
            assert getattr(build_parser().parse_args(words), option.key) == option.read(
                True if option.switch else [words[-1]] if option.repeat else words[-1]
            )


def test_a_shard_names_no_file_of_the_machine(tmp_path: Path) -> None:
    """Neither its receipt's place nor where results and page go."""
    _, (shard,) = contract(options={"results": "/elsewhere", "html": "/elsewhere/x.html"})
    assert not {"results", "html"} & shards.run_options(shard, {}).keys()
    write_record(tmp_path / "shard.json", replace(shard, name="../../elsewhere"))
    with pytest.raises(UsageError, match="is no name of a shard"):
        shards.read_shard(tmp_path / "shard.json")


def test_a_machine_s_own_file_decides_only_what_is_its_own() -> None:
    assert shards.own_config({"batch": 4, "results": "x", "gate": {}, "fail_on_oom": True, "html": "y"}) == {
        "results": "x",
        "gate": {},
        "html": "y",
    }


def test_digests_follow_from_what_a_record_says_and_not_from_the_order_of_its_words() -> None:
    made, _ = contract(models=("a", "b"))
    turned = replace(made.terms, models=dict(reversed(made.terms.models.items())))
    assert digest_of(turned) == digest_of(made.terms)
    assert digest_of(replace(made.terms, attempts=4)) != digest_of(made.terms)
    assert msgspec.json.decode(msgspec.json.encode(made), type=Contract) == made
