"""Commands that the product's own texts name exist, with their options: in messages, help, templates and data."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs import blocks, tables
from tests.docs.test_docs import OTHERS

HARNESS = blocks.ROOT / "harness"
# Words behind the name that are no command: the name of the thing itself, in the middle of a sentence.
NAMED = re.compile(r"(?:(?<=^)|(?<=[\s`'\"(>]))(?P<program>fitmatrix|pytest cases/)(?P<rest>(?: (?!-- )[^\s;:,`'\"()<]+)*)")
FLAG = re.compile(r"--[a-z][\w-]*")


def literals(path: Path) -> Iterator[str]:
    """Yield the texts of a module, with X for what is filled in; docstrings are for its readers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, owners) and _has_docstring(node)}  # type: ignore[attr-defined]
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented | inside:
            yield node.value


def _has_docstring(node: ast.AST) -> bool:
    body = getattr(node, "body", None) or [None]
    return isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def texts() -> Iterator[tuple[str, str]]:
    for path in sorted(HARNESS.rglob("*.py")):
        yield from ((str(path.relative_to(HARNESS)), text) for text in literals(path))
    for path in sorted([*HARNESS.rglob("*.j2"), *HARNESS.rglob("*.js"), *HARNESS.rglob("*.toml")]):
        yield str(path.relative_to(HARNESS)), re.sub(r"\{\{.*?\}\}", "X", path.read_text(encoding="utf-8"))


def test_every_command_that_a_message_names_exists_with_its_options() -> None:
    run, found = {option.flag for option in tables.OPTIONS}, 0
    for where, text in texts():
        for match in NAMED.finditer(" ".join(text.split())):
            words = match["rest"].split()
            flags = {flag for word in words if (flag := word.rstrip(".,")) and FLAG.fullmatch(flag)}
            if match["program"] == "pytest cases/":
                assert flags <= run | OTHERS, f"{where}: {match[0]}"
                found += 1
            elif words and (flags or words[0].rstrip(".,") in tables.COMMANDS):
                command = words[0].rstrip(".,")
                assert command in tables.COMMANDS, f"{where}: {match[0]}"
                assert flags <= tables.flags(command), f"{where}: {match[0]}"
                found += 1
    assert found > 20
