"""Processors by name: what they read RAM with, and how fast one of their cores runs the Python that starts operations.

`data/processors.json` has the figures of the makers' data sheets. What one core does in a second is its highest clock times the
work that its design does a clock, against Zen 2: the makers tell that of each design over the one before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

import msgspec

from harness.core.errors import UsageError, did_you_mean
from harness.core.records import Record
from harness.data import DATA

# What a maker, a driver or a shop writes beside the words that tell a processor from others.
_NOISE = frozenset(
    ["amd", "intel", "cpu", "processor", "core", "ryzen", "xeon", "epyc", "threadripper", "gen", "with", "radeon", "graphics"],
)
_COUNTED = re.compile(r"\b\w+-core\b|@.*$|\b\d+th gen\b")
# "i5-12400F" is an i5-12400 without graphics.
_NO_GRAPHICS = re.compile(r"(?<=\d{4})(k?)f\b")


class Core(Record, frozen=True, kw_only=True):
    """A design: the work that it does a clock, where Zen 2 does 1, and whether it multiplies bfloat16 in AVX-512."""

    name: str
    per_clock: float
    avx512_bf16: bool
    origin: str


class Processor(Record, frozen=True, kw_only=True):
    """What a data sheet says of a processor; `memory` has the most MT/s of each kind that it takes, the usual kind first."""

    name: str
    core: str  #: its design, a row of the cores
    cores: int
    boost_ghz: float  #: the highest clock of one core
    channels: int  #: of 64 bits
    memory: Mapping[str, int]

    @property
    def design(self) -> Core:
        return _parts().cores[self.core]

    @property
    def clocks_per_s(self) -> float:
        """What one core does in a second, in clocks of Zen 2."""
        return self.boost_ghz * 1e9 * self.design.per_clock


class _Host(Record, frozen=True, kw_only=True):
    """In which system the maker of a card sells it: nobody names the processor beside a card of a data center."""

    card: str
    processor: str
    origin: str


class _File(Record, frozen=True, kw_only=True):
    cores: tuple[Core, ...]
    processors: tuple[Processor, ...]
    hosts: tuple[_Host, ...]


class _Parts(Record, frozen=True, kw_only=True):
    cores: dict[str, Core]
    processors: dict[str, Processor]
    hosts: dict[str, _Host]


@cache
def _parts() -> _Parts:
    file = msgspec.json.decode((DATA / "processors.json").read_bytes(), type=_File)
    return _Parts(
        cores={row.name: row for row in file.cores},
        processors={row.name: row for row in file.processors},
        hosts={row.card.casefold(): row for row in file.hosts},
    )


def processor_table() -> tuple[Processor, ...]:
    """Return the processors of the table."""
    return tuple(_parts().processors.values())


def find_processor(text: str) -> Processor:
    """Return the processor that a person means: "Ryzen 5 5600", "i5-12400F", "epyc 7742", "8480C".

    Every word must be in its name, and the one with the fewest other words wins.

    Raises:
        UsageError: there is none, or several that the name could mean.
    """
    wanted = _words(text)
    beside = {row.name: len(_words(row.name) - wanted) for row in processor_table() if wanted and wanted <= _words(row.name)}
    fewest = [name for name, count in beside.items() if count == min(beside.values())]
    if len(fewest) == 1:
        return _parts().processors[fewest[0]]
    if fewest:
        more = f" or {len(fewest) - 8} others" if len(fewest) > 8 else ""
        raise UsageError(f"{text!r} could be {', '.join(fewest[:8])}{more}: write one of these names")
    names = [row.name for row in processor_table()]
    close = did_you_mean(text, names)
    other = "write a name such as 'Ryzen 5 5600', or name its memory alone, as in --ram '32GiB DDR4-3200 x2'"
    raise UsageError(f"no processor is called {text!r}: {close if close.startswith('did you mean') else other}")


@cache
def known_processor(model: str | None) -> Processor | None:
    """Return what is known of the processor that the kernel calls `model`, such as "AMD Ryzen 5 5600 6-Core Processor"."""
    if not model:  # of most machines that are described: the table is not read for them
        return None
    words = _words(model)
    hits = [row for row in processor_table() if _words(row.name) <= words]
    return max(hits, key=lambda row: len(_words(row.name)), default=None)


@cache
def usual_host(card: str | None) -> Processor | None:
    """Return the processor beside a card of a data center in the system that its maker sells it in; None of any other card."""
    hosts = (_parts().hosts.get(word) for word in re.findall(r"[a-z0-9]+", (card or "").casefold()))
    host = next(filter(None, hosts), None)
    return _parts().processors[host.processor] if host else None


@cache
def _words(name: str) -> frozenset[str]:
    """Split a name into the words that tell it from others: "AMD Ryzen 5 5600 6-Core Processor" -> {5, 5600}."""
    text = re.sub(r"\((?:r|tm)\)", " ", name.casefold())
    text = _NO_GRAPHICS.sub(r"\1", _COUNTED.sub(" ", text))
    return frozenset(re.findall(r"[a-z0-9+]+", text)) - _NOISE
