"""Frames one after the other, of what runs at each moment, from a bounded window of readings."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from harness.core.records import encode_record
from harness.live.frame import LiveFrame
from harness.live.moment import frame
from harness.live.reading import Reading, Sensors
from harness.live.subject import Subject, WatchTarget
from harness.machine import atomic
from harness.machine.scratch import is_scratch

_KEPT = 240  # readings: two minutes at two a second
_SHORTLY_S = 0.5


class Stream:
    """What is watched: `next_frame` reads once more and returns what it shows. `subject` is who was seen last."""

    def __init__(self, target: WatchTarget, sensors: Sensors) -> None:
        self._target, self._sensors = target, sensors
        self._readings: deque[Reading] = deque(maxlen=_KEPT)
        self.subject: Subject | None = None
        self.results: Path | None = None

    def next_frame(self) -> LiveFrame:
        """Read, and return a frame.

        Raises:
            ProcessLookupError: the process that was asked for has ended.
        """
        self.subject = self._target.look()
        said = self._sensors.announced(self.subject)
        self.results = Path(said.results) if said and said.results else self.results
        now = self._sensors.read(self.subject)
        self._readings.append(now)
        return frame(list(self._readings), said)


def frames(stream: Stream, every_s: float) -> Iterator[LiveFrame]:
    """Yield a frame every `every_s` seconds until the process that was asked for has ended; forever if none was."""
    due_s = time.monotonic()
    while True:
        try:
            yield stream.next_frame()
        except ProcessLookupError:
            return
        due_s = max(due_s + every_s, time.monotonic())  # a machine that slept is not caught up with
        time.sleep(max(due_s - time.monotonic(), 0.0))


def look_twice(stream: Stream) -> LiveFrame:
    """Return one frame with what takes two readings to tell, such as tokens/s.

    Raises:
        ProcessLookupError: the process that was asked for has ended.
    """
    stream.next_frame()
    time.sleep(_SHORTLY_S)
    return stream.next_frame()


class Recording:
    """Frames kept to be saved, `most` (an even number) at most: when they are that many, every other one goes."""

    def __init__(self, most: int = 2000) -> None:
        self._most, self._stride, self._seen = most, 1, 0
        self._lines: list[bytes] = []

    def add(self, one: LiveFrame) -> None:
        """Keep a frame, or every second, fourth, ... of a long time."""
        if self._seen % self._stride == 0:
            if len(self._lines) == self._most:
                del self._lines[1::2]
                self._stride *= 2
            self._lines.append(encode_record(one) + b"\n")
        self._seen += 1

    def __len__(self) -> int:
        return len(self._lines)

    def save(self, folder: Path | None, clock: str) -> Path:
        """Write the frames as JSON lines beside the results, in the current directory if these will not stay. Raises OSError."""
        stays = folder is not None and folder.is_dir() and not is_scratch(folder)
        name = f"watch-{''.join(letter for letter in clock[:19] if letter not in '-:')}.jsonl"
        path = (folder if stays and folder is not None else Path.cwd()) / name
        atomic.write_bytes(path, b"".join(self._lines))
        return path
