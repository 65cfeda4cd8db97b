"""`fitmatrix plan MODEL... --prove-min-ram`: run cases under RAM limits to find the smallest RAM that works."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from harness.cli.plan_args import FITS, NOTHING_FITS
from harness.core.errors import UsageError
from harness.core.records import Result, Workload
from harness.core.text import print_note
from harness.core.units import format_gib, format_share
from harness.machine import cgroup
from harness.report.terminal import output, tables
from harness.run import min_ram
from harness.run.min_ram import Minimum, failed
from harness.run.options import Options
from harness.run.session import Session


def prove_plans(args: argparse.Namespace, precisions: Sequence[str], placements: Sequence[str], workload: Workload) -> int:
    """Find the smallest RAM that each case works in, and print it beside the estimate. Returns 1 if a case works under no limit.

    Raises:
        UsageError: options that describe another machine, or no case that fits here.
    """
    if clash := [flag for flag in ("gpu", "cpu", "ram", "disk", "code", "explain") if getattr(args, flag)]:
        raise UsageError(f"--prove-min-ram runs on this machine: drop --{clash[0]}")
    asked = {"model": args.models, "precision": precisions, "placement": placements, "batch": workload.batch}
    asked |= {"device_map": args.device_map, "prompt_tokens": workload.prompt_tokens, "new_tokens": workload.new_tokens}
    with TemporaryDirectory(prefix="fitmatrix-") as nothing_kept:
        session = Session(Options(given={**asked, "results": nothing_kept}))
        try:
            cases = session.cases()
            session.prepare(cases)
            wanted = [case for case in cases if session.plan(case).verdict.is_good]
            if not wanted:
                raise UsageError(f"nothing to prove: {session.plan(cases[0]).why}")
            found = [min_ram.prove(session, case, tried=tell) for case in wanted]
        finally:
            session.close()
    if args.json:
        minimums = [{"case": one.case.id} | _found_json(one) for one in found]
        output.print_json({"schema": output.PLAN_SCHEMA, "minimums": minimums})
    else:
        show_minimums(found)
    return FITS if all(one.works_bytes is not None for one in found) else NOTHING_FITS


def _found_json(one: Minimum) -> dict[str, Any]:
    keys = ("works_bytes", "fails_bytes", "why", "estimate_bytes", "estimate_high_bytes", "runs")
    return {key: getattr(one, key) for key in keys}


def tell(result: Result) -> None:
    """Report on standard error, if it is a terminal, how a case ended under a limit."""
    if sys.stderr.isatty():
        print_note(f"{result.id}  {failed(result) or 'works'}", name="")


def show_minimums(found: Sequence[Minimum]) -> None:
    """Print the smallest RAM that each case works in beside the estimate, and why less is not enough."""
    table = tables.table("case", "works in", "fails in", "estimate", "at most", "error", left=1)
    for one in found:
        sizes = (one.works_bytes, one.fails_bytes, one.estimate_bytes, one.estimate_high_bytes)
        off = format_share(one.estimate_bytes / one.works_bytes - 1) if one.works_bytes else ""
        table.add_row(tables.line(one.case.id), *(format_gib(size) if size is not None else "–" for size in sizes), off)
    reasons = "\n".join(tables.line(f"{one.case.id} with less: {one.why}") for one in found if one.why)
    held = "" if cgroup.is_allowed() else "No control group can be created here: only anonymous memory was limited."
    tables.show(tables.said("RAM in GiB"), table, *(tables.said(text) for text in (reasons, held) if text))
