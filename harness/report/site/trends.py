"""How the figures of a case changed over library versions, on one machine.

By Altair the small lines of speed would be no shorter to write, and take 9 ms and 1.7 KB each instead of 0.05 ms and 0.25 KB
(tests/bench/bench_charts.py); the pages of 10,000 results have hundreds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from harness.core.records import Result
from harness.report.page.axes import short
from harness.report.site.rows import Row, grouped, slim
from harness.results.register import VERSIONS


@dataclass(frozen=True)
class Version:
    """One environment of a trend: what changed on the way there, and the newest result in it."""

    changed: tuple[str, ...]
    row: Row


@dataclass(frozen=True)
class Trend:
    """One case on one machine over library versions, oldest first. `change` is that of its speed, from first to last."""

    row: Row
    versions: tuple[Version, ...]
    change: float | None
    between: int = 0  #: versions behind the first that are left out

    @property
    def broke(self) -> bool:
        """Whether the case worked, and in the newest environment does not."""
        return not self.row.works and any(version.row.works for version in self.versions)

    @property
    def first(self) -> Row | None:
        """The oldest that has a speed."""
        return next((version.row for version in self.versions if version.row.speed.value), None)


def brief(trend: Trend, most: int) -> Trend:
    """Return a trend with its first version and the newest, `most` in all, of which only what pages of many results say is kept."""
    kept = trend.versions if len(trend.versions) <= most else (trend.versions[0], *trend.versions[1 - most :])
    versions = tuple(replace(version, row=slim(version.row)) for version in kept)
    return replace(trend, row=slim(trend.row), versions=versions, between=len(trend.versions) - len(kept))


def sorted_by_change(trends: Iterable[Trend]) -> list[Trend]:
    """Put first what works no more, then the largest changes of speed."""
    return sorted(trends, key=lambda trend: (not trend.broke, -abs(trend.change or 0)))


def trends_of(rows: Iterable[Row]) -> tuple[Trend, ...]:
    """Find the cases that ran in several environments, in the order of `sorted_by_change`."""
    by_case = grouped(
        (row for row in rows if row.status.measured or row.status.look in ("oom", "timeout", "crash")),
        lambda row: (row.machine, row.result.case, row.result.weights),
    )
    return tuple(sorted_by_change(trend for group in by_case.values() if (trend := _trend(group))))


def _trend(rows: Sequence[Row]) -> Trend | None:
    """Follow one case over environments that differ in a package that matters; the newest result in each counts."""
    by_versions = {_versions(row.result): row for row in rows}
    if len(by_versions) < 2:
        return None
    ordered = sorted(by_versions.items(), key=lambda item: item[1].result.at)
    versions, before = [], dict[str, str]()
    for environment, row in ordered:
        after = dict(environment)
        changed = [f"{name} {after.get(name, 'gone')}" for name in {**before, **after} if before.get(name) != after.get(name)]
        versions.append(Version(tuple(changed), row))
        before = after
    speeds = [float(version.row.speed.value) for version in versions if version.row.speed.value]
    compared = len(speeds) > 1 and speeds[0] and versions[-1].row.speed.value
    change = speeds[-1] / speeds[0] - 1 if compared else None
    return Trend(versions[-1].row, tuple(versions), change)


def _versions(result: Result) -> tuple[tuple[str, str], ...]:
    return tuple((name, result.environment[name]) for name in VERSIONS if name in result.environment)


def spark(trend: Trend) -> Markup | None:
    """Draw the speed of a case over its versions as a line; the table beside it says the same. None for fewer than two speeds."""
    speeds = [(at, float(one.row.speed.value)) for at, one in enumerate(trend.versions) if one.row.speed.value]
    if len(speeds) < 2:
        return None
    top, last = max(speed for _, speed in speeds) * 1.1 or 1, len(trend.versions) - 1
    points = [(short(4 + 112 * at / last), short(30 - 28 * speed / top)) for at, speed in speeds]
    line = Markup('<path d="M{}"/>').format("L".join(f"{x} {y}" for x, y in points))
    dots = Markup("").join(Markup('<circle cx="{}" cy="{}" r="2.5"/>').format(x, y) for x, y in points)
    return (
        Markup('<svg class="spark" viewBox="0 0 120 32" aria-hidden="true"><path class="floor" d="M4 30H116"/>')
        + line
        + dots
        + Markup("</svg>")
    )
