"""Answer what this revision plans for traced rows: the gate's question, put to each revision in a process of its own.

    PYTHONPATH=TREE python tests/oracle/planned_rows.py < questions > answers

A question is a JSON object on a line: model, precision, placement, tier, cards, prompt_tokens, batch, new_tokens. Its answer is an
object of bytes by figure, or null where nothing is planned; the first line answered says where the code lies that answers.
Nothing beside `harness` and the standard library is imported, and of `harness` only what plans.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from typing import Any

import harness
from harness.architecture import model_spec
from harness.architecture.model_spec import ModelSpec
from harness.catalog import resolve
from harness.core.records import Case, Workload
from harness.core.units import GIB
from harness.machine.gpus import profile
from harness.planning import calibration
from harness.planning.planner import Planner

RAM_BYTES = 4000 * GIB
CONTEXT_BYTES = int(sum(calibration.default()[name].best for name in ("gpu_context_bytes", "gpu_workspace_bytes")))


@cache
def spec(model: str) -> ModelSpec:
    """Read what is known of a model of the catalog."""
    return model_spec.read_spec(resolve.resolve(model))


@cache
def planner(model: str, cards: str) -> Planner:
    """Return the planner of a model on cards of these sizes, such as "24GiB+24GiB"."""
    return Planner(spec(model), profile(cards.split("+"), ram=RAM_BYTES), here=False)


def answer(asked: dict[str, Any]) -> dict[str, int] | None:
    """Plan one row and return its bytes by figure."""
    model, size = asked["model"], {name: asked[name] for name in ("prompt_tokens", "batch", "new_tokens")}
    case = Case(model=spec(model).name, precision=asked["precision"], placement=asked["placement"], workload=Workload(**size))
    found = planner(model, asked["cards"]).plan(case).estimate
    tier = found.tiers.get(asked["tier"]) if found is not None else None
    if tier is None:
        return None
    loading = tier.load_peak_bytes - CONTEXT_BYTES
    return {"weights": tier.weights_bytes, "kv": tier.kv_bytes, "allocated": tier.allocated_bytes, "load": loading}


def main() -> None:
    """Answer line by line."""
    print(json.dumps({"harness": harness.__file__}))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))))


if __name__ == "__main__":
    main()
