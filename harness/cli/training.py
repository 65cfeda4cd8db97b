"""`fitmatrix plan MODEL... --training STAGE`: memory of training, by DeepSpeed's own formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from harness.architecture.model_spec import ModelSpec
from harness.cli.plan_args import FITS, NOTHING_FITS
from harness.core.errors import UsageError
from harness.core.records import Machine, Verdict
from harness.core.units import format_count, format_gib
from harness.planning import zero
from harness.planning.zero import Room, States, Trained
from harness.report.terminal import output, tables
from harness.report.terminal.output import PLAN_SCHEMA
from harness.report.terminal.plan_table import COLOURS

TITLES = {"zero2": "ZeRO-2", "zero3": "ZeRO-3"}
_WORDS = {Verdict.UNKNOWN: "unknown: pass --ram SIZE"}


def show_training(models: Sequence[ModelSpec], machine: Machine, stage: str, nodes: int, *, as_json: bool) -> int:
    """Print every configuration of the stage for each model. Returns 0 if something fits for each model, 1 if nothing does for one.

    Raises:
        UsageError: the machine has no GPU.
    """
    room = zero.room(machine)
    if not room.gpus:
        raise UsageError('--training needs GPUs, and this machine has none: describe them, e.g. --gpu "RTX 3090" --gpu "RTX 3090"')
    trained = [zero.of_skeleton(spec.skeleton, gpus=room.gpus, nodes=nodes) for spec in models]
    ways = [zero.estimate_states(stage, one) for one in trained]
    if as_json:
        objects = [_json(*found, machine, room, stage) for found in zip(models, trained, ways, strict=True)]
        output.print_json(objects[0] if len(objects) == 1 else {"schema": PLAN_SCHEMA, "models": objects})
    else:
        _print([spec.name for spec in models], trained, ways, room, stage)
    return FITS if all(any(room.verdict(way) is Verdict.FITS for way in found) for found in ways) else NOTHING_FITS


def _json(spec: ModelSpec, trained: Trained, ways: Sequence[States], machine: Machine, room: Room, stage: str) -> dict[str, Any]:
    keys = ("optimizer", "parameters", "init", "gpu_bytes", "cpu_bytes")
    return {
        "schema": PLAN_SCHEMA,
        "model": {
            "name": spec.name,
            "source": spec.source,
            "parameters": trained.parameters,
            "largest_layer_parameters": trained.largest_layer,
        },
        "machine": output.machine_json(machine),
        "training": {
            "stage": stage,
            "gpus": trained.gpus,
            "nodes": trained.nodes,
            "follows": zero.FOLLOWS,
            "document": zero.DOCUMENT[stage],
            "not_counted": zero.NOT_COUNTED,
        },
        "ways": [{key: getattr(way, key) for key in keys} | {"verdict": room.verdict(way).value} for way in ways],
    }


def _print(names: Sequence[str], models: Sequence[Trained], held: Sequence[Sequence[States]], room: Room, stage: str) -> None:
    """Print for each model a table of the configurations, and once what the figures follow and leave out."""
    parts: list[RenderableType] = []
    for name, trained, ways in zip(names, models, held, strict=True):
        parts += [tables.title(_headline(name, trained, stage)), _table(ways, room)]
        if not any(room.verdict(way) in (Verdict.FITS, Verdict.UNKNOWN) for way in ways):
            parts.append(Text("Nothing fits: add GPUs or RAM, use more machines with --nodes, or train fewer parameters."))
    tables.show(*parts, Text(f"GiB per GPU, and of RAM per node. {_basis(stage)}"))


def _headline(name: str, trained: Trained, stage: str) -> str:
    nodes = f" in each of {trained.nodes} nodes" if trained.nodes > 1 else ""
    gpus = f"{trained.gpus} GPU{'s' if trained.gpus > 1 else ''}{nodes}"
    return f"{name}: training {format_count(trained.parameters)} parameters with {TITLES[stage]} on {gpus}"


def _basis(stage: str) -> str:
    return f"Follows {zero.FOLLOWS}. {zero.DOCUMENT[stage]} Not counted: {zero.NOT_COUNTED}."


def _table(ways: Sequence[States], room: Room) -> Table:
    heads = (f"GPU\nof {_gib(room.gpu_bytes)}", f"RAM\nof {_gib(room.cpu_bytes)}")
    table = tables.table("optimizer\non", "parameters\non", "zero.Init", "verdict", *heads, left=4)
    for way in ways:
        verdict = room.verdict(way)
        word = Text(_WORDS.get(verdict, verdict.value.replace("_", " ")), style=COLOURS.get(verdict, ""))
        made = "yes" if way.init else "no"
        table.add_row(
            _device_word(way.optimizer),
            _device_word(way.parameters),
            made,
            word,
            format_gib(way.gpu_bytes),
            format_gib(way.cpu_bytes),
        )
    return table


def _device_word(kind: str) -> str:
    return "RAM" if kind == "cpu" else kind.upper()


def _gib(size: int | None) -> str:
    return "unknown" if size is None else format_gib(size)
