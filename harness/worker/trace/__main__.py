"""Trace what a model holds on a GPU that is not there.

    python -m harness.worker.trace < {"config": {...}, "precision": "bf16"} > record.json
    python -m harness.worker.trace < {"config": ..., "precision": ..., "workloads": [{"prompt_tokens": 64, "batch": 1}, ...]}
    python -m harness.worker.trace --catalog [MODEL ...]    # rebuilds harness/data/traces.jsonl, and prints what changed
    python -m harness.worker.trace --reserved [MODEL ...]   # only what torch's allocator takes beyond, in the records there are

A request may name an `attention` implementation and a compute `capability`. With workloads, all layers are run for each.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import msgspec
import torch
import transformers

import harness.models  # noqa: F401 registers our own architectures
from harness.architecture.card_kernels import BEFORE_FLASH, WITH_FLASH
from harness.core.records import Record, Workload
from harness.worker.trace.direct import trace
from harness.worker.trace.rebuild import SHIPPED_PRECISIONS, rebuild, replay_again
from harness.worker.trace.record import record


class TraceRequest(Record, frozen=True, kw_only=True):
    """What a trace is asked for. `check`: hold the record against all layers, and tell by how much it differs."""

    config: dict[str, Any]
    precision: str
    workloads: tuple[Workload, ...] = ()
    attention: str | None = None
    capability: str = WITH_FLASH
    check: bool = True


def main() -> None:
    """Answer one request from the standard input, or rebuild the records that are shipped."""
    parser = argparse.ArgumentParser(
        prog="harness.worker.trace", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--catalog", nargs="*", metavar="MODEL", help="rebuild the shipped records, of these models or of all")
    parser.add_argument("--reserved", nargs="*", metavar="MODEL", help="replay the shipped records, of these models or of all")
    parser.add_argument("--precision", nargs="+", default=SHIPPED_PRECISIONS, help="of the shipped records")
    parser.add_argument(
        "--capability", nargs="+", default=(WITH_FLASH, BEFORE_FLASH), help="families of cards, by compute capability"
    )
    parser.add_argument("--missing", action="store_true", help="only those that are missing, or made by other releases")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if asked.catalog is not None:
        sys.exit(rebuild(asked.catalog, asked.precision, asked.capability, missing=asked.missing))
    if asked.reserved is not None:
        replay_again(asked.reserved, asked.precision)
        return
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=TraceRequest)
    given = request.config, request.precision
    more = request.attention, request.capability
    answer: Any = trace(*given, request.workloads, *more) if request.workloads else record(*given, *more, check=request.check)
    sys.stdout.buffer.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    main()
