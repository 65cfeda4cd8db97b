"""`fitmatrix plan MODEL... --training STAGE`: what training would take, by DeepSpeed's own arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness import commands, training
from harness.case import Verdict
from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.blueprint import Blueprint
    from harness.case import Machine
    from harness.training import Room, States, Trained

FITS, NOTHING_FITS = 0, 1
SCHEMA = 1


def show(models: Sequence[Blueprint], machine: Machine, stage: str, nodes: int, *, as_json: bool) -> int:
    """Print every way of the stage for each model. Returns 0 if one fits for each, 1 if none does for one.

    Raises:
        UsageError: the machine has no GPU.
    """
    room = training.room(machine)
    if not room.gpus:
        raise UsageError('--training needs GPUs, and there is none here: name each, such as --gpu "RTX 3090" --gpu "RTX 3090"')
    trained = [training.of_skeleton(drawn.skeleton, gpus=room.gpus, nodes=nodes) for drawn in models]
    ways = [training.estimate(stage, one) for one in trained]
    if as_json:
        objects = [_json(*found, machine, room, stage) for found in zip(models, trained, ways, strict=True)]
        commands.print_json(objects[0] if len(objects) == 1 else {"schema": SCHEMA, "models": objects})
    else:
        from harness.report import training as report

        report.show([drawn.name for drawn in models], trained, ways, room, stage)
    return FITS if all(any(room.verdict(way) is Verdict.FITS for way in found) for found in ways) else NOTHING_FITS


def _json(drawn: Blueprint, trained: Trained, ways: Sequence[States], machine: Machine, room: Room, stage: str) -> dict[str, Any]:
    keys = ("optimizer", "parameters", "init", "gpu_bytes", "cpu_bytes")
    return {
        "schema": SCHEMA,
        "model": {
            "name": drawn.name,
            "source": drawn.source,
            "parameters": trained.parameters,
            "largest_layer_parameters": trained.largest_layer,
        },
        "machine": commands.machine_json(machine),
        "training": {
            "stage": stage,
            "gpus": trained.gpus,
            "nodes": trained.nodes,
            "follows": training.FOLLOWS,
            "document": training.DOCUMENT[stage],
            "not_counted": training.NOT_COUNTED,
        },
        "ways": [{key: getattr(way, key) for key in keys} | {"verdict": room.verdict(way).value} for way in ways],
    }
