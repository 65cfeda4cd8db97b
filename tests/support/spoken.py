"""What a command says: its exit status, standard output and standard error."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from harness.cli.entry import main

Said = Callable[..., tuple[int, str, str]]


def saying(capsys: pytest.CaptureFixture[str], *begin: str) -> Said:
    """Return what runs `fitmatrix` in this process with these words and the caller's after them."""

    def said(*words: object) -> tuple[int, str, str]:
        status = main([*begin, *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return said
