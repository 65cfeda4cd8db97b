"""The gate of the oracle: a plan that has become worse fails it, one that is as it was passes, and nothing passes silently."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.oracle import gate, rows
from tests.oracle.rows import Row

ESTIMATE = "harness/planning/cost/estimate.py"
PLANNED = "allocated_bytes=int(run),"


def git(tree: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e@x", *arguments], cwd=tree, check=True, capture_output=True)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of this tree's code, committed once."""
    tree = tmp_path_factory.mktemp("repository")
    shutil.copytree(gate.ROOT / "harness", tree / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / gate.PROGRAM).parent.mkdir(parents=True)
    for program in (gate.PROGRAM, gate.SPEEDS):
        shutil.copy(gate.ROOT / program, tree / program)
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "all")
    return tree


@pytest.fixture
def tree(committed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The repository as the gate's own, put back afterward."""
    monkeypatch.setattr(gate, "ROOT", committed)
    yield committed
    git(committed, "checkout", "-q", ".")


@pytest.fixture(scope="module")
def some() -> list[Row]:
    """Rows of two architectures."""
    return [row for row in rows.everything() if row.architecture in ("llama", "gemma2")]


@pytest.fixture(scope="module")
def placed() -> list[Row]:
    """Rows of loading and of models that are split over cards."""
    return rows.read(rows.PLACED)


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


@pytest.mark.usefixtures("tree")
def test_the_same_code_passes(some: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    assert gate.compare("HEAD", some) == gate.COMPARED
    assert "no part is worse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("worse", "part"),
    [
        ("int(run * 1.03)", "all"),
        ("int(run * (1.03 if footprint.fmt.quantizer == 'int4' else 1))", "int4"),
        ("int(run * (1.03 if footprint.spec.skeleton.model_class.startswith('Gemma2') else 1))", "gemma2"),
    ],
)
def test_a_worse_plan_fails_and_the_part_is_named(
    tree: Path, some: list[Row], capsys: pytest.CaptureFixture[str], worse: str, part: str
) -> None:
    change(tree / ESTIMATE, PLANNED, f"allocated_bytes={worse},")
    assert gate.compare("HEAD", some) == gate.WORSE
    failing = [line for line in capsys.readouterr().out.splitlines() if line.endswith("WORSE")]
    assert any(part in line for line in failing)


def test_formulas_that_no_record_shows_are_held_as_well(tree: Path, some: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    """They are what a model without a record gets: most of those that people bring."""
    change(
        tree / "harness/planning/cost/gpu_activations.py",
        "self._formulas.phases(workload) if peak",
        "[2 * size for size in self._formulas.phases(workload)] if peak",
    )
    assert gate.compare("HEAD", some) == gate.WORSE
    assert "by formulas" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "before", "after", "part"),
    [
        (ESTIMATE, "load_peak_bytes=int(load +", "load_peak_bytes=int(1.03 * load +", "load, as planned"),
        (ESTIMATE, PLANNED, "allocated_bytes=int(run * (1.03 if tier and tier.name == 'gpu:1' else 1)),", "auto"),
    ],
)
def test_loading_and_splits_are_held_as_well(
    tree: Path, placed: list[Row], capsys: pytest.CaptureFixture[str], source: str, before: str, after: str, part: str
) -> None:
    change(tree / source, before, after)
    assert gate.compare("HEAD", placed) == gate.WORSE
    assert any(part in line for line in capsys.readouterr().out.splitlines() if line.endswith("WORSE"))


@pytest.mark.parametrize(
    "wider",
    [
        "low=values[0] / 1.2, best=values[1], high=values[2] * 1.2",  # never wrong, and of less use
        "low=values[1] / 1.02, best=values[1], high=values[1] * 1.02",  # narrow, and wrong
    ],
)
def test_intervals_that_are_wider_or_miss_more_fail(
    tree: Path, placed: list[Row], capsys: pytest.CaptureFixture[str], wider: str
) -> None:
    change(tree / "harness/planning/cost/speed.py", "low=values[0], best=values[1], high=values[2]", wider)
    assert gate.compare("HEAD", placed[:8]) == gate.WORSE
    failing = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("WORSE")]
    assert {*failing} == {"interval", "card", "held in"}  # speeds alone, whatever memory they need


def test_speeds_that_are_planned_no_more_fail(tree: Path, placed: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    change(tree / gate.SPEEDS, 'if "published" in asked:', 'if "published" in asked and asked["published"]["gpu"] == "A100-80GB":')
    change(tree / gate.SPEEDS, "    return measured(", '    return None if "published" in asked else measured(')
    assert gate.compare("HEAD", placed[:8]) == gate.WORSE
    assert "36 rows are planned no more, the first is Qwen3-0.6B BF16 H20-96GB" in capsys.readouterr().out


def test_rows_that_are_planned_no_more_fail(tree: Path, some: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    change(tree / gate.PROGRAM, "if tier is None:", 'if tier is None or asked["precision"] == "int4":')
    assert gate.compare("HEAD", some) == gate.WORSE
    assert f"{sum(row.precision == 'int4' for row in some)} rows are planned no more" in capsys.readouterr().out


def test_a_better_plan_passes_and_shows(tree: Path, some: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    change(tree / ESTIMATE, PLANNED, "allocated_bytes=int(run * 1.05),")
    git(tree, "commit", "-qam", "worse")
    try:
        git(tree, "checkout", "-q", "HEAD^", "--", ESTIMATE)
        assert gate.compare("HEAD", some) == gate.COMPARED
    finally:
        git(tree, "reset", "-q", "--hard", "HEAD^")
    assert "figure" in capsys.readouterr().out


def answers(some: list[Row], error: float, but: Mapping[str, float] | None = None) -> dict[str, gate.Answers]:
    """Plans that are wrong by this share, and by another in some architectures."""
    shares = [(but or {}).get(row.architecture, error) for row in some]
    planned = [{"allocated": round(row.peak_bytes * (1 + share))} for row, share in zip(some, shares, strict=True)]
    return dict.fromkeys(gate.WAYS, planned)


@pytest.mark.parametrize(
    ("before", "after", "fails"),
    [
        (0.00001, 0.0009, False),  # below what the traces themselves are known to
        (-0.01, 0.01, False),
        (0.01, 0.0104, False),
        (0.01, 0.0106, True),
        (0.0001, -0.0012, True),
    ],
)
def test_noise_passes_and_growth_does_not(some: list[Row], before: float, after: float, fails: bool) -> None:
    found = gate.parts(some, answers(some, before), answers(some, after))
    assert any(one.fails for one in found) is fails


def intervals(width: float, but: Mapping[str, float] | None = None) -> list[gate.Spans | None]:
    """Intervals that hold what is real and are so wide, and others in some of the columns of what was published."""
    found: list[gate.Spans | None] = []
    for asked in gate.questions():
        if "published" in asked:
            row, real = asked["published"], float(asked["published"]["tokens_per_s"])
            wide = next((value for name, value in (but or {}).items() if name in (row["gpu"], row["quant"])), width)
            found.append({"tokens_per_s": (real, real, real * wide)})
        else:
            real = asked["result"]["metrics"]["load_s"]
            found.append({"load_s": (real, real, real * width)})
    return found


@pytest.mark.parametrize(
    ("after", "but", "failing"),
    [
        (2.0, {}, set()),
        (2.0**1.04, {}, set()),
        (2.0**1.07, {}, {gate.EVERY_INTERVAL}),
        (1.9, {"H20-96GB": 2.0**1.2}, {("card", "H20-96GB")}),
        (1.9, {"AWQ": 2.0**1.2}, {("held in", "AWQ")}),
    ],
)
def test_intervals_may_grow_a_little_and_no_part_of_them_much(
    after: float, but: Mapping[str, float], failing: set[gate.Part]
) -> None:
    found = gate.scores(intervals(2.0), intervals(after, but))
    assert failing <= {one.part for one in found if one.fails}
    assert (gate.EVERY_INTERVAL in failing) is any(one.fails for one in found if one.part == gate.EVERY_INTERVAL)
    assert bool(failing) is any(one.fails for one in found)


def test_a_part_may_not_pay_for_the_others(some: list[Row]) -> None:
    some = [row for row in some if row.placement == "direct"]  # one of gemma2's is split as no other here is
    found = gate.parts(some, answers(some, 0.02), answers(some, 0.01, {"gemma2": 0.023}))
    assert {one.part for one in found if one.fails} == {("architecture", "gemma2")}


def test_a_shallow_clone_says_that_nothing_was_compared(
    tree: Path, some: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tree, "commit", "-q", "--allow-empty", "-m", "another")
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{tree}", "clone")
    git(tree, "reset", "-q", "--hard", "HEAD^")
    monkeypatch.setattr(gate, "ROOT", tmp_path / "clone")
    with pytest.raises(gate.NotCompared, match="skipped, as this clone is shallow") as why:
        gate.compare("HEAD^", some)
    assert why.value.status == gate.COMPARED


@pytest.mark.usefixtures("tree")
def test_a_revision_that_is_none_is_an_error(some: list[Row]) -> None:
    with pytest.raises(gate.NotCompared, match="no revision 'nonesuch'") as why:
        gate.compare("nonesuch", some)
    assert why.value.status == gate.IMPOSSIBLE


def test_a_revision_that_cannot_be_asked_is_an_error(tree: Path, some: list[Row]) -> None:
    change(tree / gate.PROGRAM, "def main", "raise SystemExit('no such plan')\n\n\ndef main")
    with pytest.raises(gate.NotCompared, match="no such plan") as why:
        gate.compare("HEAD", some)
    assert why.value.status == gate.IMPOSSIBLE


def test_the_rows_are_a_thousand_and_of_every_kind() -> None:
    found = rows.everything()
    assert len(found) >= 1000
    assert len({row.architecture for row in found}) >= 15
    assert {row.precision for row in found} >= {"bf16", "int8", "int4", "fp16", "fp32"}
    assert {row.peak_in for row in found} == {"prefill", "decode", "load", "unknown"}
    assert {row.placement for row in found} >= {"direct", "auto", "sequential", "gpu+cpu"}
    assert any(row.load_peak_bytes for row in found)
    assert len({(row.model, row.precision, row.placement, row.tier, row.cards, row.size) for row in found}) == len(found)


def test_what_its_environment_installs_is_enough() -> None:
    """The gate runs for every pull request: it must not need a gigabyte of torch before it begins."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(gate.ROOT / "tox.ini")
    installed = {*re.findall(r"^[\w-]+", tox["testenv:gate"]["deps"], re.M), "fitmatrix"}
    others = {name for name, owners in packages_distributions().items() if not installed & {owner.lower() for owner in owners}}
    assert "torch" in others
    blocked = f"import sys; sys.modules.update(dict.fromkeys({others!r})); import runpy; "
    for given, run in ((question(), f"runpy.run_path({gate.PROGRAM!r}, run_name='__main__')"), ("", "import tests.oracle.gate")):
        command = [sys.executable, "-c", blocked + run]
        done = subprocess.run(command, input=given, cwd=gate.ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def question() -> str:
    row = rows.everything()[0]
    return json.dumps({name: getattr(row, name) for name in Row.__struct_fields__})
