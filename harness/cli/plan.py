"""`fitmatrix plan MODEL...`: what fits, how fast it would run, and the code that loads it; nothing is loaded or downloaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.cli import output
from harness.cli.output import SCHEMA
from harness.cli.plan_args import FITS, NOTHING_FITS, advise_on, asked_case, constants, count
from harness.core.errors import UsageError, did_you_mean
from harness.core.placements import FILE, PLACEMENTS, named
from harness.core.precisions import ALL, PRECISIONS
from harness.core.records import Workload
from harness.core.units import parse_size
from harness.planning.zero import STAGES

if TYPE_CHECKING:
    from harness.catalog.resolve import Source
    from harness.core.records import Machine, Plan
    from harness.planning.device_map.infer import Device
    from harness.planning.recommend import Recommendation

HELP = "Say which ways of loading a model fit, before loading or even downloading it."

_USUAL = Workload()
# Options that say nothing of training.
_ABOUT_RUNNING = (
    "--precision", "--placement", "--device-map", "--prompt-tokens", "--new-tokens", "--batch", "--context", "--code", "--explain",
    "--results", "--prove-min-ram",
)  # fmt: skip
_TIER_KEYS = (
    "weights_bytes",
    "kv_bytes",
    "activation_bytes",
    "overhead_bytes",
    "allocated_bytes",
    "peak_bytes",
    "load_peak_bytes",
    "low_bytes",
    "high_bytes",
    "capacity_bytes",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a catalog name, a hub id, a directory or a GGUF file")
    add("--file", metavar="NAME", help="this GGUF file of MODEL, where it has several")
    add(
        "--gpu",
        action="append",
        metavar="NAME|SIZE",
        help='plan for a machine with this card, "RTX 3060 12GB" or 8GiB (repeatable)',
    )
    add("--ram", metavar="SIZE", help="plan for a machine with so much RAM")
    add("--disk", metavar="SIZE", help="plan for a machine with so much free disk space")
    add("--precision", action="append", metavar="NAME", help=f"only this: {', '.join(PRECISIONS)}, or all (repeatable)")
    add("--placement", action="append", metavar="NAME", help=f"only this: {', '.join(PLACEMENTS)} (repeatable)")
    add("--device-map", metavar="FILE", help=f"plan a device_map of yours, JSON or TOML, as placement {FILE}")
    add("--prompt-tokens", metavar="N", help=f"tokens of each prompt (default {_USUAL.prompt_tokens})")
    add("--new-tokens", metavar="N", help=f"tokens to generate from each prompt (default {_USUAL.new_tokens})")
    add("--batch", metavar="N", help="prompts generated from at once (default 1)")
    add("--context", metavar="N", help="plan for so many tokens, prompt and answer together")
    add("--code", metavar="CASE", help="print a script that loads and generates, for a case such as int8/direct")
    add(
        "--trust-remote-code", action="store_true", help="plan and write code that lets the model's own code run; nothing runs here"
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--explain", metavar="CASE", help="show every term of a case such as int8/direct")
    add("--training", metavar="STAGE", help=f"what training by DeepSpeed's ZeRO would take instead: {', '.join(STAGES)}")
    add("--nodes", metavar="N", help="with --training: so many machines like this one (default 1)")
    add(
        "--prove-min-ram",
        action="store_true",
        help="run the cases under limits until the smallest RAM that works is known within 5 %% (default placement: cpu)",
    )
    add("--results", metavar="DIR", help="correct the seconds by results of this machine in DIR (default fitmatrix-results)")


def run(args: argparse.Namespace) -> int:
    """Plan the models, or prove plans. Returns 0 if something fits for each model, 1 if nothing does for one.

    Raises:
        UsageError, CheckpointError: the request or a model is wrong; exit status 2.
    """
    if args.training is not None or args.nodes is not None:
        return _train(args)
    asked_precisions = list(PRECISIONS) if ALL in (args.precision or ()) else args.precision
    precisions = _names(asked_precisions, PRECISIONS, "--precision")
    _names(args.placement, PLACEMENTS, "--placement")
    load = workload(args)
    if args.prove_min_ram:
        from harness.cli.prove_min_ram import prove

        return prove(args, precisions, named(args.placement, args.device_map is not None) or ["cpu"], load)
    machine, here = described(args)
    asked = [asked_case(text) for text in (args.code, args.explain) if text]
    if asked and (len(args.models) > 1 or args.json):
        raise UsageError("--code and --explain are about one case: name one MODEL, without --json")
    device_map = _device_map(args, [placement for _, placement in asked])
    calibration = constants(args.results, machine) if here else None
    recommendations = [
        advise_on(
            source,
            machine,
            load,
            calibration=calibration,
            asked=asked,
            precisions=precisions if args.precision else None,
            placements=named(args.placement, device_map is not None),
            device_map=device_map,
            trust=args.trust_remote_code,
        )
        for source in _sources(args)
    ]
    return _print(recommendations, args, machine, load)


def _sources(args: argparse.Namespace) -> list[Source]:
    from harness.catalog import resolve

    if args.file and len(args.models) > 1:
        raise UsageError("--file names a file of one model: name one MODEL, or the files by their paths")
    return [resolve.resolve(model, args.file) for model in args.models]


def _train(args: argparse.Namespace) -> int:
    """Say what training the models takes. Returns 0 if some way fits for each model, 1 if none does for one."""
    from harness.architecture import model_spec
    from harness.cli import training

    if args.training is None:
        raise UsageError(f"--nodes is about training: add --training {' or '.join(STAGES)}")
    if args.training not in STAGES:
        raise UsageError(f"--training: no {args.training!r}: {did_you_mean(args.training, STAGES)}")
    for flag in _ABOUT_RUNNING:
        if getattr(args, flag.removeprefix("--").replace("-", "_")):
            raise UsageError(f"{flag} is about running a model, and --training about training it: give one of them")
    nodes = count(args.nodes, "--nodes", 1, 1)
    machine, _ = described(args)
    spec = [model_spec.read_spec(source) for source in _sources(args)]
    return training.show(spec, machine, args.training, nodes, as_json=args.json)


def _device_map(args: argparse.Namespace, asked: Sequence[str]) -> dict[str, Device] | None:
    """Return the user's own map, if one is given; `asked` are placements of single cases."""
    from pathlib import Path

    from harness.planning.device_map import user_map

    path = Path(args.device_map) if args.device_map is not None else None
    return user_map.asked(path, [*(args.placement or ()), *asked])


def workload(args: argparse.Namespace) -> Workload:
    """Return the workload that the options describe.

    Raises:
        UsageError: a number is none, too small, or --context leaves no room for a prompt.
    """
    new = count(args.new_tokens, "--new-tokens", 2, _USUAL.new_tokens)
    prompt = count(args.prompt_tokens, "--prompt-tokens", 1, _USUAL.prompt_tokens)
    if args.context is not None:
        if args.prompt_tokens is not None:
            raise UsageError("--context and --prompt-tokens both say how long the prompt is: give one of them")
        context = count(args.context, "--context", 3, 0)
        if context <= new:
            raise UsageError(
                f"--context {context} has no room for a prompt beside {new} new tokens: raise it or lower --new-tokens"
            )
        prompt = context - new
    return Workload(prompt_tokens=prompt, new_tokens=new, batch=count(args.batch, "--batch", 1, 1))


def described(args: argparse.Namespace) -> tuple[Machine, bool]:
    """Return the machine to plan for, and whether it is this one.

    Raises:
        UsageError: no such card, or not a size.
    """
    if args.gpu or args.ram or args.disk:
        from harness.machine.gpus import profile

        ram, disk = (_size(value, flag) for value, flag in ((args.ram, "--ram"), (args.disk, "--disk")))
        return profile(args.gpu or [], ram=ram, disk=disk), False
    from harness.machine import probe

    return probe.probe(), True


def _size(text: str | None, flag: str) -> int | None:
    try:
        return parse_size(text) if text is not None else None
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from None


def _names(given: Sequence[str] | None, table: Any, flag: str) -> list[str]:
    for name in given or ():
        if name not in table:
            raise UsageError(f"{flag}: no {name!r}: {did_you_mean(name, table)}")
    return [name for name in table if not given or name in given]


def _print(recommendations: Sequence[Recommendation], args: argparse.Namespace, machine: Machine, load: Workload) -> int:
    if args.json:
        objects = [as_json(recommendation, machine, load) for recommendation in recommendations]
        output.print_json(objects[0] if len(objects) == 1 else {"schema": SCHEMA, "models": objects})
    elif args.code:
        _print_code(recommendations[0])
    else:
        from harness.report.terminal import plans

        if args.explain:
            plans.explain(recommendations[0])
        else:
            plans.show(recommendations, machine, load)
    return FITS if all(recommendation.best for recommendation in recommendations) else NOTHING_FITS


def _print_code(recommendation: Recommendation) -> None:
    from harness.core.text import line
    from harness.planning import code
    from harness.planning.planner import GOOD

    one = recommendation.plans[0]
    if one.code is None:
        raise UsageError(f"{one.case.id} cannot be loaded: {one.why}")
    script = code.script(_head(recommendation, one), one, recommendation.spec.gguf_file)
    print(script if one.verdict in GOOD else f"# {line(str(one.why))}\n{script}", end="")


def _head(recommendation: Recommendation, one: Plan) -> str:
    """Write where the model is; this code is for the user alone and may name a directory, which results must not."""
    from msgspec.structs import replace

    from harness.planning import code

    source = recommendation.source
    named = replace(source, name=source.location) if source.kind == "directory" else source
    return code.code_head(named, one.case.placement)


def as_json(recommendation: Recommendation, machine: Machine, load: Workload) -> dict[str, Any]:
    """Return the object that the contract of the command line describes."""
    from harness.catalog import resolve

    spec = recommendation.spec
    return {
        "schema": SCHEMA,
        "model": {
            "name": spec.name,
            "source": spec.source,
            "architecture": spec.skeleton.model_class,
            "parameters": spec.skeleton.parameters,
            "checkpoint_bytes": spec.checkpoint_bytes,
            "context_length": spec.context_length,
            "history": resolve.history(spec.name),
            **({"notes": list(spec.notes)} if spec.notes else {}),
        },
        "machine": output.machine_json(machine),
        "workload": {key: getattr(load, key) for key in ("prompt_tokens", "new_tokens", "batch")},
        "plans": [_plan_json(recommendation, one) for one in recommendation.plans],
        "recommended": recommendation.best.case.id if recommendation.best else None,
    }


def _plan_json(recommendation: Recommendation, one: Plan) -> dict[str, Any]:
    expected = one.estimate
    spans = {
        key: {end: getattr(getattr(expected, key), end) for end in ("low", "best", "high")} if expected else None
        for key in ("load_s", "first_token_s", "decode_tok_s")
    }
    tiers = expected.tiers.items() if expected else ()
    return {
        "case": one.case.id,
        "precision": one.case.precision,
        "placement": one.case.placement,
        "verdict": one.verdict.value,
        "why": one.why,
        "tiers": {name: {key: getattr(tier, key) for key in _TIER_KEYS} for name, tier in tiers},
        **spans,
        "device_map": one.device_map,
        "max_memory": one.max_memory,
        "max_context_tokens": recommendation.planner.max_context(one),
        "code": _head(recommendation, one) + one.code if one.code else None,
    }
