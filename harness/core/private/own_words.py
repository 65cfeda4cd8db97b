"""Words that are ours: what our own texts say is nobody's secret, though somebody may be called so or have it as a password.

There is no list to keep: the sources are asked, and only when a name of this machine is a plain word that stands in them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).parents[2]
_DATA = ("probe.toml", "dialogues.toml", "gpus.json", "catalog.toml")


@functools.lru_cache(maxsize=256)
def is_ours(word: str) -> bool:
    """Say whether a word stands in a text of ours: a string of the sources that is no documentation, or the data we speak from."""
    if not word.isascii() or not word.replace("_", "").isalnum():
        return False
    whole = re.compile(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])")
    return any(whole.search(text) for text in _texts(whole))


def _texts(wanted: re.Pattern[str]) -> Iterator[str]:
    """Yield the texts of the files that hold what is wanted at all."""
    for name in _DATA:
        yield (_PACKAGE / "data" / name).read_text(encoding="utf-8")
    for path in _PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if wanted.search(source):
            yield from _strings(source)


def _strings(source: str) -> Iterator[str]:
    import ast  # few words are looked for, and fewer are found

    tree = ast.parse(source)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    documentation = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id  # the name of a record's field, which is a key of its JSON
