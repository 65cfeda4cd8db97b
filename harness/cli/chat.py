"""`fitmatrix chat MODEL [CASE]`: talk to a model in a browser on this machine, loaded as the plan says."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from harness.cli.plan_args import NOTHING_FITS, advise_on, asked_case, constants, count
from harness.core.errors import UsageError
from harness.core.placements import FILE, PLACEMENTS, distinct
from harness.core.records import Workload

if TYPE_CHECKING:
    from harness.core.records import Case, Plan

HELP = "Talk to a model in a browser on this machine, loaded as the plan says."

_HOST, _FIRST_PORT, _PORTS = "127.0.0.1", 7860, 100
_PROMPT, _NEW = 1024, 256
_LOAD_S = 24 * 3600.0  # nobody waits longer for a model to load; talking takes as long as it takes
# One process answers, and there is no map of the user's own.
_TALKING = [name for name, row in PLACEMENTS.items() if name != FILE and not row.parallel]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a catalog name, a hub id, a directory or a GGUF file")
    add("case", nargs="?", metavar="CASE", help="how to load it, such as int8/direct (default: what the plan recommends)")
    add("--host", default=_HOST, metavar="ADDRESS", help=f"where to listen (default {_HOST}; 0.0.0.0: for the whole network)")
    add("--port", metavar="N", help=f"the port to listen at (default: the first free from {_FIRST_PORT})")
    add("--prompt-tokens", metavar="N", help=f"plan for so much of the conversation; older turns go (default {_PROMPT})")
    add("--new-tokens", metavar="N", help=f"tokens of an answer at most (default {_NEW})")
    add("--trust-remote-code", action="store_true", help="let code that comes with the model run")
    parser.epilog = (
        "There is no option to share the page: gradio would open a tunnel through a server of others, and whoever has the link "
        "could use this machine."
    )


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C (exit status 130). Returns 1 if the model does not fit or its process ends.

    Raises:
        UsageError, CheckpointError: the request or the model is wrong, or gradio is missing; exit status 2.
    """
    from harness.catalog import resolve
    from harness.machine import probe

    load = Workload(
        prompt_tokens=count(args.prompt_tokens, "--prompt-tokens", 1, _PROMPT),
        new_tokens=count(args.new_tokens, "--new-tokens", 2, _NEW),
    )
    asked = [_talking_case(args.case)] if args.case else []
    port = _free_port(args.host, count(args.port, "--port", 1, 0, most=65535))
    here = probe.probe()
    places = [name for name in distinct(PLACEMENTS, len(here.gpus)) if name in _TALKING]
    source = resolve.resolve(args.model)
    recommendation = advise_on(
        source, here, load, calibration=constants(None, here), asked=asked, placements=places, trust=args.trust_remote_code
    )
    chosen = recommendation.best
    if chosen is None:
        if asked:
            return _refuse(recommendation.plans[0])
        return _say(f"{source.name}: nothing fits; fitmatrix plan {source.name} says why")
    _need_tokenizer(recommendation.spec.tokenizer, source.name)
    _need_gradio()
    return _serve(args, chosen.case, port)


def _talking_case(text: str) -> tuple[str, str]:
    precision, placement = asked_case(text)
    if placement not in _TALKING:
        raise UsageError(f"no chat by {placement}, which takes several processes or a map of yours: one of {', '.join(_TALKING)}")
    return precision, placement


def _free_port(host: str, port: int) -> int:
    """Return the port asked for, or for 0 the first from gradio's own that nobody listens at.

    Raises:
        UsageError: it is taken, there is none, or the address is none of this machine.
    """
    import errno
    import socket

    for tried in [port] if port else range(_FIRST_PORT, _FIRST_PORT + _PORTS):
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, tried, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                return tried
        except OSError as error:
            if error.errno == errno.EADDRINUSE and not port:
                continue
            what = f"--port {tried}" if error.errno in (errno.EADDRINUSE, errno.EACCES) else f"--host {host!r}"
            raise UsageError(f"{what}: {error.strerror}") from None
    raise UsageError(f"no port from {_FIRST_PORT} to {_FIRST_PORT + _PORTS - 1} is free: give one by --port")


def _refuse(one: Plan) -> int:
    """Say why a plan cannot be talked to. Returns the exit status; raises UsageError where it cannot be loaded at all."""
    if one.code is None:
        raise UsageError(f"{one.case.id} cannot be loaded: {one.why}")
    return _say(f"{one.case.id}: {one.why}")


def _say(sentence: str) -> int:
    from harness.core.text import line

    print(f"fitmatrix: {line(sentence)}", file=sys.stderr)
    return NOTHING_FITS


def _need_tokenizer(has_one: bool, model: str) -> None:
    if not has_one:
        raise UsageError(f"{model} has no tokenizer beside its weights, as synthetic ones have none: there are no words to talk in")


def _need_gradio() -> None:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise UsageError("needs the package gradio: pip install fitmatrix[chat]")


def _serve(args: argparse.Namespace, case: Case, port: int) -> int:
    """Fetch and load the model in a worker of its own, which serves the page, and wait."""
    from tempfile import TemporaryDirectory

    from harness.planning.planner import GOOD
    from harness.run.options import Options
    from harness.run.runner import CaseEnded, Run
    from harness.run.session import Session

    load = case.workload
    asked = {"model": [args.model], "precision": [case.precision], "placement": [case.placement]}
    about = {"prompt_tokens": load.prompt_tokens, "new_tokens": load.new_tokens, "trust_remote_code": args.trust_remote_code}
    about |= {"case_timeout": _LOAD_S, "phase_timeout": _LOAD_S}
    with TemporaryDirectory(prefix="fitmatrix-") as nothing_kept:
        session = Session(Options(given={**asked, **about, "results": nothing_kept}))
        session.interrupts.install()
        try:
            [one] = session.cases()
            session.prepare([one])
            decided, subject = session.plan(one), session.subject(one)
            _need_tokenizer(subject.tokenizer, one.model)
            if decided.verdict not in GOOD:
                return _refuse(decided)
            run = Run(decided, subject, session.setting)
            try:
                served = run.chat(args.host, port)
                print(f"Talk to {one.id} at {served.url} (Ctrl-C ends it)", flush=True)
                run.wait()
            except CaseEnded as ended:
                return _say(f"{one.id}: {ended.why}")
            finally:
                run.finish()
        finally:
            session.close()
            session.interrupts.restore()
