"""One name, one thing: public names that are defined in more than one module, counted from the source by ast; one spelling.

`python -m tests.test_names` lists them.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.test_architecture import ROOT, SOURCES

MOST_SHARED = 25
# The protocol of a command and of a process: every module of the kind has them, by the table of commands or by `python -m`.
PROTOCOL = {"HELP", "add_arguments", "run", "main"}
# American spelling, as libraries write it, in code, help and documentation. Old sentences are translated as they were recorded, and
# the texts of the probe stay as they are.
BRITISH = re.compile(
    r"(quant|normal|initial|serial|optim|token|organ|parallel|vector)is(e|ed|es|er|ers|ing|ation)(?![a-z])|\w*(colour|behaviour|neighbour|favour|honour)"
    r"|\b(licence|learnt|modelled|labelled|afterwards|towards)\b",
    re.IGNORECASE,
)
AS_THEY_WERE = {"zh.toml", "probe.toml", Path(__file__).name}


def british() -> Iterator[str]:
    """Yield where a word is spelled otherwise."""
    for folder, pattern in {"harness": "**/*", "docs": "*.md", "tests": "**/*.py", "cases": "*.py", ".": "*.*"}.items():
        for path in (ROOT / folder).glob(pattern):
            if path.suffix in {".py", ".md", ".toml", ".js", ".css", ".j2", ".ini"} and path.name not in AS_THEY_WERE:
                text = path.read_text(encoding="utf-8")
                yield from (f"{path.relative_to(ROOT)}: {found[0]}" for found in BRITISH.finditer(text))


def defined(tree: ast.Module) -> Iterator[str]:
    """Yield the public functions, classes and constants that a module defines at its top; a TypeVar is none."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            is_type = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "TypeVar"
            names = [] if is_type else [one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def shared() -> dict[str, list[str]]:
    """Return the names that two modules or more define, and where."""
    places: dict[str, set[str]] = defaultdict(set)
    for module, path in SOURCES.items():
        for name in defined(ast.parse(path.read_text(encoding="utf-8"))):
            places[name].add(module)
    return {name: sorted(found) for name, found in sorted(places.items()) if len(found) > 1 and name not in PROTOCOL}


def test_the_reader_sees_every_kind_of_definition() -> None:
    """Else the test below would pass by looking away."""
    tree = ast.parse("A = B = 1\nC: int = 2\ndef d(): ...\nclass E: ...\n_f = 3\nT = TypeVar('T')\nif True:\n    G = 4\n")
    assert list(defined(tree)) == ["A", "B", "C", "d", "E"]


def test_a_name_means_one_thing() -> None:
    found = shared()
    assert len(found) < MOST_SHARED, "\n".join(f"{name}: {', '.join(modules)}" for name, modules in found.items())


def test_words_are_spelled_as_americans_do() -> None:
    assert not [*british()]
    assert all(BRITISH.search(word) for word in ("quantise_elements", "COLOURS", "_is_favourite", "is tokenised", "a licence"))
    assert not BRITISH.search("aria-labelledby, quantize, color, parallelism, initializer, otherwise, noise, precise, is")


if __name__ == "__main__":
    for name, modules in shared().items():
        print(f"{name}: {', '.join(modules)}")
