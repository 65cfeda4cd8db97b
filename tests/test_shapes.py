"""No class and no function grows past what can be read in one go. Read from the source by ast."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "harness"
MOST_METHODS, MOST_PARAMETERS, MOST_LINES = 20, 6, 60

# Signatures that a library dictates: it passes these arguments by their names.
DICTATED = {
    "models/chatglm.py forward",  # transformers calls a model with what generate and the Trainer prepare
    "worker/trace/kernels.py __call__",  # torch's scaled_dot_product_attention
    "worker/trace/kernels.py multiply_4bit",  # bitsandbytes' operator gemm_4bit
    "models/tokenization_chatglm.py __init__",  # AutoTokenizer passes the fields of tokenizer_config.json
}
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Yield each node of the package with the path of its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path.relative_to(PACKAGE).as_posix(), node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count what a caller may pass."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs) if one.arg not in ("self", "cls")]
    return len(names) + (given.vararg is not None) + (given.kwarg is not None)


@pytest.fixture(scope="module")
def functions() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return [(f"{path} {node.name}", node) for path, node in nodes() if isinstance(node, Function)]


def test_no_class_has_more_methods_than_can_be_kept_in_mind() -> None:
    classes = [(f"{path} {node.name}", node) for path, node in nodes() if isinstance(node, ast.ClassDef)]
    found = {name: sum(isinstance(part, Function) for part in node.body) for name, node in classes}
    assert not {name: count for name, count in found.items() if count > MOST_METHODS}


def test_many_parameters_are_a_record(functions: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]) -> None:
    found = {(name, node.lineno): parameters(node) for name, node in functions}
    many = {key: count for key, count in found.items() if count > MOST_PARAMETERS}
    assert {name for name, _ in many} >= DICTATED, "an exception that is not needed any more"
    assert not {f"{name}:{line}": count for (name, line), count in many.items() if name not in DICTATED}


def test_no_function_is_longer_than_a_screen(functions: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]) -> None:
    lengths = {f"{name}:{node.lineno}": (node.end_lineno or node.lineno) - node.lineno + 1 for name, node in functions}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}
