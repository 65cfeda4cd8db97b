"""The live screen, by Textual: the lines of a frame, twice a second, with the worker's log below when it is asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.text import Text
from textual.app import App, ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from harness.core.text import visible
from harness.live.frame import LiveFrame
from harness.live.render import lines
from harness.live.stream import Recording, Stream
from harness.measure.beacon import LOG

EVERY_S = 0.5
_KEYS = "q quit  l log  s save"
_LOG_BYTES, _LOG_LINES = 8192, 12


class Screen(App[str]):
    """Shows frames until `q`, or until the process ends; returns why it ended, in a sentence, if not by a key."""

    CSS = "#log { display: none; border-top: solid grey; }"
    BINDINGS = [("q", "quit", "quit"), ("l", "log", "log"), ("s", "save", "save")]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, stream: Stream, every_s: float = EVERY_S) -> None:
        super().__init__()
        self._stream, self._every_s = stream, every_s
        self._recording = Recording()
        self._frame: LiveFrame | None = None
        self._note = ""

    def compose(self) -> ComposeResult:
        """Return the widgets: the frame, which scrolls where it is higher than the terminal, the log and the keys."""
        yield VerticalScroll(Static(id="frame", markup=False))
        yield Static(id="log", markup=False)
        yield Static(_KEYS, id="keys", markup=False)

    async def on_mount(self) -> None:
        """Begin to read."""
        self.query_one("#frame").styles.width = "100%"
        self.query_one("#keys").styles.dock = "bottom"
        await self.look()
        self.set_interval(self._every_s, self.look)

    async def look(self) -> None:
        """Read once more and show it; NVML may take a while, and keys work meanwhile."""
        try:
            self._frame = await asyncio.to_thread(self._stream.next_frame)
        except ProcessLookupError as error:
            self.exit(f"process {error} has ended")
            return
        self._recording.add(self._frame)
        self._show()

    def on_resize(self) -> None:
        """Draw for the new width."""
        self._show()

    def _show(self) -> None:
        if self._frame is None:
            return
        self.query_one("#frame", Static).update(Text("\n").join(lines(self._frame, self.size.width - 1)))
        log = self.query_one("#log", Static)
        if log.display:
            log.update(self._log_tail())
        self.query_one("#keys", Static).update(f"{_KEYS}  {self._note}".rstrip())

    def action_log(self) -> None:
        """Show or hide the end of the worker's log."""
        log = self.query_one("#log", Static)
        log.display = not log.display
        self._show()

    def _log_tail(self) -> str:
        folder = self._stream.subject.folder if self._stream.subject else None
        if folder is None:
            return "no log: this is no case of fitmatrix"
        try:
            with Path(folder / LOG).open("rb") as file:
                file.seek(0, 2)
                file.seek(max(file.tell() - _LOG_BYTES, 0))
                tail = file.read().decode("utf-8", "replace")
        except OSError:
            return "the log is gone: the case has ended"
        return visible("\n".join(tail.splitlines()[-_LOG_LINES:])) or "the worker has printed nothing"

    def action_save(self) -> None:
        """Write the timeline so far beside the results, and say where."""
        if self._frame is None:
            return
        try:
            path = self._recording.save(self._stream.results, self._frame.clock)
            self._note = f"{len(self._recording):,} frames in {path}"
        except OSError as error:
            self._note = f"not saved: {error.strerror or error}"
        self._show()
