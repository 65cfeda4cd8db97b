"""Frames as lines: what they look like at three widths, and that they stay within any.

`python -m tests.live.test_render` rewrites what is kept in tests/data/watched.
"""

from __future__ import annotations

import io
import re

import pytest
from msgspec.structs import replace
from rich.console import Console
from rich.text import Text

from harness.core.metrics import PHASES
from harness.core.units import GIB, MIB
from harness.live.frame import LiveFrame, TierFrame
from harness.live.moment import frame
from harness.live.render import FILLS, LEAST_COLUMNS, in_ascii, lines, one_line, tier_bar
from tests.live import moments
from tests.support.runs import ROOT

WIDTHS = (40, 60, 80, 120)


def busy() -> LiveFrame:
    """Two cards, one of them ours and limited, RAM that holds a part, and weights that come from the disk."""
    cards = {
        "gpu:0": moments.card(link_bytes_per_s=3.1e9),
        "gpu:1": moments.card(process_bytes=None, used_bytes=GIB),
    }
    readings = [
        moments.reading(
            float(second),
            gpus=cards,
            gone=("gpu:2",),
            read_bytes=second * GIB,
            beat=moments.beat(512 + 4 * second, second - 0.1, vram={"gpu:0": (7 * GIB, 7 * GIB + 256 * MIB)}),
        )
        for second in range(3)
    ]
    return frame(readings, moments.announced(limits_bytes={"gpu:0": 10 * GIB}))


def drawn(found: LiveFrame, width: int) -> str:
    return "".join(f"{one.plain}\n" for one in lines(found, width))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_frame_looks_as_it_is_kept(width: int) -> None:
    kept = (moments.WATCHED / f"{width}.txt").read_text(encoding="utf-8")
    assert drawn(busy(), width) == kept, "python -m tests.live.test_render"


def test_the_documentation_shows_what_is_drawn() -> None:
    assert f"```\n{drawn(busy(), 80)}```\n" in (ROOT / "docs/watch.md").read_text(encoding="utf-8")


def test_what_a_case_does_is_said_in_words_that_the_documentation_explains() -> None:
    """Every phase that a worker tells has its words; a name of a later version stands for itself."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "harness").rglob("*.py"))
    told = set(re.findall(r"\bphase\(\"(\w+)\"\)|\.begin\(\"(\w+)\"\)|_generate\(\"(\w+)\"", source))
    names = {name for groups in told for name in groups if name} | {"start"}
    assert names == PHASES.keys()
    explained = (ROOT / "docs/watch.md").read_text(encoding="utf-8").partition("## How to read it")[2]
    for name, words in PHASES.items():
        assert f"*{words}" in " ".join(explained.split())
        assert f"  {words}, " in one_line(replace(busy(), phase=name))
    assert "  thinking, " in one_line(replace(busy(), phase="thinking"))


@pytest.mark.parametrize("width", [1, LEAST_COLUMNS, 33, 40, 79, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    readings, said = moments.recorded()
    long = replace(said, case="模型" * 60 + "/bf16/cpu")
    for found in (busy(), frame(readings, long), frame([moments.reading(pid=None, memory=None)])):
        assert max(one.cell_len for one in lines(found, width)) <= max(width, LEAST_COLUMNS)


@pytest.mark.parametrize("width", [20, 60, 80])
def test_a_bar_is_as_wide_as_asked_for_and_true_to_a_cell(width: int) -> None:
    tier = TierFrame(name="cpu", total_bytes=1000, parts={"weights": 333, "kv": 1, "others": 333, "free": 333})
    bar = tier_bar(tier, width).plain
    assert len(bar) == width
    assert bar.count("█") == round(0.333 * width)
    assert abs(bar.count("x") - 0.333 * width) <= 1


def test_parts_can_be_told_apart_without_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    fills = [fill for fill, _, _ in FILLS.values()]
    assert len(set(fills)) == len(fills)
    parts = [Text(fill) for fill in fills]
    in_ascii(parts)
    assert len({one.plain for one in parts}) == len(fills)
    assert re.search(r"\x1b\[3\d", printed())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[\d*;?[349]\d", printed())


def printed() -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, highlight=False, color_system="standard")
    for one in lines(busy(), 80):
        console.print(one)
    return stream.getvalue()


def test_a_terminal_of_ascii_gets_letters_in_the_same_places() -> None:
    before, after = lines(busy(), 80), lines(busy(), 80)
    in_ascii(after)
    assert [len(one.plain) for one in after] == [len(one.plain) for one in before]
    assert [one.spans for one in after] == [one.spans for one in before]
    assert all(one.plain.isascii() for one in after)
    assert any(one.plain.startswith("WWWW") for one in after)


def test_what_is_urgent_stands_out() -> None:
    red = [one for one in lines(busy(), 80) if one.style == "bold red"]
    assert [one.plain for one in red] == ["gpu:2  gone", "gpu:2 is gone: NVML does not answer for it any more."]


def test_a_pipe_gets_one_line() -> None:
    assert one_line(busy()) == (
        "2026-11-29T12:00:00+00:00  chatglm-6b/int8/gpu+cpu  warm round, 2.00 s  520 tokens  4.00 tokens/s  disk 1.07 GB/s"
        "  gpu:0 8.00 GiB  RAM 5.00 GiB  gpu:2 gone  gpu:2 is gone: NVML does not answer for it any more."
    )


def test_a_program_that_names_itself_with_escapes_moves_no_cursor() -> None:
    found = frame([moments.reading(program="\x1b[2Jevil\n")])
    assert "\x1b" not in drawn(found, 80) + one_line(found)
    assert "\n" not in one_line(found)


if __name__ == "__main__":
    for number in WIDTHS:
        (moments.WATCHED / f"{number}.txt").write_text(drawn(busy(), number), encoding="utf-8")
