"""`fitmatrix plan --best`: the search as the command line shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harness.catalog import resolve
from harness.cli.plan_args import PlanQuestion, advise_on
from harness.core.records import Workload
from harness.machine.gpus import profile
from tests.support.spoken import Said, saying

GIB = 1 << 30


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    """Run `fitmatrix plan` in an empty directory; return exit status, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    return saying(capsys, "plan")


def test_the_command_answers_with_the_search(say: Said) -> None:
    status, out, _ = say("qwen2.5-7b-instruct", "--gpu", "RTX 3060 12GB", "--ram", "32GiB", "--best", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["recommended"] in {one["case"] for one in told["plans"]}
    machine = profile(["RTX 3060 12GB"], ram=32 * GIB)
    best = advise_on(resolve.resolve("qwen2.5-7b-instruct"), machine, Workload(), PlanQuestion(search=True), None).best
    assert best is not None
    assert told["recommended"] == best.case.id
    status, out, _ = say("qwen2.5-7b-instruct", "--gpu", "RTX 3060 12GB", "--ram", "32GiB", "--best")
    assert "quality" in out
    assert "context" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--best", "--precision", "int4"), "--best searches every precision, placement and KV cache: drop --precision int4"),
        (("--min-speed", "5"), "--min-speed is what a search asks for: add --best"),
        (("--best", "--min-speed", "-1"), "--min-speed: -1 is out of range: more than 0"),
        (("--best", "--min-speed", "fast"), "--min-speed: 'fast' is not a number"),
    ],
)
def test_what_contradicts_a_search_is_one_sentence(words: tuple[str, ...], told: str, say: Said) -> None:
    status, _, err = say("smollm2-135m-instruct", *words)
    assert status == 2
    assert told in err


@pytest.mark.parametrize("columns", [40, 47, 60, 66])
def test_no_line_ends_between_a_figure_and_its_unit(columns: int, say: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (("--best",), (), ("--explain", "int4/cpu")):
        out = say("chatglm-6b", "--gpu", "RTX 3060 12GB", "--ram", "32GiB", *words)[1]
        assert not re.findall(r"\d *\n *(?:GiB|MiB|GB/s|tokens|tokens/s|ms|s|%)(?!\w).*", out)
