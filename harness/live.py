"""One live line under the terminal's own: which case runs, in which phase, for how long, with how much memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from harness.meters import Sample
from harness.units import format_size

if TYPE_CHECKING:
    from _pytest._io import TerminalWriter

    from harness.runner import Run

_EVERY_S = 0.25


class LiveLine:
    """Called with every sample; draws at most four times a second, and only on a terminal."""

    def __init__(self, terminal: TerminalWriter, total: int) -> None:
        self._terminal, self._total = terminal, total
        self._drawn_s = 0.0
        self._seen: list[str] = []
        self._on = bool(getattr(terminal._file, "isatty", lambda: False)())

    def __call__(self, run: Run, sample: Sample) -> None:
        now = time.monotonic()
        if not self._on or now - self._drawn_s < _EVERY_S:
            return
        self._drawn_s = now
        if run.plan.case.id not in self._seen:
            self._seen.append(run.plan.case.id)
        self._draw(line(run, sample, len(self._seen), self._total))

    def _draw(self, text: str) -> None:
        """Draw below the current line and come back: the terminal's own progress stays where it is."""
        width, column = self._terminal.fullwidth, self._terminal.width_of_current_line
        self._terminal._file.write(f"\n\r\x1b[K{text[: width - 1]}\x1b[A\r" + (f"\x1b[{column}C" if column else ""))
        self._terminal._file.flush()

    def clear(self) -> None:
        """Remove the line."""
        if self._on and self._drawn_s:
            self._draw("")


def line(run: Run, sample: Sample, number: int, total: int) -> str:
    """Return e.g. ``chatglm-6b/int8/direct  3/14  warm 2/5  00:41  gpu:0 8.10 GiB  RAM 1.20 GiB``."""
    phase = run.phase
    if phase == "warm":
        phase = f"warm {len(run.warm) + 1}/{run.plan.case.workload.repeats}"
    seconds = int(run.seconds)
    memory = [f"{tier} {format_size(size)}" for tier, size in sorted(sample.vram_bytes.items())]
    memory.append(f"RAM {format_size(sample.ram_bytes)}")
    return "  ".join([run.plan.case.id, f"{number}/{total}", phase, f"{seconds // 60:02d}:{seconds % 60:02d}", *memory])
