"""The live screen, by Textual: the lines of a frame, as often as costs little, with the worker's log below when it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Static

from harness.core.text import visible
from harness.live.frame import LiveFrame
from harness.live.render import lines
from harness.live.stream import Recording, Stream
from harness.measure.beacon import LOG

INTERRUPTED = 130
EVERY_S = 2.5  # as often as half a percent of a core allows: a frame takes Textual some milliseconds
_KEYS = "q quit  l log  s save"
_LOG_BYTES, _LOG_LINES = 8192, 12


class Lines(ScrollView):
    """Lines that are drawn as they are; only those that have changed are drawn anew, which is most of what the screen costs."""

    def __init__(self) -> None:
        super().__init__()
        self.strips: list[Strip] = []

    def show(self, drawn: Sequence[Text]) -> None:
        """Show these lines from now on."""
        before, self.strips = self.strips, [Strip(one.render(self.app.console)) for one in drawn]
        size = Size(max((strip.cell_length for strip in self.strips), default=0), len(self.strips))
        if size != self.virtual_size:
            self.virtual_size = size
        for row in range(max(len(before), len(self.strips))):
            if before[row : row + 1] != self.strips[row : row + 1]:
                self.refresh_line(row)

    def render_line(self, y: int) -> Strip:
        """Return a line of the widget, blank below the last."""
        row, width = y + self.scroll_offset.y, self.size.width
        strip = self.strips[row].adjust_cell_length(width) if row < len(self.strips) else Strip.blank(width)
        return strip.apply_style(self.rich_style)  # a piece without any style ends Textual where NO_COLOR is set


class Screen(App[str]):
    """Shows frames until `q`, or until the process ends; returns why it ended, in a sentence, if not by a key."""

    CSS = "#log { display: none; border-top: solid grey; }"
    BINDINGS = [("q", "quit", "quit"), ("l", "log", "log"), ("s", "save", "save"), Binding("ctrl+c", "stop", priority=True)]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, stream: Stream, every_s: float = EVERY_S) -> None:
        super().__init__()
        self._stream, self._every_s = stream, every_s
        self._recording = Recording()
        self._frame: LiveFrame | None = None

    def compose(self) -> ComposeResult:
        """Return the widgets: the frame, which scrolls where it is higher than the terminal, the log and the keys."""
        yield Lines()
        yield Static(id="log", markup=False)
        yield Static(_KEYS, id="keys", markup=False)

    def action_stop(self) -> None:
        """End as Ctrl-C ends any command; Textual's own key asks for another one."""
        self.exit(return_code=INTERRUPTED)

    async def on_mount(self) -> None:
        """Begin to read."""
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
        if self._frame is None or not self.query(Lines):  # nothing was read yet, or the screen is being left
            return
        self.query_one(Lines).show(lines(self._frame, self.size.width - 2))  # a scroll bar takes two
        log = self.query_one("#log", Static)
        if log.display:
            log.update(self._log_tail())

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
            note = f"{len(self._recording):,} frames in {path}"
        except OSError as error:
            note = f"not saved: {error.strerror or error}"
        self.query_one("#keys", Static).update(f"{_KEYS}  {note}")
