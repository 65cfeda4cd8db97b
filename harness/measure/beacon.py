"""What a case tells whoever watches it, by files in its folder: once what was planned, and a few times a second how far it is.

Nothing waits for a reader. A beat is one short write, four times a second at most; a file that cannot be written is done without.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from harness.core.records import Record, TierEstimate, Workload, encode_record
from harness.machine import cache
from harness.measure import sampler
from harness.measure.sampler import Memory

CASE = "case-"  # how the folder of a case begins, which its worker works in
ANNOUNCED, LOG = "announced.json", "log"
_PULSE = "pulse-"
_EVERY_S = 0.25
_BEAT_BYTES = 1024  # each beat covers the one before

Knots = list[tuple[int, int]]


class Outlook(Record, frozen=True, kw_only=True):
    """What the plan says beyond the workload: bytes of the KV cache by tier at counts of tokens, straight between them; what else
    would take less of a tier, in words; and how many tokens the model knows."""

    kv: dict[str, Knots] = {}
    lighter: dict[str, str] = {}
    context_length: int | None = None


NO_OUTLOOK = Outlook()


class Announced(Record, frozen=True, kw_only=True):
    """What a case is, before it loads and again once it has; `typed` is how a command names its model, empty if unknown.

    `weights_bytes` by tier are what was loaded, empty before. `limits_bytes` are those of the case. `uncounted_bytes` of the RAM
    are pages of libraries, which the limit of a control group is lowered by. `results` is the folder that the result goes to.
    """

    case: str
    typed: str = ""
    workload: Workload
    tiers: dict[str, TierEstimate] = {}
    outlook: Outlook = NO_OUTLOOK
    limits_bytes: dict[str, int] = {}
    uncounted_bytes: int = 0
    weights_bytes: dict[str, int] = {}
    device_map: dict[str, str] = {}
    results: str | None = None


class Beat(Record, frozen=True, kw_only=True):
    """Where a worker is, by the monotonic clock of the machine.

    `tokens` are in the KV cache of each sequence, `made` were generated since the worker began, of all sequences. `start` is its
    memory before it loaded, `loaded` when it had; `vram` is what torch has allocated and reserved by tier.
    """

    phase: str
    begun_s: float
    at_s: float
    tokens: int = 0
    made: int = 0
    start: Memory | None = None
    loaded: Memory | None = None
    vram: dict[str, tuple[int, int]] = {}


class Pulse:
    """The worker's end: writes beats into `folder`. `vram` says what torch has allocated and reserved by tier."""

    def __init__(self, folder: Path, vram: Callable[[], dict[str, tuple[int, int]]]) -> None:
        self._vram = vram
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(folder / f"{_PULSE}{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._phase, self._begun_s, self._due_s = "start", time.monotonic(), 0.0
        self._tokens = self._made = 0
        self._batch = 1
        self._start: Memory | None = None
        self._loaded: Memory | None = None

    def begin(self, phase: str) -> None:
        """Say that a phase begins; what the process holds before it loads and after is told from then on."""
        if phase == "load":
            self._start, self._loaded = sampler.memory(os.getpid()), None
        elif self._phase == "load":
            self._loaded = sampler.memory(os.getpid())
        self._phase, self._begun_s, self._tokens = phase, time.monotonic(), 0
        self._beat(self._begun_s)

    def prompt(self, tokens: int, batch: int = 1) -> None:
        """Say that `batch` prompts of so many tokens are about to be read."""
        self._tokens, self._batch = max(tokens - 1, 0), batch  # the token that is made is fed back with the next one
        self._beat(time.monotonic())

    def token(self) -> None:
        """Say that each sequence has one more token."""
        self._tokens += 1
        self._made += self._batch
        now = time.monotonic()
        if now >= self._due_s:
            self._beat(now)

    def finish(self) -> None:
        """Say that the text is complete."""
        self._beat(time.monotonic())

    def _beat(self, now: float) -> None:
        self._due_s = now + _EVERY_S
        if self._file is None:
            return
        beat = Beat(
            phase=self._phase,
            begun_s=self._begun_s,
            at_s=now,
            tokens=self._tokens,
            made=self._made,
            start=self._start,
            loaded=self._loaded,
            vram=self._vram(),
        )
        with contextlib.suppress(OSError):  # the disk is full: whoever watches sees the last beat
            os.lseek(self._file, 0, os.SEEK_SET)  # Windows has no pwrite
            os.write(self._file, encode_record(beat).ljust(_BEAT_BYTES))


def announce(folder: Path, what: Announced) -> None:
    """Leave in the folder of a case what it is."""
    cache.keep(folder / ANNOUNCED, encode_record(what))


def announced(folder: Path) -> Announced | None:
    """Return what a case says that it is; None if it says nothing, or is of another version."""
    return cache.kept(folder / ANNOUNCED, Announced)


def last_beat(folder: Path) -> Beat | None:
    """Return the last beat of a case, of several processes with what torch has on the cards of all; None if there is none."""
    names = (name for name in cache.kept_names(folder) if name.startswith(_PULSE))
    beats = [beat for name in names if (beat := cache.kept(folder / name, Beat)) is not None]
    if len(beats) < 2:
        return beats[0] if beats else None
    beats.sort(key=lambda beat: beat.at_s)
    vram = {tier: sizes for beat in beats for tier, sizes in beat.vram.items()}
    ranks = [beat for beat in beats if beat.start is not None]  # the process that leads them loads nothing
    last = ranks[-1] if ranks else beats[-1]
    return Beat(
        phase=last.phase,
        begun_s=last.begun_s,
        at_s=last.at_s,
        tokens=last.tokens,
        made=last.made,
        start=_sum([beat.start for beat in ranks]),
        loaded=_sum([beat.loaded for beat in ranks]),
        vram=vram,
    )


def _sum(parts: list[Memory | None]) -> Memory | None:
    known = [part for part in parts if part is not None]
    return sampler.together(known) if known and len(known) == len(parts) else None
