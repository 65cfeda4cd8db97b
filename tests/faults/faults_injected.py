"""Injected faults: each call of the system that touches a command's files fails, in each of its ways.

What must hold whatever fails: no traceback, an exit status that is documented, every result kept or said to be elsewhere, and
each file as it was or whole. The calls are found by a survey under strace, and made to fail one by one in copies of its folder.
"""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

from harness.core.records import Result, encode_record
from harness.results import store
from tests.faults.injected import ROOT, Command, Ended, Injection, fresh, inject, survey
from tests.support import builders, runs, scripted
from tests.support.reporting import Figure, Section, gathered, table

INJECTIONS, SEED, LANES = 1000, 20261130, 3
pytestmark = pytest.mark.skipif(
    shutil.which("strace") is None or platform.machine() != "x86_64", reason="needs strace, and the calls of x86_64"
)
CASES = ("tiny/bf16/cpu", "tiny/fp32/cpu", "tiny/fp16/cpu")


@pytest.fixture
def section(request: pytest.FixtureRequest) -> Iterator[Section]:
    yield from gathered(request, "faults.md", "Injected faults", "tox run -e faults", request.node.callspec.params["scene"].name)


class Scene(NamedTuple):
    """A command, what it needs, and what must hold of its folder when one of its calls has failed: each breach in words."""

    name: str
    prepare: Callable[[Path], None]
    words: Sequence[str]
    mine: tuple[str, ...]  #: parts of a line of strace's that say the command's own files
    breaches: Callable[[Path, Ended], Iterator[str]]
    statuses: tuple[int, ...] = (0, 1, 2)
    share: int = 0  #: of a thousand injections; a run takes longest

    def command(self, folder: Path) -> Command:
        places = [f"{folder}/{part}" if not part.startswith("1<") else part for part in self.mine]
        # Nothing makes flock(2) fail that lets go of a lock.
        return Command(self.words, lambda line: "LOCK_UN" not in line and any(place in line for place in places))


def golden() -> list[Result]:
    return store.read(builders.GOLDEN)[0]


def save_results(place: Path) -> None:
    place.mkdir(parents=True)
    dated = [one.at.replace("2026", "2024") for one in golden()]
    lines = [encode_record(one).replace(one.at.encode(), at.encode()) for one, at in zip(golden(), dated, strict=True)]
    (place / store.NAME).write_bytes(b"".join(line + b"\n" for line in lines))


def said_in_sentences(ended: Ended) -> Iterator[str]:
    """Whatever is wrong is told in lines that name the program; the rest is what the command prints anyway."""
    if ended.status == 2 and not re.search(r"fitmatrix: \S", ended.output):
        yield "exit status 2 without a sentence"


def prepare_plan(folder: Path) -> None:
    scripted.write_model(folder / "tiny")
    save_results(folder / "fitmatrix-results")


def of_plan(folder: Path, ended: Ended) -> Iterator[str]:
    yield from said_in_sentences(ended)
    of_cache = "/cache/" in ended.line or f"{folder}/t/" in ended.line
    if of_cache and ended.status != 0:
        yield f"a cache that fails gives exit status {ended.status}"
    if ended.status == 0 and '"plans"' not in ended.output:
        yield "exit status 0 without an answer"


def prepare_report(folder: Path) -> None:
    save_results(folder / "results")
    (folder / "results/index.html").write_text("the page of before")


def page_is_whole(page: Path, before: str, ended: Ended) -> Iterator[str]:
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if text != before and not text.rstrip().endswith("</html>"):
        yield f"{page.name} is neither what it was nor whole"
    if ended.status == 0 and text == before:
        yield f"exit status 0, and {page.name} was not written"


def of_report(folder: Path, ended: Ended) -> Iterator[str]:
    yield from said_in_sentences(ended)
    yield from page_is_whole(folder / "results/index.html", "the page of before", ended)
    if len(store.read(folder / "results" / store.NAME)[0]) != len(golden()):
        yield "lost: results are gone from the store"


def prepare_publish(folder: Path) -> None:
    save_results(folder / "in/one")
    (folder / "site").mkdir()
    (folder / "site/fitmatrix-site").touch()
    (folder / "site/index.html").write_text("the site of before")
    (folder / "site/CNAME").write_text("example.org")


def of_publish(folder: Path, ended: Ended) -> Iterator[str]:
    yield from said_in_sentences(ended)
    beside = [path for path in folder.glob(".site.*") if (path / "index.html").exists()]
    places = [folder / "site", *beside]  # a rename that fails between the two of a swap leaves both beside each other
    if not any((place / "index.html").exists() for place in places):
        yield "lost: the site of before is gone"
    if not any((place / "CNAME").exists() for place in places):
        yield "lost: what was not ours in the site is gone"
    if (folder / "site").exists():
        yield from page_is_whole(folder / "site/index.html", "the site of before", ended)
    refused = "0 lines refused" not in ended.output
    published = [line for path in folder.glob("site/raw/*") for line in path.read_bytes().splitlines()]
    if ended.status == 0 and not refused and len(published) != len(golden()):
        yield "lost: results are not published, and nobody says so"


def prepare_run(folder: Path) -> None:
    runs.folder(folder, ["tiny"])
    save_results(folder / "fitmatrix-results")


def of_run(folder: Path, ended: Ended) -> Iterator[str]:
    """Whatever was measured is in the store, or where the run says; what was there before is there."""
    found = [one.id for one in store.read(folder / "fitmatrix-results" / store.NAME)[0]]
    if len([name for name in found if name not in CASES]) < len([one for one in golden() if one.id not in CASES]):
        yield "lost: results of earlier runs are gone from the store"
    rescued = [one.id for path in (folder / "t").glob("fitmatrix-rescued-*/results.jsonl") for one in store.read(path)[0]]
    if any(rescued) and "fitmatrix-rescued-" not in ended.output:
        yield "lost: rescued, and nobody says where"
    measured = [name for name in CASES if re.search(rf"^{name} +\S+ +works", ended.output, re.MULTILINE)]
    yield from (f"lost: {name} was measured, and is nowhere" for name in measured if name not in [*found, *rescued])
    if ended.status == 0 and len(measured) < len(CASES):
        yield "exit status 0, and not all was measured"


PRECISIONS = [part for name in ("bf16", "fp32", "fp16") for part in ("--precision", name)]
RUN = ["-m", "pytest", "cases", "--model", "./tiny", *PRECISIONS, "--placement", "cpu", "--new-tokens", "3", "--repeats", "2"]
SCENES = (
    Scene("plan", prepare_plan, ["-m", "harness", "plan", "./tiny", "--ram", "8GiB", "--json"], ("", "1<"), of_plan, share=270),
    Scene("report", prepare_report, ["-m", "harness", "report", "results"], ("", "1<"), of_report, share=270),
    Scene("publish", prepare_publish, ["-m", "harness", "publish", "in", "--to", "site"], ("", "1<"), of_publish, share=420),
    Scene("run", prepare_run, RUN, ("fitmatrix-results", "t/", "cache", "tiny"), of_run, (0, 1, 2, 4), 40),
)


@dataclass
class Found:
    """What went wrong, each in words, and what was done."""

    tracebacks: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    breaches: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    ended: Counter[int] = field(default_factory=Counter)
    foreign: int = 0

    def judge(self, scene: Scene, one: Injection, folder: Path, ended: Ended) -> None:
        tail = f"{scene.name}: {one}\n    {ended.line[:200]}\n    {ended.output[-600:]}"
        self.done[f"{one.call} {one.error}"] += 1
        self.ended[ended.status] += 1
        if ended.hung:
            self.hung.append(tail)
            return
        if "Traceback (most recent call last)" in ended.output or "INTERNALERROR" in ended.output:
            self.tracebacks.append(tail)
        if ended.status not in scene.statuses:
            self.statuses.append(f"exit status {ended.status}: {tail}")
        for breach in scene.breaches(folder, ended):
            (self.lost if breach.startswith("lost: ") else self.breaches).append(f"{breach}: {tail}")


def is_of_pytest(ended: Ended) -> bool:
    """Say whether pytest itself, which looks at its arguments before it loads any plugin, was hit; then nobody can help."""
    of_ours = f'File "{ROOT}/harness/'
    return "in pytest_cmdline_parse" in ended.output and of_ours not in ended.output


def drawn(found: Sequence[Injection]) -> Iterator[Injection]:
    """Draw by lot, calls in turn, so that the rare ones are not lost among thousands of reads."""
    lot = random.Random(SEED)
    by_call: dict[str, list[Injection]] = {}
    for one in found:
        by_call.setdefault(one.call, []).append(one)
    for group in by_call.values():
        lot.shuffle(group)
    while any(by_call.values()):
        for group in by_call.values():
            if group:
                yield group.pop()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder whose name is short enough for a socket's."""
    with TemporaryDirectory(prefix="f") as name:
        yield Path(name)


def prepared(scene: Scene, place: Path) -> Path:
    """Return a folder that is ready for the command: what is asked of a worker once is in its cache."""
    template, caches = place / "template", ("home", "cache", "hf")
    for folder in (place / "first", template):
        for name in (*caches, "t"):
            (folder / name).mkdir(parents=True)
        scene.prepare(folder)
    survey(place / "first", scene.command(place / "first"))
    for name in caches:
        fresh(place / "first" / name, template / name)
    return template


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_no_failure_is_a_traceback_or_loses_a_result(scene: Scene, section: Section, place: Path) -> None:
    template = prepared(scene, place)
    folder = fresh(template, place / "s")
    undisturbed, calls = survey(folder, scene.command(folder))
    assert undisturbed.status == 0, undisturbed.output
    assert not list(scene.breaches(folder, undisturbed))
    wanted = int(os.environ.get("FITMATRIX_INJECTIONS", INJECTIONS)) * scene.share // 1000
    lots, found, lock = drawn(calls), Found(), threading.Lock()

    def go(lane: int) -> None:
        while True:
            with lock:
                one = next(lots, None) if sum(found.done.values()) < wanted else None
            if one is None:
                return
            folder = fresh(template, place / str(lane))
            ended = inject(folder, scene.command(folder), one)
            with lock:
                if is_of_pytest(ended):
                    found.foreign += 1
                elif ended.line or ended.hung:
                    found.judge(scene, one, folder, ended)

    with ThreadPoolExecutor(LANES) as pool:
        list(pool.map(go, range(LANES)))
    write(section, found)
    wrong = [*found.tracebacks, *found.lost, *found.hung, *found.statuses, *found.breaches]
    assert not wrong, "\n\n".join(wrong)
    assert sum(found.done.values()) >= wanted


def write(section: Section, found: Found) -> None:
    rows = sum(found.done.values())
    counted = {
        "tracebacks": found.tracebacks,
        "results lost": found.lost,
        "commands that hung": found.hung,
        "exit statuses that are not documented": found.statuses,
        "files that are neither as they were nor whole, and errors without a sentence": found.breaches,
    }
    for what, wrong in counted.items():
        section.figures.append(Figure(what=what, rows=rows, found=str(len(wrong)), wanted="0"))
    calls = sorted(found.done.items())
    ends = ", ".join(f"{count} with {status}" for status, count in sorted(found.ended.items()))
    hit = f" {found.foreign} more hit pytest before it loads a plugin, and are not counted." if found.foreign else ""
    version = subprocess.run(["strace", "-V"], capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    section.notes.append(
        f"Injected by {version}. Exit statuses: {ends}.{hit}\n\n"
        + "\n".join(table(["call and error", "times"], [[name, str(count)] for name, count in calls]))
    )


def test_the_survey_sees_what_a_command_writes(tmp_path: Path) -> None:
    """Else a thousand injections would hit nothing."""
    (tmp_path / "x").mkdir()
    script = (
        "import os, pathlib; os.mkdir('made'); pathlib.Path('made/file').write_text('text'); os.rename('made/file', 'made/other')"
    )
    command = Command(["-c", script], lambda line: "made" in line)
    ended, calls = survey(tmp_path / "x", command)
    assert ended.status == 0
    assert {"mkdir", "openat", "write", "close", "rename"} <= {one.call for one in calls}
    (tmp_path / "y").mkdir()
    (one,) = [one for one in calls if (one.call, one.error) == ("write", "ENOSPC")]
    failed = inject(tmp_path / "y", command, one)
    assert failed.line.endswith("(INJECTED)")
    assert "No space left on device" in failed.output
