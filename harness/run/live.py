"""What the terminal says of cases: a live line under its own while one runs, and a line of figures when it is done."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from harness.core import text
from harness.core.metrics import READY_NAMES, format_metric, phase_title, when_ready
from harness.core.records import Outcome, Result
from harness.core.units import format_size
from harness.measure.sampler import Sample
from harness.report.page.figures import status
from harness.results.needed import need_of
from harness.results.selection import is_broken
from harness.run.case_result import Running

_EVERY_S = 0.25
_PARTS = {"ready_s": ("load_s", "first_token_s")}
# Make sure of a line below (IND scrolls where there is none), save the cursor, go there, erase; afterward restore it.
# So the terminal's own output goes on where it was, wherever that is.
_BELOW, _BACK = "\x1bD\x1b[A\x1b7\x1b[B\r\x1b[2K", "\x1b8"


class LiveLine:
    """Called with every sample, from the sampler's thread; paints at most four times a second, while shown, on a terminal only.

    It writes to the terminal past pytest, which captures file descriptors while a test runs.
    """

    def __init__(self, stream: TextIO, total: int) -> None:
        self._terminal = os.dup(stream.fileno()) if stream.isatty() else None
        self._total = total
        self._painted_s, self._is_shown, self._is_painted = 0.0, False, False
        self._seen: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, run: Running, sample: Sample) -> None:
        if run.plan.case.id not in self._seen:
            self._seen.append(run.plan.case.id)
        now = time.monotonic()
        if now - self._painted_s < _EVERY_S:
            return
        with self._lock:
            if self._is_shown:
                self._painted_s, self._is_painted = now, True
                self._paint(line(run, sample, len(self._seen), self._total))

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Paint meanwhile, and leave nothing behind: what comes after may write to the terminal."""
        with self._lock:
            self._is_shown = True
        try:
            yield
        finally:
            with self._lock:
                self._is_shown = False
                if self._is_painted:
                    self._paint("")
                    self._is_painted = False

    def _paint(self, words: str) -> None:
        if self._terminal is None:
            return
        try:
            width = os.get_terminal_size(self._terminal).columns or 80
            os.write(self._terminal, f"{_BELOW}{words[: width - 1]}{_BACK}".encode(errors="replace"))
        except OSError:  # the terminal is gone, and the run goes on without it
            self.close()

    def close(self) -> None:
        """Paint no more."""
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None


def line(run: Running, sample: Sample, number: int, total: int) -> str:
    """Return e.g. ``chatglm-6b/int8/direct  3/14  warm round 2/5  00:41  gpu:0 8.10 GiB  RAM 1.20 GiB``."""
    phase, repeats = phase_title(run.phase), run.plan.case.workload.repeats
    if run.phase == "warm":
        extra = len(run.measured.warm) - repeats
        phase = f"{phase} {min(len(run.measured.warm) + 1, repeats)}/{repeats}{f' +{extra}' if extra > 0 else ''}"
    seconds = int(run.seconds)
    memory = [f"{tier} {format_size(size)}" for tier, size in sorted(sample.vram_bytes.items())]
    memory.append(f"RAM {format_size(sample.ram_bytes)}")
    disturbed = ["disturbed" for window in run.measured.windows[-1:] if window.why]
    told = [f"{number}/{total}", phase, f"{seconds // 60:02d}:{seconds % 60:02d}", *disturbed]
    return text.line("  ".join([run.plan.case.id, *told, *memory]))


def summary(result: Result) -> str:
    """Return what a case showed in one line, e.g. ``works  8.10 GiB VRAM  1.20 GiB RAM  23.1 tokens/s  intact``."""
    word = status(result).word
    if result.outcome is not Outcome.OK:
        return f"{word}: {text.line(result.why)}" if result.why else word
    shown = [word]
    if need := need_of(result):
        shown.append(f"{format_size(need.bytes)} {'RAM' if need.tier == 'cpu' else 'VRAM'}")
    for key, words in (("ready_s", f"{READY_NAMES[when_ready(result)]} "), ("decode_tok_s", "")):
        if key in result.metrics:
            shown.append(words + format_metric(key, result.metrics[key]) + _doubt(result, key))
    if result.quality is not None and not is_broken(result):  # the first word says it
        shown.append(result.quality.verdict)
    return "  ".join(shown)


def _doubt(result: Result, key: str) -> str:
    """Mark a figure that is noisy, or that is the sum of one that is."""
    return " (noisy)" if any(part in result.noisy for part in (key, *_PARTS.get(key, ()))) else ""
