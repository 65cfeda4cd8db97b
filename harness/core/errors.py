"""What can go wrong with the harness and its inputs; what a *model* does wrong is an outcome, not an error.

::

    HarnessError                 about the harness or its inputs: what, the value seen, what to do
     |- UsageError               an option, a catalog or table name, or a model that cannot be had; exit status 2
     |- CheckpointError          unreadable, incomplete or hostile files (carries the path)
     |- StoreError               results that cannot be read or written (carries path and line)
     `- WorkerError              the worker broke the protocol: a bug of ours
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class HarnessError(Exception):
    """One sentence for the user: what is wrong, the value seen, the way out."""


class UsageError(HarnessError):
    """The request was wrong: an option, a name, a model that cannot be had."""


class CheckpointError(HarnessError):
    """The files of a model are unreadable, incomplete or hostile."""

    def __init__(self, path: Path | str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = str(path)


class StoreError(HarnessError):
    """A store of results cannot be read or written."""

    def __init__(self, path: Path | str, message: str, line: int | None = None) -> None:
        where = f"{path}:{line}" if line is not None else f"{path}"
        super().__init__(f"{where}: {message}")
        self.path = str(path)
        self.line = line


class WorkerError(HarnessError):
    """The worker broke the protocol."""


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """Say which known names resemble `value`, else list them all; the dashes that all options begin with are no resemblance.

    Returns a phrase to end a sentence with, such as ``did you mean 'int4'?``.
    """
    import difflib  # of what is right, nothing is asked

    names = sorted(known)
    folded = {name.casefold().lstrip("-"): name for name in names}
    close = difflib.get_close_matches(value.casefold().lstrip("-"), folded, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(folded[name]) for name in close) + "?"
    return "known: " + ", ".join(names)
