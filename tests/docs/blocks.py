"""Outputs and tables in README and docs, as the program makes them. `python -m tests.docs.blocks` rewrites them all.

A comment in front of a fence or a table says what stands there:

    <!-- output: fitmatrix plan chatglm-6b --ram 16GiB -->      the command and what it prints
    <!-- recorded: tox run -e matrix -->                        the same, with figures of results that are kept: see recorded.py
    <!-- table: precisions -->                                  a table of the program, see tables.py

`<!-- output: ... | omit: REGEX -->`, as often as needed, writes "..." instead of the lines that match. The commands of one page run
one after the other in one empty directory, with an empty HOME and cache, in a terminal of WIDTH columns. They describe the machine
that they plan for, so what they print is the same on every machine.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.docs import recorded, tables

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").glob("*.md")))
WIDTH = 100

_BLOCK = re.compile(
    r"^<!-- (?P<kind>output|recorded|table): (?P<what>.+?)(?P<omit>(?: \| omit: .+?)*) -->\n\n"
    r"(?P<text>```console\n(?s:.*?)^```\n|(?:\|.*\n)*)",
    re.MULTILINE,
)
_PASSED = ("PATH", "PYTHONPATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR")


class Block(NamedTuple):
    """One block of a page: what it shows, which lines are left out, and the text that stands there."""

    kind: str
    what: str
    omit: tuple[str, ...]
    text: str


def blocks(path: Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    return [_block(found) for found in _BLOCK.finditer(path.read_text(encoding="utf-8"))]


def _block(found: re.Match[str]) -> Block:
    return Block(found["kind"], found["what"], tuple(found["omit"].split(" | omit: ")[1:]), found["text"])


def fresh(page: list[Block]) -> list[str]:
    """Return what should stand in the blocks of one page."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        return [_fresh(block, there) for block in page]


def _fresh(block: Block, there: Path) -> str:
    if block.kind == "table":
        return tables.table(block.what)
    return fence(block, recorded.printed(WIDTH) if block.kind == "recorded" else run(block.what, there))


def fence(block: Block, printed: str) -> str:
    """Write a command and what it printed as a fenced block."""
    text = "".join(f"{line.rstrip()}\n" for line in printed.rstrip().splitlines())
    for lines in block.omit:
        text = re.sub(lines, "...\n", text, flags=re.MULTILINE | re.DOTALL)
    return f"```console\n$ {block.what}\n{text}```\n"


def run(command: str, there: Path) -> str:
    """Run a `fitmatrix` command in a directory and return its standard output.

    Raises:
        subprocess.CalledProcessError: the program calls the command a mistake, or it ended in another way.
    """
    program, *words = shlex.split(command)
    if program != "fitmatrix":
        raise ValueError(f"{command!r} is no command of fitmatrix: mark it as recorded")
    own = {"HOME": str(there / "home"), "FITMATRIX_CACHE": str(there / "cache"), "COLUMNS": str(WIDTH), "PYTHONUTF8": "1"}
    work = there / "work"
    work.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "harness", *words],
        cwd=work,
        env={**{name: os.environ[name] for name in _PASSED if name in os.environ}, "PYTHONPATH": str(ROOT), **own},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode not in (0, 1):  # 1 is an answer: nothing fits, something got worse
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def rewritten(text: str, shown: Iterable[str]) -> str:
    """Return the text of a page with these texts in its blocks, each with an empty line behind it."""
    left = iter(shown)
    filled = _BLOCK.sub(lambda found: found[0].removesuffix(found["text"]) + next(left), text)
    return re.sub(r"^(\|.*\n)(?=[^|\n])", r"\1\n", filled, flags=re.MULTILINE)


def main() -> None:
    """Rewrite the blocks of all pages."""
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        if (after := rewritten(before, fresh(blocks(path)))) != before:
            path.write_text(after, encoding="utf-8")
            print(f"rewrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
