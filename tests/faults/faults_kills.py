"""Killed at random: signals at the parent, the worker and the fork server, in every phase.

Runs of tiny models are shown where they are by marks that their conftest.py writes to a pipe; at a mark drawn by lot, and some
milliseconds more, a signal is sent. What must hold afterward is counted: results lost, files corrupt, processes and files left.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.core.options import OPTIONS
from harness.core.records import Result
from harness.results import store
from tests.support import scripted, small_models
from tests.support.reporting import Figure, Section, table

ROOT = Path(__file__).parents[2]
KILLS, REAL, SEED, LANES = 200, 40, 20261124, 2
PRECISIONS = ("fp32", "bf16", "fp16")
PHASES = ("collection", "prepare", "import", "load", "cold", "warm", "score", "append", "render")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP)
TARGETS = ("parent", "parent", "group", "worker", "worker", "fork server")
RESUME = any(option.name == "resume" for option in OPTIONS)
RESUMED_EVERY = 4  # kills after which the rest is run, with --resume
HUNG_S = 120.0
STATUS = {signal.SIGKILL: {-9}, signal.SIGINT: {2}, signal.SIGTERM: {143, -15}}  # -15: before anything had begun
MARKS = """
import os
import time

import pytest

pytest_plugins = ["harness.plugin"]


def mark(*words):
    os.write(int(os.environ["MARKS"]), (" ".join(map(str, words)) + "\\n").encode())


def marked(owner, name, phase):
    \"\"\"Mark the call of a function, which becomes slow enough to be hit.\"\"\"
    function = getattr(owner, name)

    def slow(*args, **kwargs):
        mark(phase)
        time.sleep(0.02)
        return function(*args, **kwargs)

    setattr(owner, name, slow)


def pytest_configure(config):
    from harness.checkpoint import reader
    from harness.measure.protocol import Entered
    from harness.report.page import render
    from harness.results import store
    from harness.run import worker_process

    marked(reader, "read", "prepare")
    marked(store.os, "fsync", "append")
    marked(render, "render", "render")
    ask, append = worker_process.Worker._next, store.Store.append

    def next_(worker, patience):
        event = ask(worker, patience)
        if isinstance(event, Entered):
            mark(event.phase, worker.pid)
        return event

    def appended(self, result):
        append(self, result)
        mark("appended", result.id)

    worker_process.Worker._next, store.Store.append = next_, appended


def pytest_collection(session):
    mark("collection")
    time.sleep(0.02)
"""
SCRIPTED = """

@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session):
    from harness.run import forkserver
    from harness.plugin import SESSION
    from tests.support import builders, scripted

    forkserver.preload("tests.support.scripted")
    session.config.stash[SESSION].worker_main = scripted.by_model
    session.config.stash[SESSION].machine = builders.machine(ram_bytes=480 << 20)
"""


@dataclass(frozen=True)
class Kill:
    """What is done to one run: the signal and whom it goes to, at the so-manieth mark of a phase and a little later."""

    number: int
    phase: str
    nth: int
    delay_s: float
    signal: signal.Signals
    target: str

    @property
    def real(self) -> bool:
        return self.number % (KILLS // REAL) == 0

    def __str__(self) -> str:
        model = "torch" if self.real else "scripted"
        return (
            f"kill {self.number}: {self.signal.name} at {self.target} in {self.phase} {self.nth} + {self.delay_s:.3f} s ({model})"
        )


@dataclass
class Found:
    """What went wrong, each in words, and what was done."""

    lost: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    resumed: int = 0
    done: Counter[str] = field(default_factory=Counter)


@dataclass
class Running:
    """One pytest, its marks, and what it was doing when they were read."""

    process: subprocess.Popen[bytes]
    marks: Any
    output: Path
    worker: int | None = None
    hung: bool = False
    appended: list[str] = field(default_factory=list)

    def read(self) -> str | None:
        """Return the next mark, None at the end."""
        words = self.marks.readline().split()
        if not words:
            return None
        if words[0] == "appended":
            self.appended.append(words[1])
        elif len(words) > 1:
            self.worker = int(words[1])
        return str(words[0])


@dataclass
class Lane:
    """Runs that follow each other, each in a project of its own, with one directory for temporary files."""

    home: Path
    models: dict[bool, Path]
    found: Found

    @property
    def temporary(self) -> Path:
        return self.home / "t"

    def project(self, real: bool) -> Path:
        """Return the directory of a project without results."""
        place = self.home / ("real" if real else "scripted")
        if not place.exists():
            shutil.copytree(ROOT / "cases", place / "cases", ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copytree(self.models[real], place / "tiny")
            (place / "conftest.py").write_text(MARKS if real else MARKS + SCRIPTED)
            settings = '[tool.pytest.ini_options]\naddopts = ["-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider"]\n'
            (place / "pyproject.toml").write_text(settings + 'markers = ["stage(n): the order of the tests of one case"]\n')
        self.temporary.mkdir(exist_ok=True)
        return place

    @contextlib.contextmanager
    def run(self, real: bool, *words: str) -> Iterator[Running]:
        place = self.project(real)
        options = [part for name in PRECISIONS for part in ("--precision", name)]
        limit = "30" if real else "4"
        options += ["--placement", "cpu", "--new-tokens", "3", "--repeats", "2", "--phase-timeout", limit, *words]
        reading, writing = os.pipe()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "MARKS": str(writing), "KILLED": str(self.home)}
        output = self.home / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "cases", "--model", "./tiny", *options],
                cwd=place, env=environment, stdout=file, stderr=file, start_new_session=True, pass_fds=(writing,),
            )  # fmt: skip
        os.close(writing)
        run = Running(process, os.fdopen(reading), output)
        watchdog = threading.Timer(HUNG_S, self._give_up, [run])
        watchdog.start()
        try:
            yield run
        finally:
            watchdog.cancel()
            run.marks.close()

    def _give_up(self, run: Running) -> None:
        run.hung = True
        for process in self._living():
            process.kill()

    def kill(self, kill: Kill) -> None:
        """Disturb a run, and look at what is left of it."""
        results = self.project(kill.real) / "fitmatrix-results"
        shutil.rmtree(results, ignore_errors=True)
        with self.run(kill.real) as run:
            self._strike(kill, run)
            while run.read() is not None:
                pass
            self._wait(kill, run)
        self._look(kill, run, results)
        if RESUME and kill.number % RESUMED_EVERY == 0:
            self._resume(kill, results)

    def _strike(self, kill: Kill, run: Running) -> None:
        left = kill.nth
        while left:
            seen = run.read()
            if seen is None:
                break
            left -= seen == kill.phase
        time.sleep(kill.delay_s)
        target = self._target(kill.target, run)
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if kill.target == "group" and kill.signal is not signal.SIGKILL:
                os.killpg(run.process.pid, kill.signal)
            else:
                psutil.Process(target).send_signal(kill.signal)
            if kill.signal is signal.SIGSTOP and target == run.process.pid:
                time.sleep(0.5)
                os.killpg(run.process.pid, signal.SIGCONT)
        self.found.done[f"{kill.signal.name} {kill.target}"] += 1
        self.found.done[kill.phase] += 1

    def _target(self, name: str, run: Running) -> int:
        """Return the process of this name, or the parent where there is none yet."""
        if name == "worker" and run.worker is not None:
            return run.worker
        if name == "fork server":
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(run.process.pid).children():
                    if "multiprocessing.forkserver" in " ".join(child.cmdline()):
                        return child.pid
        return run.process.pid

    def _wait(self, kill: Kill, run: Running) -> None:
        status = run.process.wait()
        if run.hung:
            self.found.hung.append(f"{kill}: {run.output.read_text()[-300:]}")
            return
        struck = kill.target in ("parent", "group")
        wanted = STATUS.get(kill.signal, {0, 1}) | {0, 1} if struck else {0, 1} | STATUS.get(kill.signal, {0})
        if status not in wanted:
            self.found.statuses.append(f"{kill}: exit status {status}: {run.output.read_text()[-1500:]}")

    def _look(self, kill: Kill, run: Running, results: Path) -> None:
        for orphan in self._orphans():
            self.found.orphans.append(f"{kill}: {orphan}")
        kept, problems = self._stored(results)
        self.found.corrupt += [f"{kill}: {problem}" for problem in problems]
        self.found.lost += [f"{kill}: {name}" for name in run.appended if name not in [result.id for result in kept]]
        if len(kept) != len({result.id for result in kept}):
            self.found.corrupt.append(f"{kill}: twice the same of {[result.id for result in kept]}")
        page = results / "index.html"
        if page.exists() and not page.read_text().rstrip().endswith("</html>"):
            self.found.corrupt.append(f"{kill}: {page.name} is cut short")
        died = run.process.returncode in (-9, -15)
        if run.appended and not page.exists() and not died:
            self.found.lost.append(f"{kill}: no page: {run.output.read_text()[-1500:]}")
        strange = {path.name for path in results.glob("*")} - {"results.jsonl", "results.jsonl.lock", "index.html"}
        if not died:  # a dead one's are taken away by the next
            strange |= {path.name for path in self.temporary.iterdir()}
        self.found.leftovers += [f"{kill}: {name}" for name in strange if not (died and name.startswith(".index.html"))]

    def _stored(self, results: Path) -> tuple[list[Result], list[Any]]:
        path = results / "results.jsonl"
        return store.read(path) if path.exists() else ([], [])

    def _orphans(self) -> list[str]:
        """Return what still lives of a run, a while after its end; and end it."""
        until_s = time.monotonic() + 30
        while (left := list(self._living())) and time.monotonic() < until_s:
            time.sleep(0.05)
        for process in left:
            process.kill()
        return [str(process) for process in left]

    def _living(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("KILLED") == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def _resume(self, kill: Kill, results: Path) -> None:
        """Run what is missing: afterward every case has its result, and none was run twice but those that had ended badly.

        Where the widest precision had, the others were judged by a lesser one, and are run again to be judged by it.
        """
        ids = [f"tiny/{precision}/cpu" for precision in PRECISIONS]
        before = [result.id for result in self._stored(results)[0] if result.outcome.value == "ok"]
        stand = before if ids[0] in before else []
        with self.run(kill.real, "--resume") as run:
            while run.read() is not None:
                pass
            run.process.wait()
        after = [result.id for result in self._stored(results)[0]]
        self.found.resumed += 1
        if set(after) != set(ids):
            self.found.different.append(f"{kill}: resumed to {after}")
        self.found.different += [f"{kill}: {name} was run again" for name in run.appended if name in stand]

    def settle(self) -> None:
        """Run once undisturbed: then nothing is left of the dead either."""
        with self.run(False) as run:
            while run.read() is not None:
                pass
            run.process.wait()
        self.found.leftovers += [f"after a quiet run: {path.name}" for path in self.temporary.iterdir()]


def drawn() -> list[Kill]:
    """Draw the kills by lot, the same ones every time, phases in turn."""
    lot = random.Random(SEED)
    return [
        Kill(
            number=number,
            phase=PHASES[number % len(PHASES)],
            nth=lot.randint(1, 3) if PHASES[number % len(PHASES)] not in ("collection", "prepare", "render") else 1,
            delay_s=lot.uniform(0, 0.06),
            signal=lot.choice(SIGNALS),
            target=lot.choice(TARGETS),
        )
        for number in range(KILLS)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    place = tmp_path_factory.mktemp("models")
    small_models.save("llama", place / "real")
    behaviors = dict.fromkeys(PRECISIONS, "brisk")
    return {True: place / "real", False: scripted.write_model(place / "scripted", **behaviors)}


def test_nothing_is_lost_and_nothing_left(
    section: Section, figures: list[Figure], models: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = Found()
    lanes = [Lane(tmp_path_factory.mktemp("k"), models, found) for _ in range(LANES)]
    kills = drawn()[: int(os.environ.get("FITMATRIX_KILLS", KILLS))]

    def go(number: int) -> None:
        for kill in kills[number::LANES]:
            lanes[number].kill(kill)
        lanes[number].settle()

    with ThreadPoolExecutor(LANES) as pool:
        list(pool.map(go, range(LANES)))
    counted = {
        "results lost": found.lost,
        "corrupt files": found.corrupt,
        "orphans": found.orphans,
        "leftovers": found.leftovers,
        "runs that hung": found.hung,
        "exit statuses that are not the signal's": found.statuses,
    }
    for what, wrong in counted.items():
        figures.append(Figure(what=f"{what}, of kills in every phase", rows=len(kills), found=str(len(wrong)), wanted="0"))
    if RESUME:
        what = "runs resumed after a kill that differ from an undisturbed one"
        figures.append(Figure(what=what, rows=found.resumed, found=str(len(found.different)), wanted="0"))
    section.notes.append(
        "\n".join(table(["what was hit", "times"], [[name, str(found.done[name])] for name in sorted(found.done)]))
    )
    wrong = [line for lines in (*counted.values(), found.different) for line in lines]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(RESUME, reason="runs are resumed above")
def test_resumed_runs_end_like_undisturbed_ones() -> None:
    pytest.skip("there is no option --resume yet")
