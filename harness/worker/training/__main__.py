"""Say what one step of training holds on a card that is not there.

python -m harness.worker.training < {"config": {...}, "setup": {"method": "lora", ...}, "capability": "8.0"} > step.json
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import torch
import transformers

import harness.models  # noqa: F401 registers our own architectures
from harness.core.records import Record
from harness.core.training.setup import TrainingSetup
from harness.worker.training.step import trace_step


class StepRequest(Record, frozen=True, kw_only=True):
    """What a step is asked for."""

    config: dict[str, Any]
    setup: TrainingSetup
    capability: str


def main() -> None:
    """Answer one request from the standard input."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=StepRequest)
    sys.stdout.buffer.write(msgspec.json.encode(trace_step(asked.config, asked.setup, asked.capability)))


if __name__ == "__main__":
    main()
