"""Three hundred cases in one session: the parent does not grow.

Each case has a process of its own, with torch and a real model of random weights; the parent looks at itself after each.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from harness.core.units import MIB, format_size
from harness.results.store import Store
from tests.support import runs, small_models
from tests.support.reporting import Figure

CASES, WARM = 300, 20
MOST_BYTES = 10 * MIB
# Anonymous memory: pages of files that were read come and go as the kernel likes.
WATCH = """

import gc
import json

import psutil

LOOKS = []


def pytest_runtest_logfinish(nodeid):
    if "test_memory" in nodeid:
        gc.collect()
        here = psutil.Process()
        memory = here.memory_info()
        children = [child.status() for child in here.children(recursive=True)]
        LOOKS.append(
            {
                "bytes": memory.rss - memory.shared,
                "descriptors": here.num_fds(),
                "threads": here.num_threads(),
                "children": len(children),
                "zombies": children.count("zombie"),
            }
        )


def pytest_unconfigure(config):
    with open("looks.json", "w") as file:
        json.dump(LOOKS, file)
"""


def test_soak(tmp_path: Path, figures: list[Figure]) -> None:
    models = [f"model-{number:03d}" for number in range(CASES)]
    folder = runs.folder(tmp_path, [], WATCH, scripted=False)
    small_models.save("llama", folder / models[0])
    for name in models[1:]:
        (folder / name).mkdir()
        for file in (folder / models[0]).iterdir():
            (folder / name / file.name).hardlink_to(file)
    run = runs.start(folder, models, "-q", "-p", "no:cacheprovider", "--new-tokens", "2", "--repeats", "1")
    try:
        output = run.communicate(timeout=540)[0]
    except subprocess.TimeoutExpired:
        run.terminate()
        raise
    assert run.returncode == 0, output[-5000:]
    results, problems = Store(folder / "fitmatrix-results").read()
    assert (len(results), problems) == (CASES, [])
    looks = json.loads((folder / "looks.json").read_text())
    assert len(looks) == CASES
    warm, last = looks[WARM], looks[-1]
    grown = last["bytes"] - warm["bytes"]
    # A sampler that reads at this moment holds a descriptor, so each window's least is compared: a leak is in every case.
    more = {
        key: min(look[key] for look in looks[-WARM:]) - min(look[key] for look in looks[WARM : 2 * WARM])
        for key in ("descriptors", "threads", "children")
    }
    zombies = max(look["zombies"] for look in looks)
    figures += [
        Figure(
            what=f"parent's own memory, case {WARM} to case {CASES}",
            rows=CASES,
            found=f"{format_size(warm['bytes'])} to {format_size(last['bytes'])}",
            wanted=f"less than {format_size(MOST_BYTES)} more",
        ),
        Figure(what="descriptors more than after warming up", rows=CASES, found=str(more["descriptors"]), wanted="0"),
        Figure(what="threads more than after warming up", rows=CASES, found=str(more["threads"]), wanted="0"),
        Figure(what="processes more than after warming up", rows=CASES, found=str(more["children"]), wanted="0"),
        Figure(what="processes that nobody has waited for", rows=CASES, found=str(zombies), wanted="0"),
    ]
    assert grown < MOST_BYTES, [look["bytes"] for look in looks[::20]]
    assert max(more.values()) <= 0, more
    assert zombies == 0
