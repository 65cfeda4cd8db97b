"""What a user sees while something is fetched."""

import io

import pytest

from harness.core.progress import show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_line_a_step() -> None:
    log = io.StringIO()
    with show_progress(log) as report:
        for done in range(0, 4096, 1024):
            report("fetching", done, 4096)
        report("converting")
    assert log.getvalue() == "fetching (4.00 KiB)\nconverting\n"


def test_a_terminal_gets_a_bar_that_ends_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with show_progress(terminal) as report:
        report("fetching", 1024, 4096)
        report("converting [bold]")
    text = terminal.getvalue()
    assert "1.00 KiB of 4.00 KiB" in text
    assert "converting [bold]" in text
    assert "\x1b[" in text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_nothing_to_do_shows_nothing(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = stream()
    with show_progress(shown):
        pass
    assert shown.getvalue() == ""
