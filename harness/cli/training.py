"""`fitmatrix plan MODEL... --training WAY`: memory of training on one card, traced, or on many, by DeepSpeed's own formulas."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from harness.architecture import model_spec
from harness.architecture.model_spec import ModelSpec
from harness.cli.plan_args import ABOUT_TRAINING, FITS, NOTHING_FITS, OF_ADAPTERS, ON_ONE_CARD
from harness.core.errors import UsageError
from harness.core.precisions import PRECISIONS
from harness.core.records import Machine, Verdict
from harness.core.training.setup import TRAINING_METHODS, TrainingSetup
from harness.core.units import format_count, format_gib
from harness.planning.code import code_head
from harness.planning.training import code, memory, zero
from harness.planning.training.memory import TrainingPlan
from harness.planning.training.zero import Room, States, Trained
from harness.report.terminal import output, tables
from harness.report.terminal.output import PLAN_SCHEMA
from harness.report.terminal.plan_table import COLORS

if TYPE_CHECKING:
    from harness.catalog.resolve import Source

USUAL_LENGTH = 1024
TITLES = {"zero2": "ZeRO-2", "zero3": "ZeRO-3"}
_WORDS = {Verdict.UNKNOWN: "unknown: pass --ram SIZE"}


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not apply to the way of training that is asked for.

    Raises:
        UsageError: one does not, or no way is asked for.
    """
    way = args.training
    if way in TRAINING_METHODS:
        wrong = ("nodes", *(OF_ADAPTERS if way == "full" else ()))
    elif way is not None:
        wrong = (*ON_ONE_CARD, *OF_ADAPTERS, "batch")
    else:
        wrong = ABOUT_TRAINING
    for name in wrong:
        if not getattr(args, name.replace("-", "_")):
            continue
        if way is not None:
            raise UsageError(f"--{name} does not apply to --training {way}: drop one of them")
        ways = zero.STAGES if name == "nodes" else ("lora", "qlora") if name in OF_ADAPTERS else TRAINING_METHODS
        raise UsageError(f"--{name} applies to training only: add --training {' or '.join(ways)}")


def train(args: argparse.Namespace, sources: Sequence[Source], machine: Machine) -> int:
    """Print what training the models takes. Returns 0 if something fits for each model, 1 if nothing does for one.

    Raises:
        UsageError: the machine has no GPU, or a model cannot be trained so.
    """
    specs = [model_spec.read_spec(source) for source in sources]
    if args.training in zero.STAGES:
        return show_training(specs, machine, args.training, args.nodes or 1, as_json=args.json)
    found = []
    for spec, source in zip(specs, sources, strict=True):
        plan = memory.plan_training(spec, machine, memory.settled(spec, machine, _setup(args, spec)))
        found.append((spec, plan, _program(source, spec, plan)))
    if args.json:
        objects = [_card_json(spec, plan, program, machine) for spec, plan, program in found]
        output.print_json(objects[0] if len(objects) == 1 else {"schema": PLAN_SCHEMA, "models": objects})
    else:
        tables.show(*(part for one in found for part in _card_parts(*one)))
    return FITS if all(plan.verdict.is_good for _, plan, _ in found) else NOTHING_FITS


def _setup(args: argparse.Namespace, spec: ModelSpec) -> TrainingSetup:
    given: dict[str, Any] = {"rank": args.rank, "targets": args.target_modules, "optimizer": args.optimizer, "batch": args.batch}
    return TrainingSetup(
        method=args.training,
        sequence_length=args.sequence_length or min(USUAL_LENGTH, spec.context_length or USUAL_LENGTH),
        checkpointing=args.gradient_checkpointing,
        **{name: value for name, value in given.items() if value},
    )


def _program(source: Source, spec: ModelSpec, plan: TrainingPlan) -> str:
    named = msgspec.structs.replace(source, name=source.location) if source.is_local else source
    dtype = PRECISIONS[plan.setup.precision].dtype_on(plan.card.compute_capability)
    card = int(plan.card.name.removeprefix("gpu:"))
    return code.training_program(code_head(named, "direct"), plan.setup, dtype, spec.skeleton.auto_class, card)


def _card_parts(spec: ModelSpec, plan: TrainingPlan, program: str) -> list[RenderableType]:
    """Return the title, the table of what lies on the card, what is to be known of it, and the program."""
    counts = f"{format_count(plan.trained)} of {format_count(spec.skeleton.parameters)} parameters"
    said = f"{spec.name}: training {counts} by {TRAINING_METHODS[plan.setup.method]} on {plan.card.model or plan.card.name}"
    table = tables.table("on the card", "GiB", left=1)
    for name, size in plan.parts.items():
        table.add_row(name, format_gib(size))
    table.add_row("peak", format_gib(plan.peak_bytes))
    experts = memory.left_out(spec.skeleton, plan.setup)
    notes = [Text(experts)] if experts else []
    return [tables.title(said), table, Text(_sentence(plan)), *notes, tables.commands(program.rstrip("\n"))]


def _sentence(plan: TrainingPlan) -> str:
    """Say whether it fits, with what; where it does not, what to change."""
    setup, capacity = plan.setup, plan.card.capacity_bytes
    checkpoints = ", with gradient checkpointing" if setup.checkpointing else ""
    what = f"{setup.batch} x {setup.sequence_length} tokens a step, {setup.optimizer}{checkpoints}"
    paged = f" {format_gib(plan.paged)} GiB of the optimizer go to RAM where the card is full." if plan.paged else ""
    if capacity is None:
        return f"{what}: the card's size is unknown.{paged}"
    verdict = plan.verdict.value.replace("_", " ")
    way_out = "" if plan.verdict.is_good else f" Try {' or '.join(_ways_out(setup))}."
    return f"{what}: {verdict}, {format_gib(plan.needed.best)} of {format_gib(capacity)} GiB.{way_out}{paged}"


def _ways_out(setup: TrainingSetup) -> list[str]:
    """Return what of a setup could be less, what costs least first."""
    ways = [] if setup.checkpointing else ["--gradient-checkpointing"]
    ways += ["a smaller --batch"] if setup.batch > 1 else []
    ways += {"full": ["--training lora"], "lora": ["--training qlora"]}.get(setup.method, [])
    return [*ways, "a shorter --sequence-length"]


def _card_json(spec: ModelSpec, plan: TrainingPlan, program: str, machine: Machine) -> dict[str, Any]:
    return {
        "schema": PLAN_SCHEMA,
        "model": {"name": spec.name, "source": spec.source, "parameters": spec.skeleton.parameters},
        "machine": output.machine_json(machine),
        "training": msgspec.to_builtins(plan.setup)
        | {"card": plan.card.name, "parameters": plan.trained, "traced_by": plan.step.source},
        "parts_bytes": dict(plan.parts),
        "paged_bytes": plan.paged,
        "peak_bytes": plan.peak_bytes,
        "low_bytes": round(plan.needed.low),
        "high_bytes": round(plan.needed.high),
        "capacity_bytes": plan.card.capacity_bytes,
        "verdict": plan.verdict.value,
        **({"notes": [experts]} if (experts := memory.left_out(spec.skeleton, plan.setup)) else {}),
        "code": program,
    }


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
        word = Text(_WORDS.get(verdict, verdict.value.replace("_", " ")), style=COLORS.get(verdict, ""))
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
