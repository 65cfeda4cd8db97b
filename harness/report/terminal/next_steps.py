"""The commands that a plan ends with: each is whole, so that what is pasted asks of the same machine and the same tokens."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

from harness.checkpoint.reader import CONFIG
from harness.core.placements import PLACEMENTS
from harness.core.records import USUAL_KV, Case, Machine, Plan, Workload
from harness.planning.choice.recommend import Recommendation

_USUAL = Workload()


class Asked(NamedTuple):
    """What was asked, as far as what is printed depends on it."""

    machine: Machine
    options: str = ""  #: as they were typed, each with a blank before it, less those that choose cases and what is printed
    cases: str = ""  #: those that choose cases
    code: str = ""  #: those that the code depends on, and that a run takes as well
    all: bool = False  #: whether every case is shown


def code_command(recommendation: Recommendation, one: Plan, asked: Asked) -> str:
    """Return the command that prints the script of a case."""
    return f"fitmatrix plan {_sayable(recommendation)}{asked.code}{asked.options} --code {one.case.way}"


def plan_command(recommendation: Recommendation, asked: Asked, *, more: str) -> str:
    """Return the command that was given, for one model, with another option."""
    return f"fitmatrix plan {_sayable(recommendation)}{asked.code}{asked.options}{asked.cases} {more}"


def proof_command(recommendation: Recommendation, one: Plan, asked: Asked) -> str:
    """Return the command that measures what was planned, on the machine where it is given; images as so many tokens of text."""
    workload = one.case.workload
    tokens = "".join(
        f" --{key.replace('_', '-')} {getattr(workload, key)}"
        for key in ("prompt_tokens", "new_tokens", "batch")
        if getattr(workload, key) != getattr(_USUAL, key)
    )
    row = PLACEMENTS[one.case.placement]
    named = f" --placement {row.name}" if row.parallel and "--placement" not in asked.cases else ""
    cases = _options_of(one.case) if recommendation.contexts or recommendation.is_found else f"{asked.cases}{named}"
    made_up = " --weights synthetic" * (recommendation.source.file == CONFIG)  # of a config alone
    return f"pytest cases/ --model {_sayable(recommendation, file_option=False)}{made_up}{tokens}{asked.code}{cases}"


def _options_of(case: Case) -> str:
    """Return the options that name a case."""
    options = {"precision": case.precision, "placement": case.placement, "kv": case.kv, "attention": case.attention}
    return "".join(f" --{name} {value}" for name, value in options.items() if value not in (None, USUAL_KV))


def _sayable(recommendation: Recommendation, *, file_option: bool = True) -> str:
    """Write the model as an argument of a command: a directory by its path from here."""
    source = recommendation.source
    if not source.is_local:
        file = f" --file {shlex.quote(source.file)}" if source.file and file_option else ""
        return f"{source.location if source.file else source.name}{file}"
    runs = not file_option and source.file == CONFIG
    place = Path(source.location) / ("" if runs else source.file or "")
    if not place.is_relative_to(Path.cwd()):
        return shlex.quote(str(place))
    inside = place.relative_to(Path.cwd())
    return shlex.quote(f"./{inside}") if inside.parts else "."
