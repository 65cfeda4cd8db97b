"""Ask a worker that knows transformers one question, in a process of its own; what it answers can be kept in the cache."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.errors import UsageError
from harness.data import DATA

if TYPE_CHECKING:
    import subprocess

# Its exit status if the transformers that is installed has no such architecture, if the model is not of a kind to measure, and if
# transformers' own classes end in an error with such a config.
UNKNOWN_TYPE, NO_DECODER, CONFIG_REFUSED = 3, 4, 5


class UnknownType(UsageError):
    """The transformers that is installed has no architecture of this model type."""


class NotMeasured(UsageError):
    """The model is none that continues a text; the sentence says what it is, and what loads it."""


class RefusedConfig(UsageError):
    """transformers has the architecture, and makes no model of this config; the sentence is its own."""


# What Python says of an error under the lines of code that it came through; a line that ends in a colon goes on.
_RAISED = re.compile(r"^Traceback \(most recent call last\):\n(?: .*\n)*(\S.*(?:(?<=:)\n.*)*)", re.M)
_REFUSALS = {UNKNOWN_TYPE: UnknownType, NO_DECODER: NotMeasured, CONFIG_REFUSED: RefusedConfig}
_WHOLE_SENTENCES = (NotMeasured, RefusedConfig)


def ask_worker(module: str, question: Mapping[str, Any], what: str, limit_s: float) -> bytes:
    """Return the last line that `python -m harness.worker.MODULE` prints for a question, which it reads as JSON.

    Raises:
        UsageError: it did not answer within `limit_s` seconds, or it failed: `what` and its last line. Of these are
            UnknownType, NotMeasured and RefusedConfig.
    """
    import subprocess  # which plans of the catalog do without, as without tempfile

    from harness.machine.scratch import Scratch

    command, text = [sys.executable, "-m", f"harness.worker.{module}"], json.dumps(question).encode()
    try:
        with Scratch() as scratch:  # importing torch makes a folder for temporary files
            settings = {**os.environ, "TMPDIR": str(scratch)}
            done = _run(command, text, limit_s, settings)
    except subprocess.TimeoutExpired:
        raise UsageError(f"{what}: transformers did not answer in {limit_s:.0f} s") from None
    if done.returncode != 0:
        last = _last_said(done)
        refusal = _REFUSALS.get(done.returncode, UsageError)
        raise refusal(last if refusal in _WHOLE_SENTENCES else f"{what}: {last.removeprefix('ValueError: ')}")
    return done.stdout.strip().rpartition(b"\n")[2]  # packages of quantizers print as transformers imports them


def _run(command: Sequence[str], text: bytes, limit_s: float, settings: Mapping[str, str]) -> subprocess.CompletedProcess[bytes]:
    import subprocess

    # `-m` looks in the current directory first: not the user's, which may hold anything, but the one this package lies in.
    home = DATA.parent.parent
    return subprocess.run(command, input=text, capture_output=True, timeout=limit_s, check=False, cwd=home, env=settings)


def _last_said(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return what a process that failed ended with: a signal, an error up to its first line without a colon, or its last line."""
    if done.returncode < 0:
        return f"its process was ended by {signal.Signals(-done.returncode).name}"
    text = done.stderr.decode(errors="replace").strip()
    raised = _RAISED.findall(text)
    return " ".join((raised or text.splitlines() or ["no message"])[-1].split())
