"""A frame as lines of a terminal, as wide as asked for: a bar a tier, whose parts can be told apart without colors as well."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping

from rich.text import Text

from harness.core.metrics import phase_title
from harness.core.text import line, plural
from harness.core.units import format_bandwidth, format_rate, format_seconds, format_size
from harness.live.frame import OWN_PARTS, LiveFrame, TierFrame
from harness.live.words import tier_title

LEAST_COLUMNS = 20
# Part -> what fills its cells, its color, its name.
FILLS: Mapping[str, tuple[str, str, str]] = {
    "weights": ("█", "blue", "weights"),
    "kv": ("▓", "green", "KV"),
    "activations": ("▒", "yellow", "activations"),
    "reserve": ("░", "magenta", "allocator reserve"),
    "context": ("#", "cyan", "context"),
    "overhead": ("=", "cyan", "overhead"),
    "other": ("+", "white", "other"),
    "others": ("x", "red", "other processes"),
    "files": (":", "white", "other files"),
    "cache": ("-", "bright_black", "file cache"),
    "free": ("·", "bright_black", "free"),
}
_GAP = "  "
_ASCII = str.maketrans("█▓▒░·", "WKAR.")  # for a terminal that has no other characters


def in_ascii(drawn: Iterable[Text]) -> None:
    """Put letters in place of what only Unicode has, one for one, so that colors stay where they are."""
    for one in drawn:
        one.plain = one.plain.translate(_ASCII).encode("ascii", "replace").decode()


def lines(frame: LiveFrame, width: int) -> list[Text]:
    """Return the lines of a frame, none of them wider than `width` columns (at least 20)."""
    width = max(width, LEAST_COLUMNS)
    found = [*_wrapped(_head(frame), width, "bold")]
    for tier in frame.tiers:
        found += _tier_lines(tier, width)
    if frame.strip:
        found += _wrapped(_strip(frame), width)
    reds = sum(tier.is_red or tier.is_gone for tier in frame.tiers)
    for number, words in enumerate(frame.words):
        found += [Text(part, "bold red" if number < reds else "") for part in textwrap.wrap(line(words), width)]
    for one in found:
        one.truncate(width)
    return found


def _head(frame: LiveFrame) -> list[tuple[str, str]]:
    """Return what runs, its phase and how fast it writes."""
    who = frame.case or (f"{frame.program or 'process'} {frame.pid}" if frame.pid is not None else "this machine")
    said = [line(who)]
    if frame.phase:
        doing = phase_title(frame.phase)
        said.append(doing if frame.phase_s is None else f"{doing}, {format_seconds(frame.phase_s)}")
    said += [plural(frame.tokens, "token")] if frame.tokens is not None else []
    said += [format_rate(frame.tokens_per_s)] if frame.tokens_per_s is not None else []
    said += [f"disk {format_bandwidth(frame.disk_bytes_per_s)}"] if frame.disk_bytes_per_s else []
    return [(words, "") for words in said]


def _tier_lines(tier: TierFrame, width: int) -> list[Text]:
    if tier.is_gone:
        return [Text(f"{tier_title(tier.name)}  gone", "bold red")]
    used = sum(size for name, size in tier.parts.items() if name not in ("free", "cache"))
    said = [
        (tier_title(tier.name), "bold red" if tier.is_red else "bold"),
        (f"{format_size(used)} of {format_size(tier.total_bytes)}", ""),
    ]
    if tier.process_bytes is not None:
        said.append((f"process {format_size(tier.process_bytes)}", ""))
    if tier.anonymous_bytes is not None and tier.mapped_bytes is not None:
        said.append((f"(anonymous {format_size(tier.anonymous_bytes)}, mapped {format_size(tier.mapped_bytes)})", ""))
    if tier.torch_bytes is not None:
        allocated, reserved = map(format_size, tier.torch_bytes)
        said.append((f"(torch allocated {allocated}, reserved {reserved})", ""))
    if tier.link_bytes_per_s is not None:
        said.append((f"link {format_bandwidth(tier.link_bytes_per_s)}", ""))
    return [*_wrapped(said, width), tier_bar(tier, width), *_ticks(tier, width), *_wrapped(_legend(tier), width)]


def tier_bar(tier: TierFrame, width: int) -> Text:
    """Draw the parts of a tier side by side, `width` cells in all; one that is less than half a cell is in the legend alone."""
    drawn, at, sum_bytes = Text(), 0, 0
    for name, size in tier.parts.items():
        sum_bytes += size
        end = round(width * sum_bytes / max(tier.total_bytes, 1))
        fill, color, _ = FILLS[name]
        drawn.append(fill * (min(end, width) - at), color)
        at = max(at, min(end, width))
    return drawn


def _ticks(tier: TierFrame, width: int) -> list[Text]:
    """Return a line for the predicted peak and one for the limit, where they are: below the end of what they stand for."""
    known = (("^", "peak planned", tier.predicted_bytes), ("|", "limit", tier.limit_bytes))
    return [
        _tick(mark, f"{words} {format_size(size)}", size / max(tier.total_bytes, 1), width) for mark, words, size in known if size
    ]


def _tick(mark: str, words: str, share: float, width: int) -> Text:
    at = min(max(round(width * share) - 1, 0), width - 1)
    if at + 2 + len(words) <= width:
        return Text(f"{' ' * at}{mark} {words}")
    return Text(f"{words} {mark}".rjust(at + 1))


def _legend(tier: TierFrame) -> list[tuple[str, str]]:
    """Name the parts with their sizes; of a process of which only the whole is known it is called so."""
    only_whole = not any(tier.parts.get(name) for name in OWN_PARTS[:-1])
    found = []
    for name, size in tier.parts.items():
        fill, color, words = FILLS[name]
        found.append((f"{fill} {'process' if name == 'other' and only_whole else words} {format_size(size)}", color))
    return found


def _strip(frame: LiveFrame) -> list[tuple[str, str]]:
    """Write where the modules are, in the order of the model."""
    return [
        ("modules", "bold"),
        *((f"{line(tier_title(tier))} x{count}" if count > 1 else line(tier_title(tier)), "") for tier, count in frame.strip),
    ]


def _wrapped(pieces: Iterable[tuple[str, str]], width: int, style: str = "") -> list[Text]:
    """Put pieces side by side, and on the next line what has no room; a piece that is wider than a line is cut."""
    found: list[Text] = []
    for words, color in pieces:
        piece = Text(words, f"{style} {color}".strip())
        if found and found[-1].cell_len + len(_GAP) + piece.cell_len <= width:
            found[-1].append(_GAP).append_text(piece)
        else:
            found.append(piece)
    return found


def one_line(frame: LiveFrame) -> str:
    """Write a frame in one line, for a pipe: what runs, what it holds, and the most urgent sentence."""
    held = [f"{tier_title(tier.name)} {format_size(tier.process_bytes)}" for tier in frame.tiers if tier.process_bytes is not None]
    held += [f"{tier_title(tier.name)} gone" for tier in frame.tiers if tier.is_gone]
    said = [frame.clock, *(words for words, _ in _head(frame)), *held, *frame.words[:1]]
    return line(_GAP.join(said))
