"""What stands behind a cell: the figures beside their prediction, the phases, where the modules lie, the answers, the code."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, groupby

import msgspec
from markupsafe import Markup

from harness.core import units
from harness.core.metrics import phase_title
from harness.core.records import Phase, Result
from harness.measure import interference
from harness.report.html import as_html
from harness.report.page import charts
from harness.report.page.figures import Compared, Figure, compared, known


class Map(msgspec.Struct, frozen=True, gc=False):
    """Where the modules are, as loaded or as planned."""

    loaded: bool
    strip: Markup
    groups: tuple[charts.Group, ...]


class Details(msgspec.Struct, frozen=True, gc=False):
    """The details of one case. `figures` and `phases` are rows of tables, which are most of a page and so are written at once."""

    figures: str
    measured: bool
    predicted: bool
    chart: Markup | None
    lines: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    phases: str
    map: Map | None
    held: tuple[tuple[str, tuple[Figure, ...]], ...]
    disturbances: tuple[tuple[str, str], ...]
    versions: str


def details(result: Result, *, points: int) -> Details:
    """Arrange what is known of one case; the chart takes at most `points` points a line."""
    peaks, rows = _peaks(result.phases), compared(result)
    measured, predicted = any(row.figure.value for row in rows), any(row.best for row in rows)
    return Details(
        figures="".join([_figure_row(row, measured, predicted, why) for row, why in _with_doubts(rows)]),
        measured=measured,
        predicted=predicted,
        chart=charts.timeline(result.timeline, result.phases, points=points),
        lines=_lines(result),
        columns=tuple(peaks),
        phases="".join(_phase_rows(result.phases, tuple(peaks.values()))),
        map=_map(result),
        held=_loaded_tables(result),
        disturbances=_disturbances(result),
        versions=", ".join([f"{name} {value}" for name, value in result.environment.items()]),
    )


def _peaks(phases: Sequence[Phase]) -> dict[str, list[int | None]]:
    """Return the columns of the phases' peaks by their label, those alone in which a phase has a figure."""
    gpus = sorted({tier for phase in phases for tier in phase.vram_peak_bytes})
    found = {
        "peak RAM, resident": [phase.ram_peak_bytes for phase in phases],
        "anonymous RAM": [phase.ram_anon_bytes for phase in phases],
        **{f"peak {gpu}": [phase.vram_peak_bytes.get(gpu) for phase in phases] for gpu in gpus},
        **{f"reserved {gpu}": [phase.vram_reserved_bytes.get(gpu) for phase in phases] for gpu in gpus},
    }
    return {label: sizes for label, sizes in found.items() if any(size is not None for size in sizes)}


def _with_doubts(rows: Iterable[Compared]) -> Iterator[tuple[Compared, str]]:
    """Put beside each figure why it is missing or noisy, once where the same holds for several."""
    seen = {""}
    for row in rows:
        why = row.figure.why or row.figure.noisy
        yield row, "" if why in seen else why
        seen.add(why)


def _figure_row(row: Compared, measured: bool, predicted: bool, why: str) -> str:
    """Write one figure: what was measured, its spread and why it is missing or noisy; what was predicted and its interval."""
    cells = ""
    if measured:
        shown = row.figure.__html__() if row.figure.value else ""
        cells += f"<td>{shown}{_notes(row.spread, why)}</td>"
    if predicted:
        cells += f"<td>{row.best.__html__()}{_notes(row.interval)}</td>" if row.best else "<td></td>"
    return f'<tr><th scope="row">{as_html(row.figure.label)}</th>{cells}</tr>\n'


def _notes(*texts: str) -> str:
    return "".join([f"<small>{as_html(text)}</small>" for text in texts if text])


def _phase_rows(phases: Sequence[Phase], columns: Sequence[Sequence[int | None]]) -> Iterator[str]:
    """Write the phases, those of one name that follow each other in one row: name, how long each took, the highest peaks."""
    for name, numbers in groupby(range(len(phases)), key=lambda i: _phase_name(phases[i])):
        same = list(numbers)
        took = sorted(phases[i].end_s - phases[i].start_s for i in same)
        times = list(dict.fromkeys(map(units.format_seconds, (took[0], took[-1]))))
        peaks = [max([size for i in same if (size := column[i]) is not None], default=None) for column in columns]
        cells = "".join(["<td></td>" if size is None else f"<td>{units.format_size(size)}</td>" for size in peaks])
        label = f"{name} ×{len(same)}" if len(same) > 1 else name
        yield f'<tr><th scope="row">{as_html(label)}</th><td>{" to ".join(times)}</td>{cells}</tr>\n'


def _phase_name(phase: Phase) -> str:
    return f"{phase_title(phase.name)} (sampled)" if phase.sampled else phase_title(phase.name)


def _lines(result: Result) -> tuple[tuple[str, str], ...]:
    """Name the lines of the chart with the classes of their colors, for the legend."""
    found = [(line.look, line.name) for line in charts.series(result.timeline)] if result.timeline else []
    peaks = [("peak", "exact peak of a phase")] if any(phase.ram_peak_bytes for phase in result.phases) else []
    return tuple(found + peaks)


def _map(result: Result) -> Map | None:
    loaded = result.loaded.device_map if result.loaded else None
    device_map = loaded or result.device_map
    if not device_map:
        return None
    return _map_of(bool(loaded), tuple(device_map.items()))


@functools.lru_cache(64)  # cases of one model have the same map again and again
def _map_of(loaded: bool, places: tuple[tuple[str, str], ...]) -> Map:
    found = charts.groups(dict(places))
    return Map(loaded=loaded, strip=charts.strip(found), groups=tuple(found))


def _loaded_tables(result: Result) -> tuple[tuple[str, tuple[Figure, ...]], ...]:
    """List what was loaded: bytes by tier, by rank of several processes, by dtype, and by dtype of the Linear weights."""
    if not result.loaded:
        return ()
    tables = {
        "Weights by tier": result.loaded.tier_bytes,
        "Weights by rank": {f"rank {number}": size for number, size in enumerate(result.loaded.rank_bytes)},
        "Weights by dtype": result.loaded.dtype_bytes,
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
        name = f"{phase_title(window.phase)} {next(rounds)}" if window.phase == "warm" else phase_title(window.phase)
        if window.why:
            found.append((name, window.why))
    if capped := interference.power_capped(result.interference):
        found.append(("no disturbance", capped))
    return tuple(found)
