"""`fitmatrix plan MODEL...`: what fits, how fast it would run, and the code that loads it; nothing is loaded or downloaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.cli.options import add_options, given_or_default, typed_options
from harness.cli.plan_args import (
    ABOUT_TRAINING,
    FITS,
    NOTHING_FITS,
    OF_ADAPTERS,
    ON_ONE_CARD,
    USAGE,
    PlanQuestion,
    advise_on,
    asked_case,
    constants,
    earlier_results,
)
from harness.core.attention import ATTENTIONS, KV_FORMS
from harness.core.errors import CheckpointError, UsageError
from harness.core.placements import named
from harness.core.precisions import PRECISIONS
from harness.core.records import USUAL_KV, Workload
from harness.core.text import line, print_note
from harness.report.terminal import output
from harness.report.terminal.output import PLAN_SCHEMA

if TYPE_CHECKING:
    from harness.catalog.resolve import Source
    from harness.core.records import Machine, Plan
    from harness.planning.calibration import Calibration
    from harness.planning.choice.recommend import Recommendation
    from harness.planning.device_map.infer import Device


# Options that do not apply to training.
_ABOUT_RUNNING = (
    "precision", "placement", "kv", "attention", "device-map", "prompt-tokens", "new-tokens", "context", "images", "code",
    "explain", "results", "prove-min-ram",
)  # fmt: skip
_OPTIONS = ("file", "trust-remote-code", "results", "prove-min-ram", "json")
_GROUPS = {
    "describe another machine": ("gpu", "cpu", "ram", "disk"),
    "ways of loading": ("precision", "placement", "kv", "attention", "device-map", "best", "min-speed"),
    "prompts and answers": ("prompt-tokens", "new-tokens", "batch", "context", "images"),
    "what to show": ("all", "code", "explain"),
    "training": ("training", *ON_ONE_CARD, *OF_ADAPTERS, "nodes"),
}
_OF_WORKLOAD = ("prompt-tokens", "new-tokens", "batch", "context", "images")
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
    "needed_bytes",
    "needed_high_bytes",
    "capacity_bytes",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a catalog name, a hub id, a directory or a GGUF file")
    add_options(parser, "plan", *_OPTIONS)
    for title, names in _GROUPS.items():
        add_options(parser.add_argument_group(title), "plan", *names)


def run(args: argparse.Namespace) -> int:
    """Plan the models, or prove plans. Returns 0 if something fits for each model, 1 if nothing does for one, 2 if one is wrong.

    Raises:
        UsageError, CheckpointError: the request or every model is wrong; exit status 2.
    """
    if args.training is not None or any(getattr(args, name.replace("-", "_")) for name in ABOUT_TRAINING):
        return _train(args)
    precisions = [name for name in PRECISIONS if not args.precision or name in args.precision]
    workload = workload_of(args)
    if args.prove_min_ram:
        if workload.images:
            raise UsageError("--prove-min-ram runs prompts of text: drop --images")
        from harness.cli.prove_min_ram import prove_plans

        return prove_plans(args, precisions, named(args.placement, args.device_map is not None) or ["cpu"], workload)
    machine, here = described(args)
    asked = [asked_case(text) for text in (args.code, args.explain) if text is not None]
    if asked and (len(args.models) > 1 or args.json):
        raise UsageError("--code and --explain show one case: give one MODEL and no --json")
    device_map = _device_map(args, [one.placement for one in asked])
    results = earlier_results(args.results)
    calibration = constants(results, machine) if here else None
    question = PlanQuestion(
        cases=asked,
        precisions=precisions if args.precision else None,
        placements=named(args.placement, device_map is not None),
        device_map=device_map,
        trust=args.trust_remote_code,
        traces=args.explain is not None,
        kv=[name for name in KV_FORMS if name in (args.kv or (USUAL_KV,))],
        attention=[name for name in ATTENTIONS if name in (args.attention or ())] or [None],
        search=args.best,
        least_tok_s=args.min_speed or 0.0,
        results=results,
        in_context=args.context is not None,
    )
    if args.min_speed is not None and not args.best:
        raise UsageError("--min-speed is what a search asks for: add --best")
    if args.best and (
        searched := typed_options(args, "precision", "placement", "kv", "attention", "device-map", "code", "explain")
    ):
        raise UsageError(f"--best searches every precision, placement and KV cache: drop{searched}")
    recommendations, faults = _advised(args, machine, workload, question, calibration)
    status = _print(recommendations, args, machine, faults)
    for fault in faults.values():
        print_note(fault)
    return USAGE if faults else status


def _advised(
    args: argparse.Namespace, machine: Machine, workload: Workload, question: PlanQuestion, calibration: Calibration | None
) -> tuple[list[Recommendation], dict[str, str]]:
    """Plan each model; of those that cannot be planned return why, by what was written for them.

    Raises:
        UsageError, CheckpointError: that of the last, if none can.
    """
    from harness.catalog import resolve

    _check_file(args)
    found: list[Recommendation] = []
    faults: dict[str, str] = {}
    for model in args.models:
        try:
            source = resolve.config_alone(model) or resolve.resolve(model, args.file)
            found.append(advise_on(source, machine, workload, question, calibration))
        except (UsageError, CheckpointError) as error:
            faults[model] = str(error)
            if len(faults) == len(set(args.models)):
                raise
    return found, faults


def _check_file(args: argparse.Namespace) -> None:
    if args.file and len(args.models) > 1:
        raise UsageError("--file selects a file of one model: give one MODEL, or the files by their paths")


def _sources(args: argparse.Namespace) -> list[Source]:
    from harness.catalog import resolve

    _check_file(args)
    return [resolve.resolve(model, args.file) for model in args.models]


def _train(args: argparse.Namespace) -> int:
    """Estimate the memory of training the models. Returns 0 if some way fits for each model, 1 if none does for one."""
    from harness.cli import training

    training.check_options(args)
    for name in _ABOUT_RUNNING:
        if getattr(args, name.replace("-", "_")):
            raise UsageError(f"--{name} does not apply to --training: drop one of them")
    machine, _ = described(args)
    return training.train(args, _sources(args), machine)


def _device_map(args: argparse.Namespace, asked: Sequence[str]) -> dict[str, Device] | None:
    """Return the user's own map, if one is given; `asked` are placements of single cases."""
    from harness.planning.device_map import user_map

    return user_map.asked(args.device_map, [*(args.placement or ()), *asked])


def workload_of(args: argparse.Namespace) -> Workload:
    """Return the workload that the options describe.

    Raises:
        UsageError: --context leaves no room for a prompt, or stands beside --prompt-tokens.
    """
    prompt, new, batch = (given_or_default(args, "plan", name) for name in ("prompt-tokens", "new-tokens", "batch"))
    if args.context is not None:
        if args.prompt_tokens is not None:
            raise UsageError("--context and --prompt-tokens both set the prompt length: give one of them")
        if args.context <= new:
            raise UsageError(
                f"--context {args.context} leaves no room for a prompt beside {new} new tokens: raise it or lower --new-tokens"
            )
        prompt = args.context - new
    return Workload(prompt_tokens=prompt, new_tokens=new, batch=batch, images=args.images or 0)


def described(args: argparse.Namespace) -> tuple[Machine, bool]:
    """Return the machine to plan for, and whether it is this one.

    Raises:
        UsageError: an unknown card.
    """
    if args.gpu or args.cpu or args.ram or args.disk:
        from harness.machine.described.machine import assemble

        return assemble(args.gpu or (), args.cpu, args.ram, args.disk), False
    from harness.machine import accelerators, probe

    return accelerators.usable(probe.probe(), ask=False), True


def _print(
    recommendations: Sequence[Recommendation],
    args: argparse.Namespace,
    machine: Machine,
    faults: Mapping[str, str],
) -> int:
    if args.json:
        objects = [as_json(recommendation, machine) for recommendation in recommendations]
        several = {"schema": PLAN_SCHEMA, "models": objects, **({"faults": dict(faults)} if faults else {})}
        output.print_json(objects[0] if len(args.models) == 1 else several)
    elif args.code is not None:
        _print_code(recommendations[0], gpus_differ=machine.gpus_differ)
    else:
        _show(recommendations, args, machine)
    return FITS if all(recommendation.best for recommendation in recommendations) else NOTHING_FITS


def _show(recommendations: Sequence[Recommendation], args: argparse.Namespace, machine: Machine) -> None:
    from harness.report.terminal import plans
    from harness.report.terminal.next_steps import Asked

    if args.explain is not None:
        from harness.report.terminal import explain

        explain.explain_plan(recommendations[0], whole=args.all)
        return
    of_machine = typed_options(args, "gpu", "cpu", "ram", "disk", "results", *_OF_WORKLOAD)
    of_code = typed_options(args, "device-map", "trust-remote-code")
    cases = typed_options(args, "precision", "placement", "kv", "attention")
    plans.show_plans(recommendations, Asked(machine, of_machine, cases, of_code, args.all))


def _print_code(recommendation: Recommendation, *, gpus_differ: bool) -> None:
    from harness.planning import code

    one = recommendation.plans[0]
    if one.code is None:
        raise UsageError(f"{one.case.id} cannot be loaded: {one.why}")
    spec = recommendation.spec
    script = code.script(_head(recommendation, one), one, spec.gguf_file, gpus_differ=gpus_differ, image=spec.image)
    print(script if one.verdict.is_good else f"# {line(str(one.why))}\n{script}", end="")


def _head(recommendation: Recommendation, one: Plan) -> str:
    """Write where the model is. Only the user sees this code, so it may name a directory; results must not."""
    from msgspec.structs import replace

    from harness.planning import code

    source, base = recommendation.source, recommendation.source.base
    named = replace(source, name=source.location) if source.is_local else source
    if base is not None and base.is_local:
        named = replace(named, base=replace(base, name=base.location))
    return code.code_head(named, one.case.placement)


def as_json(recommendation: Recommendation, machine: Machine) -> dict[str, Any]:
    """Return the object that the contract of the command line describes."""
    from harness.catalog import resolve

    spec, workload = recommendation.spec, recommendation.workload
    seen = {"images": workload.images, "image_tokens": spec.image.tokens} if spec.image else {}
    return {
        "schema": PLAN_SCHEMA,
        "model": {
            "name": spec.name,
            "source": spec.source,
            "architecture": spec.skeleton.model_class,
            "parameters": spec.skeleton.parameters,
            "checkpoint_bytes": spec.checkpoint_bytes,
            "context_length": spec.context_length,
            "history": resolve.history(spec.name),
            **({"notes": notes} if (notes := recommendation.notes) else {}),
        },
        "machine": output.machine_json(machine),
        "workload": {key: getattr(workload, key) for key in ("prompt_tokens", "new_tokens", "batch")} | seen,
        "plans": [_plan_json(recommendation, one) for one in recommendation.plans],
        "recommended": recommendation.best.case.id if recommendation.best else None,
        **({"nearest": recommendation.nearest} if recommendation.nearest else {}),
    }


def _load_json(recommendation: Recommendation, one: Plan) -> dict[str, Any] | None:
    from msgspec import to_builtins

    from harness.planning.loading import seconds

    time = seconds.timed(recommendation.planner, one)
    found: dict[str, Any] | None = to_builtins(time) if time is not None else None
    return found


def _plan_json(recommendation: Recommendation, one: Plan) -> dict[str, Any]:
    from msgspec import to_builtins

    from harness.planning.quality import quality_kept

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
        "kv": one.case.kv,
        "attention": one.case.attention,
        "verdict": one.verdict.value,
        "why": one.why,
        "needs": [*one.needs, *([one.needs_checkpoint] if one.needs_checkpoint else [])],
        "tiers": {name: {key: getattr(tier, key) for key in _TIER_KEYS} for name, tier in tiers},
        **spans,
        "ready_s": to_builtins(expected.ready_s) if expected else None,
        "load": _load_json(recommendation, one),
        "bound_by": expected.bound_by if expected else None,
        "quality_kept": quality_kept(one),
        "quality_from": known[1] if (known := recommendation.planner.known_quality.of(one.case)) else "rule of thumb",
        "device_map": one.device_map,
        "max_memory": one.max_memory,
        "max_context_tokens": recommendation.contexts.get(one.case.id) or recommendation.planner.max_context(one),
        "code": _head(recommendation, one) + one.code if one.code else None,
    }
