"""CONTRIBUTING is right about the code: its map is that of the architecture test, and "where do I change X?" leads somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.test_architecture import BESIDE, FLOORS, PACKAGE, ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
QUESTIONS = re.findall(r"^\| ([^|]+) \| `(harness/[\w/]+\.py)` \| `(\w+)` \|$", TEXT, re.M)


def defined_in(path: Path) -> set[str]:
    """Return the public names that a module itself defines at its top."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_it_answers_twenty_questions() -> None:
    assert len({question for question, _, _ in QUESTIONS}) >= 20


@pytest.mark.parametrize(("question", "file", "name"), QUESTIONS)
def test_the_file_exists_and_defines_the_name(question: str, file: str, name: str) -> None:
    assert name in defined_in(ROOT / file), question


def test_the_map_has_every_room_on_its_floor() -> None:
    lines = re.findall(r"^ ?(\d+)  (.*)$", TEXT, re.M)
    shown = {int(number): set(re.findall(r"\b\w+(?=/)|\w+(?=\.py)|__main__", words[:35])) for number, words in lines}
    for number, names in enumerate(FLOORS):
        assert number == 0 or shown[number] == set(names), f"floor {number}"
    assert all(f"`{name}`" in TEXT and (PACKAGE / name).is_dir() for name in BESIDE)
