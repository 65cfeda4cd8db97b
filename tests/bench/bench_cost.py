"""What the harness costs, as ratios within one run: isolation, accuracy against a plain script, the parent's own CPU time.

Run by `tox run -e bench` on a quiet machine; its report shows the limits beside the figures.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from harness.catalog import download, resolve
from harness.catalog.shipped import catalog
from harness.checkpoint import reader
from harness.cli.plan_args import PlanQuestion, advise_on
from harness.core.options import DEFAULT_MODEL
from harness.core.records import Case, Plan, Workload
from harness.machine import probe
from harness.machine.gpus import profile
from harness.planning.feasibility import decide
from harness.run import forkserver, worker_process
from harness.run.case_result import CaseModel, RunContext
from harness.run.runner import Run
from tests.bench.cold_start import ColdStart
from tests.support.reporting import Figure

PLAIN = Path(__file__).parent / "plain.py"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
WORK = Workload(prompt_tokens=64, new_tokens=64, repeats=5)


@pytest.fixture(scope="session")
def location() -> Path:
    return download.fetch(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def setting() -> Iterator[RunContext]:
    forkserver.warm_up(["transformers.models.llama.modeling_llama"])
    with TemporaryDirectory(prefix="bench-") as scratch:
        yield RunContext(
            run="bench",
            machine=probe.probe(),
            environment=probe.versions(),
            scratch=Path(scratch),
            worker_main=worker_process.torch_worker,
            timeout_s=600,
        )


def planned(location: Path, setting: RunContext, precision: str) -> Plan:
    case = Case(model=DEFAULT_MODEL, precision=precision, placement="cpu", workload=WORK)
    return decide(case, setting.machine, reader.read(location))


def plain(location: Path, precision: str, rounds: int = WORK.repeats) -> dict[str, list[float]]:
    command = [sys.executable, str(PLAIN), str(location), DTYPES[precision]]
    words = map(str, (WORK.prompt_tokens, WORK.new_tokens, rounds))
    done = subprocess.run([*command, *words], check=True, capture_output=True, text=True)
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def test_isolation_costs_at_most_a_tenth_of_a_second(
    benchmark: BenchmarkFixture, figures: list[Figure], location: Path, setting: RunContext
) -> None:
    """Wall time of a case that only loads, less the time its own phases took."""
    plan = planned(location, setting, "bf16")

    def case() -> float:
        begun = time.perf_counter()
        run = Run(plan, CaseModel(location=location), setting)
        run.load()
        result = run.finish()
        return time.perf_counter() - begun - sum(phase.end_s - phase.start_s for phase in result.phases)

    case()  # the first one waits for the fork server's imports
    costs: list[float] = []
    benchmark.pedantic(lambda: costs.append(case()), rounds=10)
    measured = f"{statistics.median(costs):.3f} s"
    figures.append(Figure(what="isolation, a case after the first", found=measured, wanted="0.1 s"))
    assert statistics.median(costs) <= 0.1


@pytest.mark.parametrize("precision", DTYPES)
def test_agrees_with_a_plain_script(
    benchmark: BenchmarkFixture, figures: list[Figure], location: Path, setting: RunContext, precision: str
) -> None:
    """Peak RAM within 2 %, decode speed within 5 %; the two take turns, so that a slow spell of the machine hits both."""
    plan = planned(location, setting, precision)
    pairs: list[tuple[float, float]] = []

    def pair() -> None:
        script = plain(location, precision)
        run = Run(plan, CaseModel(location=location), setting)
        for _ in range(WORK.repeats):
            run.round()
        metrics = run.finish().metrics
        memory = metrics["ram_peak_bytes"] / script["ram_peak_bytes"]  # type: ignore[operator]
        pairs.append((memory, metrics["decode_tok_s"] / statistics.median(script["decode_tok_s"])))

    benchmark.pedantic(pair, rounds=3)
    memory, decode = (statistics.median(column) for column in zip(*pairs, strict=True))
    figures.append(Figure(what=f"{precision}: peak RAM against a plain script", found=f"{memory - 1:+.2%}", wanted="2 %"))
    figures.append(Figure(what=f"{precision}: decode tokens/s against it", found=f"{decode - 1:+.2%}", wanted="5 %"))
    assert abs(memory - 1) <= 0.02
    assert abs(decode - 1) <= 0.05


def test_parent_uses_at_most_a_hundredth_of_a_core(
    benchmark: BenchmarkFixture, figures: list[Figure], location: Path, setting: RunContext
) -> None:
    run = Run(planned(location, setting, "bf16"), CaseModel(location=location), setting)
    run.first_round()
    shares: list[float] = []

    def rounds() -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        run.round()
        shares.append((time.process_time() - cpu) / (time.perf_counter() - wall))

    benchmark.pedantic(rounds, rounds=WORK.repeats)
    run.finish()
    share = statistics.median(shares)
    figures.append(Figure(what="parent and sampler while a phase is timed", found=f"{share:.2%} of a core", wanted="1 %"))
    assert share <= 0.01


def measured(tmp_path: Path, *options: str) -> tuple[float, list[dict[str, object]]]:
    begun = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "cases", "-q", "--benchmark-enable", "--results", str(tmp_path), *options]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    wall = time.perf_counter() - begun
    return wall, [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]


def test_three_precisions_within_a_minute(benchmark: BenchmarkFixture, figures: list[Figure], tmp_path: Path) -> None:
    """fp32, bf16 and fp16 on the CPU, five rounds of 64 tokens each, memory and probe included; and 1.25 x plain code."""
    found: list[tuple[float, float]] = []

    def once() -> None:
        directory = tmp_path / str(len(found))
        options = [word for name in DTYPES for word in ("--precision", name)]
        options += ["--placement", "cpu", "--prompt-tokens", "64", "--new-tokens", "64", "--repeats", "5"]
        wall, results = measured(directory, *options)
        assert [result["outcome"] for result in results] == ["ok"] * 3
        phases = [phase for result in results for phase in result["phases"]]  # type: ignore[attr-defined]
        found.append((wall, sum(phase["end_s"] - phase["start_s"] for phase in phases)))

    benchmark.pedantic(once, rounds=1)
    wall, work = found[0]
    what = "fp32, bf16, fp16 on cpu, 5 rounds of 64 + 64 tokens, memory and probe"
    figures.append(Figure(what=what, found=f"{wall:.1f} s", wanted="60 s"))
    figures.append(Figure(what="the same against its loads, rounds and probes", found=f"x {wall / work:.2f}", wanted="x 1.25"))
    assert wall <= 60
    assert wall / work <= 1.25


def test_whole_default_matrix(benchmark: BenchmarkFixture, figures: list[Figure], tmp_path: Path) -> None:
    found: list[tuple[float, int]] = []

    def once() -> None:
        wall, results = measured(tmp_path)
        found.append((wall, sum(result["outcome"] == "ok" for result in results)))

    benchmark.pedantic(once, rounds=1)
    wall, ran = found[0]
    figures.append(Figure(what=f"the default matrix, {ran} cases", found=f"{wall:.0f} s", wanted="150 s"))
    assert wall <= 150


CARDS = ("RTX 4090", "T4", "H100 SXM5 80GB")


def test_plans_of_the_catalog(benchmark: BenchmarkFixture, figures: list[Figure]) -> None:
    """150 models on three cards, every default precision and placement, in one process: seconds of the processor."""
    machines = [profile([card]) for card in CARDS]
    sources = [resolve.resolve(name) for name in sorted(catalog())[:150]]
    assert len(sources) == 150
    spent: list[float] = []

    def once() -> None:
        begun = time.process_time()
        for source in sources:
            assert all(advise_on(source, machine, Workload(), PlanQuestion(), None).plans for machine in machines)
        spent.append(time.process_time() - begun)

    benchmark.pedantic(once, rounds=1)
    figures.append(Figure(what="plans of 150 models on 3 cards", found=f"{spent[0]:.1f} s", wanted="4 s"))
    assert spent[0] <= 4


def test_one_plan_from_a_cold_start(benchmark: BenchmarkFixture, figures: list[Figure], tmp_path: Path) -> None:
    """`fitmatrix plan` of a model of the catalog, the interpreter's start included: seconds of the processor."""
    start, words = ColdStart(tmp_path), ("plan", "qwen2.5-7b-instruct", "--gpu", CARDS[0])
    start.processor_s(*words)
    spent: list[float] = []
    benchmark.pedantic(lambda: spent.append(start.processor_s(*words)), rounds=5)
    figures.append(Figure(what="one plan from a cold start", found=f"{statistics.median(spent):.2f} s", wanted="0.3 s"))
    assert statistics.median(spent) <= 0.3
