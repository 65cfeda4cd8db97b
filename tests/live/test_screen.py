"""The live screen by Textual's pilot: keys, widths, what ends it."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text
from textual.pilot import Pilot
from textual.widgets import Static

from harness.live import command
from harness.live.frame import LiveFrame
from harness.live.moment import frame
from harness.live.screen import Lines, Screen
from harness.live.subject import Subject
from tests.live import moments

Steps = Callable[[Screen, "Pilot[str]"], Any]


class Script:
    """A stream of the frames of the recorded run, which ends with them if it is to."""

    def __init__(self, folder: Path | None = None, *, ends: bool = False) -> None:
        readings, said = moments.recorded()
        self._frames = [frame(readings[:count], said) for count in range(1, len(readings) + 1)]
        self._ends, self._at, self.count = ends, 0, len(self._frames)
        self.subject = Subject(pid=4242, pids=(4242,), folder=folder)
        self.results = folder

    def next_frame(self) -> LiveFrame:
        self._at += 1
        if self._ends and self._at > len(self._frames):
            raise ProcessLookupError(4242)
        return self._frames[min(self._at, len(self._frames)) - 1]


def played(stream: Script, steps: Steps, size: tuple[int, int] = (80, 24)) -> Screen:
    """Run the screen, take the steps once it shows the first frame, and return it; `look` goes on to the next."""
    app = Screen(stream, every_s=3600)  # type: ignore[arg-type]  # what a screen needs of a stream

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await until(lambda: bool(app.query_one(Lines).strips), pilot)
            await steps(app, pilot)

    asyncio.run(run())
    return app


def frame_of(app: Screen) -> str:
    """The lines that the terminal shows of a frame."""
    widget = app.query_one(Lines)
    return "\n".join(widget.render_line(row).text for row in range(widget.size.height))


def shown(app: Screen, name: str) -> str:
    return str(app.query_one(f"#{name}", Static).render())


async def until(holds: Callable[[], bool], pilot: Pilot[str]) -> None:
    """Wait until something holds; fail if it never does."""
    for _ in range(500):
        if holds():
            return
        await pilot.pause(0.02)
    raise AssertionError("it did not come to hold")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_it_shows_frames_that_fit_the_terminal(width: int) -> None:
    async def steps(app: Screen, _: Pilot[str]) -> None:
        await app.look()
        assert "more tokens, then RAM ends" in re.sub(r"\s+", " ", frame_of(app))
        assert frame_of(app).startswith("kv-heavy/fp32/cpu@ram560MiB  ")
        assert {len(line) for line in frame_of(app).splitlines()} == {width}
        assert "q quit" in shown(app, "keys")

    played(Script(), steps, (width, 24))


def test_q_ends_it_without_a_word() -> None:
    async def steps(_: Screen, pilot: Pilot[str]) -> None:
        await pilot.press("q")

    app = played(Script(), steps)
    assert (app.return_value, app.return_code) == (None, 0)


def test_it_ends_with_the_process_and_says_so() -> None:
    async def steps(app: Screen, pilot: Pilot[str]) -> None:
        for _ in range(stream.count + 1):
            await app.look()
        await pilot.pause()

    stream = Script(ends=True)
    assert played(stream, steps).return_value == "process 4242 has ended"


def test_l_shows_the_end_of_the_log_and_hides_it_again(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(f"line {number}" for number in range(5000)) + "\n\x1b[2Jlast", encoding="utf-8")

    async def steps(app: Screen, pilot: Pilot[str]) -> None:
        log = app.query_one("#log", Static)
        assert not log.display
        await pilot.press("l")
        assert log.display
        assert shown(app, "log").splitlines()[-1].endswith("last")
        assert "\x1b" not in shown(app, "log")
        assert len(shown(app, "log").splitlines()) == 12
        (tmp_path / "log").unlink()
        await app.look()
        assert shown(app, "log") == "the log is gone: the case has ended"
        await pilot.press("l")
        assert not log.display

    played(Script(tmp_path), steps)


def test_s_saves_the_timeline_beside_the_results(tmp_path: Path) -> None:
    async def steps(app: Screen, pilot: Pilot[str]) -> None:
        await app.look()
        await pilot.press("s")
        assert f"2 frames in {tmp_path}" in shown(app, "keys")

    played(Script(tmp_path), steps, (200, 24))
    (saved,) = tmp_path.glob("watch-*.jsonl")
    frames = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert len(frames) == 2
    assert {one["case"] for one in frames} == {"kv-heavy/fp32/cpu@ram560MiB"}


def test_a_folder_that_takes_no_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("harness.live.stream.atomic.write_bytes", refused)

    async def steps(app: Screen, pilot: Pilot[str]) -> None:
        await pilot.press("s")
        assert "not saved: Read-only file system" in shown(app, "keys")

    played(Script(tmp_path), steps)


def test_a_terminal_that_is_too_low_scrolls_to_the_rest() -> None:
    async def steps(app: Screen, pilot: Pilot[str]) -> None:
        for _ in range(32):
            await app.look()
        assert "then RAM ends" not in frame_of(app)
        app.query_one(Lines).focus()
        await until(lambda: app.query_one(Lines).max_scroll_y == len(app.query_one(Lines).strips) - 7, pilot)
        await pilot.press("end")
        await until(lambda: "then RAM ends" in frame_of(app), pilot)

    played(Script(), steps, (80, 8))


def test_a_frame_with_fewer_lines_leaves_none_behind() -> None:
    async def steps(app: Screen, _: Pilot[str]) -> None:
        lines = app.query_one(Lines)
        lines.show([Text("one"), Text("two")])
        lines.show([Text("one")])
        assert frame_of(app).split() == ["one"]

    played(Script(), steps)


def test_it_shows_frames_where_no_colors_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Textual takes the colors out of every piece of a line, and ends where one has no style at all."""
    monkeypatch.setenv("NO_COLOR", "1")
    seen: list[str] = []

    async def steps(app: Screen, pilot: Pilot[str]) -> None:
        await pilot.pause()
        seen.append(frame_of(app))
        await pilot.press("q")

    app = played(Script(), steps)
    assert "weights" in seen[0]
    assert app.return_code == 0


def test_a_mistake_of_ours_is_no_success(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    class Wrong(Script):
        def next_frame(self) -> LiveFrame:
            raise ZeroDivisionError

    monkeypatch.setattr(Screen, "run", functools.partialmethod(Screen.run, headless=True))
    assert command._screen(Wrong()) == 1  # type: ignore[arg-type]  # what a screen needs of a stream
    assert "ZeroDivisionError" in capfd.readouterr().err
