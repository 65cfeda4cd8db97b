"""What stands behind a cell: the figures beside their prediction, the phases, where the modules lie, the answers, the code."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import msgspec
from markupsafe import Markup, escape

from harness import units
from harness.case import Phase, Result
from harness.report import charts
from harness.report.figures import DASH, Compared, Figure, compared, known
from harness.report.text import visible


class Row(msgspec.Struct, frozen=True):
    """One phase, a row of a table: its name, how long it took and its peaks."""

    name: str
    took: str
    peaks: tuple[int | None, ...]

    def __html__(self) -> str:
        cells = "".join([_UNKNOWN if size is None else f"<td>{units.format_size(size)}</td>" for size in self.peaks])
        return f'<tr><th scope="row">{escape(visible(self.name))}</th><td>{self.took}</td>{cells}</tr>\n'


_UNKNOWN = f'<td><span class="none" title="not recorded in this phase">{DASH}</span></td>'


class Map(msgspec.Struct, frozen=True):
    """Where the modules lie, as loaded or as planned."""

    loaded: bool
    strip: Markup
    groups: tuple[charts.Group, ...]


class Details(msgspec.Struct, frozen=True):
    """The details of one case."""

    figures: tuple[Compared, ...]
    predicted: bool
    chart: Markup | None
    lines: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    phases: tuple[Row, ...]
    map: Map | None
    held: tuple[tuple[str, tuple[Figure, ...]], ...]
    disturbances: tuple[tuple[str, str], ...]
    versions: str


def details(result: Result, *, points: int) -> Details:
    """Arrange what is known of one case; the chart takes at most `points` points a line."""
    peaks, rows = _peaks(result.phases), compared(result)
    return Details(
        figures=tuple(rows),
        predicted=any(row.best for row in rows),
        chart=charts.timeline(result.timeline, result.phases, points=points),
        lines=_lines(result),
        columns=tuple(peaks),
        phases=tuple(_row(phase, sizes) for phase, *sizes in zip(result.phases, *peaks.values(), strict=True)),
        map=_map(result),
        held=_held(result),
        disturbances=_disturbances(result),
        versions=", ".join(f"{name} {value}" for name, value in result.environment.items()),
    )


def _peaks(phases: Sequence[Phase]) -> dict[str, list[int | None]]:
    """Return the columns of the phases' peaks by their label, those alone in which a phase has a figure."""
    gpus = sorted({tier for phase in phases for tier in phase.vram_peak_bytes})
    found = {
        "peak RAM": [phase.ram_peak_bytes for phase in phases],
        "anonymous RAM": [phase.ram_anon_bytes for phase in phases],
        **{f"peak {gpu}": [phase.vram_peak_bytes.get(gpu) for phase in phases] for gpu in gpus},
        **{f"reserved {gpu}": [phase.vram_reserved_bytes.get(gpu) for phase in phases] for gpu in gpus},
    }
    return {label: sizes for label, sizes in found.items() if any(size is not None for size in sizes)}


def _row(phase: Phase, peaks: Sequence[int | None]) -> Row:
    name = f"{phase.name} (sampled)" if phase.sampled else phase.name
    return Row(name, units.format_seconds(phase.end_s - phase.start_s), tuple(peaks))


def _lines(result: Result) -> tuple[tuple[str, str], ...]:
    """Name the lines of the chart with the classes of their colours, for the legend."""
    found = [(line.look, line.name) for line in charts.series(result.timeline)] if result.timeline else []
    peaks = [("peak", "exact peak of a phase")] if any(phase.ram_peak_bytes for phase in result.phases) else []
    return tuple(found + peaks)


def _map(result: Result) -> Map | None:
    loaded = result.loaded.device_map if result.loaded else None
    device_map = loaded or result.device_map
    if not device_map:
        return None
    found = charts.groups(device_map)
    return Map(loaded=bool(loaded), strip=charts.strip(found), groups=tuple(found))


def _held(result: Result) -> tuple[tuple[str, tuple[Figure, ...]], ...]:
    """List what was really loaded: bytes by tier, by dtype, and by dtype of the Linear weights."""
    if not result.loaded:
        return ()
    tables = {
        "by tier": result.loaded.tier_bytes,
        "by dtype": result.loaded.dtype_bytes,
        "Linear weights": result.loaded.linear_dtype_bytes,
    }
    shown = [(title, tuple(_held_figure(n, size) for n, size in sizes.items())) for title, sizes in tables.items() if sizes]
    return tuple(shown)


def _held_figure(name: str, size: int) -> Figure:
    return known("", name, size, units.format_size(size))


def _disturbances(result: Result) -> tuple[tuple[str, str], ...]:
    """List which phases and which of the warm rounds others disturbed, and how."""
    found, rounds = [], count(1)
    for window in result.interference:
        name = f"warm round {next(rounds)}" if window.phase == "warm" else window.phase
        if window.why:
            found.append((name, window.why))
    return tuple(found)
