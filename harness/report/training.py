"""What training takes, in the terminal: a table of the ways to hold a model's states, and what the figures leave out."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from harness import training
from harness.case import Verdict
from harness.report import terminal
from harness.report.plans import COLOURS
from harness.training import Room, States, Trained
from harness.units import format_count, format_gib

TITLES = {"zero2": "ZeRO-2", "zero3": "ZeRO-3"}
_WORDS = {Verdict.UNKNOWN: "unknown: add --ram SIZE"}


def show(names: Sequence[str], models: Sequence[Trained], held: Sequence[Sequence[States]], room: Room, stage: str) -> None:
    """Print for each model a table of the ways to hold it, and once what the figures follow and leave out."""
    parts: list[RenderableType] = []
    for name, trained, ways in zip(names, models, held, strict=True):
        parts += [terminal.title(_headline(name, trained, stage)), _table(ways, room)]
        if not any(room.verdict(way) in (Verdict.FITS, Verdict.UNKNOWN) for way in ways):
            parts.append(Text("Nothing fits: add GPUs or RAM, name more machines with --nodes, or train fewer parameters."))
    terminal.show(*parts, Text(f"GiB of each GPU and of the RAM of each node. {_basis(stage)}"))


def _headline(name: str, trained: Trained, stage: str) -> str:
    nodes = f" in each of {trained.nodes} nodes" if trained.nodes > 1 else ""
    gpus = f"{trained.gpus} GPU{'s' if trained.gpus > 1 else ''}{nodes}"
    return f"{name}: training {format_count(trained.parameters)} parameters by {TITLES[stage]} on {gpus}"


def _basis(stage: str) -> str:
    return f"Follows {training.FOLLOWS}. {training.DOCUMENT[stage]} Not counted: {training.NOT_COUNTED}."


def _table(ways: Sequence[States], room: Room) -> Table:
    heads = (f"GPU\nof {_gib(room.gpu_bytes)}", f"RAM\nof {_gib(room.cpu_bytes)}")
    table = terminal.table("optimizer\non", "parameters\non", "made\nin parts", "verdict", *heads, left=4)
    for way in ways:
        verdict = room.verdict(way)
        word = Text(_WORDS.get(verdict, verdict.value.replace("_", " ")), style=COLOURS.get(verdict, ""))
        made = "yes" if way.init else "no"
        table.add_row(
            _place(way.optimizer), _place(way.parameters), made, word, format_gib(way.gpu_bytes), format_gib(way.cpu_bytes)
        )
    return table


def _place(kind: str) -> str:
    return "RAM" if kind == "cpu" else kind.upper()


def _gib(size: int | None) -> str:
    return "unknown" if size is None else format_gib(size)
