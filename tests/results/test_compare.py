"""Two sets of results side by side: what is called worse, how surely, and what stops a gate."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from harness.cli.entry import main
from harness.core.errors import UsageError
from harness.core.metrics import METRICS, read_alike, when_ready
from harness.core.records import Case, Machine, Outcome, Phase, Quality, Result, Tier, Verdict, Workload, encode_record
from harness.core.units import GIB
from harness.report.export import changes
from harness.report.page.figures import metric
from harness.results import compare, store
from harness.results.compare import RULES, Call
from tests.support import builders

HERE = Machine(name="2 cores, 16 GiB RAM", tiers=(Tier(name="cpu", kind="cpu", total_bytes=16 << 30),), cpu="Xeon", cores=2)
GOLDEN = Path(__file__).parents[1] / "data" / "results-v1.jsonl"


def made(name: str = "int8", *, machine: Machine = HERE, outcome: Outcome = Outcome.OK, **fields: Any) -> Result:
    case = Case(model="m", precision=name, placement="cpu", workload=fields.pop("workload", Workload()))
    usual: dict[str, Any] = {
        "metrics": {"decode_tok_s": 20.0, "ram_needed_bytes": 2e9, "ready_s": 4.0, "perplexity": 12.0},
        "samples": {"decode_tok_s": [19.8, 20.0, 20.1, 20.0, 20.2]},
    }
    return Result(
        id=case.id, run="r", at="2026-11-24T10:00:00Z", case=case, weights="real", machine=machine, verdict=Verdict.FITS,
        outcome=outcome, stage="done", **(usual | fields),
    )  # fmt: skip


def with_metrics(samples: dict[str, list[float]] | None = None, **metrics: float) -> Result:
    usual = made()
    return msgspec.structs.replace(usual, metrics=usual.metrics | metrics, samples=usual.samples | (samples or {}))


def calls(before: Result, after: Result, **limits: float) -> dict[str, Call]:
    found = compare.compare([before], [after], {name: rule.worse for name, rule in RULES.items()} | limits)
    return {change.key: change.call for change in found.pairs[0].changes}


def test_the_same_is_the_same() -> None:
    found = compare.compare([made()], [made()])
    assert not found.failures
    assert {change.call for change in found.pairs[0].changes} == {Call.SAME}
    assert changes.verdict(found) == "1 case compared, nothing got worse: every figure is the same"


def test_slower_for_sure_is_worse_and_slower_perhaps_is_unsure() -> None:
    surely = with_metrics({"decode_tok_s": [14.8, 15.0, 15.1, 15.0, 15.2]}, decode_tok_s=15.0)
    perhaps = with_metrics({"decode_tok_s": [12.0, 21.0, 17.0, 20.5, 13.0]}, decode_tok_s=17.0)
    assert calls(made(), surely)["decode_tok_s"] is Call.WORSE
    assert calls(made(), perhaps)["decode_tok_s"] is Call.UNSURE
    assert calls(surely, made())["decode_tok_s"] is Call.BETTER
    assert calls(made(), surely, speed=0.5)["decode_tok_s"] is Call.SAME


@pytest.mark.parametrize(("key", "group"), [("ram_needed_bytes", "memory"), ("ready_s", "load"), ("perplexity", "quality")])
def test_a_figure_without_samples_is_held_to_its_threshold(key: str, group: str) -> None:
    limit, before = RULES[group].worse, loading(4.0, 0)
    assert calls(before, loading(4.0, 0, metrics={key: before.metrics[key] * (1 + limit) * 1.01}))[key] is Call.WORSE
    assert calls(before, loading(4.0, 0, metrics={key: before.metrics[key] * (1 + limit) * 0.99}))[key] is Call.SAME


def test_the_interval_holds_the_true_change_about_as_often_as_it_says() -> None:
    """Rounds of 7 from one distribution, 300 times: the bootstrap of a median of so few covers a little less than 95 %."""
    chance = random.Random(7)
    inside = 0
    for _ in range(300):
        old, new = ([chance.gauss(20, 1) for _ in range(7)] for _ in range(2))
        low, high = compare._interval(old, new) or (2.0, 2.0)
        inside += low <= 1 <= high
    assert 0.85 < inside / 300 <= 1


def test_what_worked_and_does_not_is_a_failure_whatever_the_thresholds() -> None:
    gone = made(outcome=Outcome.OOM, why="out of memory during loading")
    found = compare.compare([made()], [gone], dict.fromkeys(RULES, 9.0))
    assert found.failures == ("m/int8/cpu 64+16x1: worked, and now oom: out of memory during loading",)
    assert not compare.compare([gone], [made()]).failures
    assert not compare.compare([gone], [gone]).failures


def test_broken_answers_are_a_failure() -> None:
    sound, broken = (made(quality=Quality(probe="1", verdict=word, why="because")) for word in ("intact", "broken"))
    said = "m/int8/cpu 64+16x1: answers were intact, and now are broken: because"
    assert compare.compare([sound], [broken]).failures == (said,)


def test_other_threads_are_named_where_both_results_tell_them() -> None:
    def with_threads(threads: int | None) -> Result:
        return msgspec.structs.replace(made(), loaded=msgspec.structs.replace(builders.loaded(), threads=threads))

    assert "threads 8, now 1" in compare.compare([with_threads(8)], [with_threads(1)]).pairs[0].notes
    for before, after in ((8, 8), (None, 8), (8, None)):
        assert not compare.compare([with_threads(before)], [with_threads(after)]).pairs[0].notes


def test_speed_of_another_machine_is_shown_and_stops_nothing() -> None:
    slower = with_metrics({"decode_tok_s": [9.8, 10.0, 10.1, 10.0, 10.2]}, decode_tok_s=10.0, ram_needed_bytes=4e9)
    other = msgspec.structs.replace(slower, machine=msgspec.structs.replace(HERE, name="1 core"))
    found = compare.compare([made()], [other])
    assert [failure.partition(": ")[2].partition(" ")[0] for failure in found.failures] == ["RAM"]  # memory is still held
    assert any("another machine" in note for note in found.pairs[0].notes)


def test_a_noisy_figure_never_fails_for_sure() -> None:
    noisy = msgspec.structs.replace(
        with_metrics({"decode_tok_s": [9.8, 10.0, 10.1]}, decode_tok_s=10.0), noisy={"decode_tok_s": "others took 90 % of a core"}
    )
    found = compare.compare([made()], [noisy])
    assert not found.failures
    assert [change.call for change in found.pairs[0].changes if change.key == "decode_tok_s"] == [Call.UNJUDGED]
    assert found.unjudged[0].startswith("m/int8/cpu 64+16x1: decode 10.0 tokens/s, was 20.0")
    assert any("others took 90 %" in note for note in found.pairs[0].notes)


LOADED = {"cpu": GIB, "gpu:0": GIB}  # 2 GiB of weights, of as much in files


def loading(ready_s: float, read: int | None, **fields: Any) -> Result:
    """A run that read so many bytes from the disk until it was ready."""
    phases = [Phase(name=name, start_s=0.0, end_s=1.0, disk_read_bytes=size) for name, size in (("load", read), ("warm", 9 * GIB))]
    loaded = builders.loaded(tiers=LOADED)
    return msgspec.structs.replace(with_metrics(None, ready_s=ready_s), phases=phases, loaded=loaded, **fields)


@pytest.mark.parametrize(
    ("before", "after", "call"),
    [
        (0, 0, Call.WORSE),  # the page cache had the files both times
        (2 * GIB, 2 * GIB, Call.WORSE),  # neither time
        (0, 2 * GIB, Call.UNJUDGED),
        (2 * GIB, 0, Call.UNJUDGED),
        (0, GIB // 16, Call.WORSE),  # pages of libraries
        (0, None, Call.UNJUDGED),
        (None, None, Call.UNJUDGED),  # a system that does not count
    ],
)
def test_times_until_ready_are_judged_where_as_much_came_from_the_disk(before: int | None, after: int | None, call: Call) -> None:
    found = compare.compare([loading(4.0, before)], [loading(40.0, after)])
    judged = {change.key: change for change in found.pairs[0].changes}
    assert judged["ready_s"].call is call
    assert bool(judged["ready_s"].why) == (call is Call.UNJUDGED)
    assert bool(found.failures) == (call is Call.WORSE)
    assert judged["decode_tok_s"].call is Call.SAME
    assert not compare.compare([loading(4.0, before)], [loading(4.1, after)]).unjudged  # no change, and nothing to say


@pytest.mark.parametrize(
    ("read", "files", "when"),
    [
        (0, None, "again"),
        (GIB // 64, None, "again"),
        (GIB, None, ""),  # of files of a size that nobody told, it may be all or some
        (GIB, GIB, "at first"),
        (GIB, 2 * GIB, ""),
        (4 * GIB, 2 * GIB, "at first"),  # more than once
        (GIB // 8, 2 * GIB, "again"),
        (None, GIB, ""),
    ],
)
def test_which_time_until_ready_was_measured_is_told_by_what_came_from_the_disk(read: int, files: int, when: str) -> None:
    one = loading(4.0, read, files_bytes=files)
    assert when_ready(one) == when
    assert metric(one, "ready_s").name == f"ready {when}".rstrip()


def test_that_another_part_came_from_the_disk_is_said_before_noise() -> None:
    """To measure again on a quiet machine would not help."""
    noisy = {"ready_s": "others took 90 %"}
    (said,) = compare.compare([loading(4.0, 0, noisy=noisy)], [loading(40.0, 2 * GIB, noisy=noisy)]).doubts
    assert said == "one run read more of the files from the disk than the other"


def test_where_nothing_was_loaded_nothing_is_said() -> None:
    assert when_ready(made()) == ""
    assert read_alike(made(), made()) is None


def test_another_workload_is_another_case() -> None:
    found = compare.compare([made()], [made(workload=Workload(prompt_tokens=512))])
    assert [(pair.said, pair.failed) for pair in found.pairs] == [("not measured before", False), ("not measured any more", False)]


def test_the_newest_result_of_a_case_counts() -> None:
    slower, usual = with_metrics({"decode_tok_s": [0.9, 1.0, 1.1]}, decode_tok_s=1.0), made()
    assert not compare.compare([made()], [slower, usual]).failures
    assert compare.compare([made()], [usual, slower]).failures


def test_every_figure_of_the_rules_is_a_metric() -> None:
    assert {key for rule in RULES.values() for key in rule.keys} <= METRICS.keys()


@pytest.mark.parametrize(
    ("config", "said"),
    [({"sped": 0.1}, "did you mean 'speed'"), ({"speed": "10 %"}, "write 0.05 for 5 %"), ({"load": True}, "no share")],
)
def test_thresholds_that_are_none_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        compare.thresholds(config)
    assert compare.thresholds({"speed": 0.2})["speed"] == 0.2


def write(folder: Path, *results: Result) -> Path:
    folder.mkdir()
    (folder / store.NAME).write_bytes(b"".join(encode_record(result) + b"\n" for result in results))
    return folder


HOSTILE = "<script>alert(1)</script>|*x*\u202e"


def test_the_command_gives_status_markdown_json_and_junit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = write(tmp_path / "before", made(), made("bf16"))
    after = write(tmp_path / "after", made(outcome=Outcome.CRASH, why=HOSTILE), made("bf16"))
    assert main(["compare", str(before), str(before)]) == 0
    assert "nothing got worse" in capsys.readouterr().out
    assert main(["compare", str(before), str(after), "--junit", str(tmp_path / "out" / "junit.xml")]) == 1
    assert "worked, and now crash" in capsys.readouterr().out
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert main(["compare", str(before), str(after), "--markdown"]) == 1
    text = capsys.readouterr().out
    assert text.startswith("### ❌ fitmatrix: 1 failure in 2 cases")
    assert "<script>" not in text
    assert "\u202e" not in text
    assert main(["compare", str(before), str(after / store.NAME), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 2


def test_the_command_takes_its_thresholds_from_pyproject(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before, after = write(tmp_path / "a", made()), write(tmp_path / "b", with_metrics(ram_needed_bytes=2.4e9))
    assert main(["compare", str(before), str(after)]) == 1
    (tmp_path / "pyproject.toml").write_text("[tool.fitmatrix.gate]\nmemory = 0.3\n")
    assert main(["compare", str(before), str(after)]) == 0
    (tmp_path / "pyproject.toml").write_text("[tool.fitmatrix.gate]\nmemry = 0.3\n")
    assert main(["compare", str(before), str(after)]) == 2
    assert "did you mean 'memory'" in capsys.readouterr().err


def test_identical_sets_print_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    same = str(write(tmp_path / "a", *(made(name) for name in ("int8", "bf16", "int4"))))
    assert main(["compare", same, same]) == 0
    assert capsys.readouterr().out.strip() == "3 cases compared, nothing got worse: every figure is the same"


def test_a_name_is_never_cut_and_the_way_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    before = write(tmp_path / "a", made("quanto-int8"))
    after = write(tmp_path / "b", made("quanto-int8", metrics=made().metrics | {"ram_needed_bytes": 4e9, "perplexity": 24.0}))
    assert main(["compare", str(before), str(after), "--junit", str(tmp_path / "junit.xml")]) == 1
    said = capsys.readouterr().out
    assert "m/quanto-int8/cpu64+16x1" in "".join(said.split())
    assert "…" not in said
    assert "Worse is what is beyond: memory 5.0 %, load 30.0 %, speed 10.0 %, quality 2.0 %" in " ".join(said.split()).replace(
        "\xa0", " "
    )
    assert "keep the newer results as the baseline" in " ".join(said.split())
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    counts = {
        name: len(suite.findall(f".//{tag}"))
        for name, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped"))
    }
    assert {name: int(suite.get(name) or -1) for name in counts} == counts == {"tests": 1, "failures": 1, "skipped": 0}


def test_noise_of_what_did_not_change_is_not_told() -> None:
    """28 lines of it hid two failures among 35 cases."""
    noisy = made(noisy={"decode_tok_s": "others took 90 %", "first_token_s": "others took 80 %"})
    assert compare.compare([noisy], [noisy]).pairs[0].notes == ()
    slower = msgspec.structs.replace(noisy, metrics=noisy.metrics | {"decode_tok_s": 10.0, "first_token_s": 9.0})
    assert compare.compare([noisy], [slower]).pairs[0].notes == tuple(
        f"decode noisy {when}: others took 90 %" for when in ("before", "now")
    )


def test_noise_takes_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("int8", "bf16", "int4", "fp16", "fp32")
    slower = made().metrics | {"decode_tok_s": 10.0}
    before = write(tmp_path / "a", *(made(name) for name in names))
    after = write(tmp_path / "b", *(made(name, metrics=slower, noisy={"decode_tok_s": "others took 90 %"}) for name in names))
    assert main(["compare", str(before), str(after)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("not judged") == 1
    assert "and 2 other figures" in said


def test_sets_that_share_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(write(tmp_path / "a", made("int8"))), str(write(tmp_path / "b", made("int4")))]) == 2
    assert "no case with the same workload in common" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "none"), str(GOLDEN)]) == 2


def test_old_results_compare(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(GOLDEN), str(GOLDEN), "--all"]) == 0
    assert "same" in capsys.readouterr().out
