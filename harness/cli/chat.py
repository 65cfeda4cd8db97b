"""`fitmatrix chat MODEL [CASE]`: chat with a model in the browser on this machine, loaded as the plan recommends."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from harness.cli.options import FIRST_PORT, add_options, given_or_default
from harness.cli.plan_args import NOTHING_FITS, AskedCase, PlanQuestion, advise_on, asked_case, constants, earlier_results
from harness.core.errors import UsageError
from harness.core.placements import FILE, PLACEMENTS
from harness.core.records import Verdict, Workload
from harness.core.text import print_note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.catalog.resolve import Source
    from harness.core.records import Case, Machine, Plan
    from harness.planning.choice.recommend import Recommendation


_PORTS = 100
_LONGEST = 8192  # tokens of a conversation, unless more are asked for: what is read anew for each answer takes time
_LOAD_S = 24 * 3600.0  # more than any load takes; a chat has no limit
# One process answers, and no custom device map is read.
_TALKING = [name for name, row in PLACEMENTS.items() if name != FILE and not row.parallel]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="a catalog name, a hub id, a directory or a GGUF file")
    parser.add_argument(
        "case", nargs="?", metavar="CASE", help="how to load it, such as int8/direct (default: what the plan recommends)"
    )
    add_options(parser, "chat", "host", "port", "prompt-tokens", "new-tokens", "anyway", "trust-remote-code")
    parser.epilog = (
        "There is no option to share the page over the internet: gradio would tunnel it through a public server, and anyone with "
        "the link could use this machine."
    )


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C (exit status 130). Returns 1 if the model does not fit or its process ends.

    Raises:
        UsageError, CheckpointError: the request or the model is wrong, or gradio is missing; exit status 2.
    """
    from harness.catalog import resolve
    from harness.machine import accelerators, probe

    host = given_or_default(args, "chat", "host")
    port = _free_port(host, args.port)
    here = accelerators.usable(probe.probe(), ask=False)
    source = resolve.resolve(args.model)
    asked = [_talking_case(args.case)] if args.case else []
    recommendation = _advised(args, source, here, asked)
    chosen = recommendation.best or (recommendation.plans[0] if asked else None)
    command = _plan_command(args, recommendation.plans[0].case.workload)
    if chosen is None and args.anyway:
        raise UsageError(f"--anyway loads the case that you name, and nothing fits: name one, {command} --all lists them")
    if chosen is None:
        return _say(f"{source.name}: nothing fits; {command} shows why")
    if chosen.code is None or not (chosen.verdict.is_good or args.anyway):
        return _refuse(args, chosen)
    _need_tokenizer(recommendation.spec.tokenizer, source.name)
    _need_gradio()
    return _serve(args, chosen.case, host, port)


def _advised(args: argparse.Namespace, source: Source, here: Machine, asked: Sequence[AskedCase]) -> Recommendation:
    """Plan for the usual conversation, or for what is asked; then for a longer one where nothing is asked and more fits as well."""
    prompt, new = (given_or_default(args, "chat", name) for name in ("prompt-tokens", "new-tokens"))
    results = earlier_results(None)
    question, calibration = PlanQuestion(cases=asked, trust=args.trust_remote_code, results=results), constants(results, here)
    planned = advise_on(source, here, Workload(prompt_tokens=prompt, new_tokens=new), question, calibration)
    if args.prompt_tokens is not None:
        return planned
    known = planned.spec.context_length
    if known is not None and 4 <= known < prompt + new:  # the usual lengths are beyond this model
        new = min(new, known // 2) if args.new_tokens is None else new
        return advise_on(source, here, Workload(prompt_tokens=max(1, known - new), new_tokens=new), question, calibration)
    fitting = planned.planner.max_context(planned.best) if planned.best else None
    if planned.best is None or planned.best.verdict is not Verdict.FITS or fitting is None or fitting <= prompt + new:
        return planned
    longer = Workload(prompt_tokens=min(fitting, _LONGEST) - new, new_tokens=new)
    best = planned.best.case
    found = advise_on(
        source,
        here,
        longer,
        question._replace(cases=[AskedCase(best.precision, best.placement, best.kv, best.attention)]),
        calibration,
    )
    return found if found.best else planned


def _talking_case(text: str) -> AskedCase:
    asked = asked_case(text)
    if asked.placement not in _TALKING:
        raise UsageError(
            f"chat does not support placement {asked.placement} (several processes or a custom map): "
            f"use one of {', '.join(_TALKING)}"
        )
    return asked


def _free_port(host: str, port: int | None) -> int:
    """Return the port asked for, or for None the first free one from gradio's default port on.

    Raises:
        UsageError: the port is taken, none is free, or the address is not one of this machine.
    """
    import errno
    import socket

    for tried in [port] if port else range(FIRST_PORT, FIRST_PORT + _PORTS):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, tried, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                return tried
        except OSError as error:
            if error.errno == errno.EADDRINUSE and not port:
                continue
            of_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
            what = f"--port {tried}" if of_port else f"--host {host!r}"
            instead = "another port" if of_port else "an address of this machine, such as 127.0.0.1"
            raise UsageError(f"{what}: {error.strerror}; give {instead}") from None
    raise UsageError(f"no port from {FIRST_PORT} to {FIRST_PORT + _PORTS - 1} is free: pass --port")


def _plan_command(args: argparse.Namespace, workload: Workload) -> str:
    """Return the command that plans what was asked for: the same files, and the tokens of this conversation."""
    tokens = ["--prompt-tokens", str(workload.prompt_tokens), "--new-tokens", str(workload.new_tokens)]
    trusted = ["--trust-remote-code"] if args.trust_remote_code else []
    return shlex.join(["fitmatrix", "plan", args.model, *tokens, *trusted])


def _refuse(args: argparse.Namespace, one: Plan) -> int:
    """Say why a case cannot be chatted with. Returns the exit status; raises UsageError if it cannot be loaded at all."""
    if one.code is None:
        raise UsageError(f"{one.case.id} cannot be loaded: {one.why}")
    why = (one.why or "").partition(" Try ")[0].removesuffix(".")  # options of a plan, which a chat does not have
    return _say(f"{one.case.id}: {why}. {_plan_command(args, one.case.workload)} shows what fits, --anyway loads it all the same")


def _say(sentence: str) -> int:
    print_note(sentence)
    return NOTHING_FITS


def _need_tokenizer(has_one: bool, model: str) -> None:
    if not has_one:
        raise UsageError(f"{model} has no tokenizer beside its weights (synthetic weights have none), and a chat needs one")


def _need_gradio() -> None:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise UsageError("needs the package gradio: pip install fitmatrix[chat]")


def _serve(args: argparse.Namespace, case: Case, host: str, port: int) -> int:
    """Fetch and load the model in a worker of its own, which serves the page, and wait."""
    from harness.machine.scratch import Scratch
    from harness.planning.loading.seconds import load_takes
    from harness.run.case_result import CaseEnded
    from harness.run.options import Options
    from harness.run.runner import Run
    from harness.run.session import Session

    workload = case.workload
    asked = {"model": [args.model], "precision": [case.precision], "placement": [case.placement], "kv": [case.kv]}
    asked |= {"attention": [case.attention]} if case.attention else {}
    about: dict[str, Any] = {"prompt_tokens": workload.prompt_tokens, "new_tokens": workload.new_tokens}
    about |= {"trust_remote_code": args.trust_remote_code, "case_timeout": _LOAD_S, "phase_timeout": _LOAD_S}
    with Scratch() as nothing_kept:  # which the next run removes if this one is killed
        session = Session(Options(given={**asked, **about, "results": nothing_kept}))
        session.interrupts.install()
        try:
            [one] = session.cases()
            session.prepare([one])
            decided, model = session.plan(one), session.case_model(one)
            _need_tokenizer(model.tokenizer, one.model)
            if decided.code is None or not (decided.verdict.is_good or args.anyway):
                return _refuse(args, decided)
            if not decided.verdict.is_good:
                _say(f"{one.id}: {decided.why} Loading it all the same")
            run = Run(decided, model, session.context)
            try:
                if decided.estimate is not None:
                    print_note(f"loading {one.id}: {load_takes(decided.estimate)}")
                served = run.chat(host, port)
                print(f"Chat with {one.id} at {served.url} (Ctrl-C to stop)", flush=True)
                run.wait()
            except CaseEnded as ended:
                return _say(f"{one.id}: {ended.why}")
            finally:
                run.finish()
        finally:
            session.close()
            session.interrupts.restore()
