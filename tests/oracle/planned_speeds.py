"""Answer how fast this revision plans what was published or measured: the gate's other question.

    PYTHONPATH=TREE python tests/oracle/planned_speeds.py < questions > answers

A question is a JSON object on a line: {"published": a row of published_figures.csv} or {"result": a result as it is stored}. Its
answer is an object of [low, best, high] by figure, or null where nothing is planned; the first line says where the code lies.
Nothing beside `harness`, msgspec and the standard library is imported, and of `harness` only what plans.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec

import harness
from harness.architecture import model_spec
from harness.architecture.model_spec import ModelSpec
from harness.catalog import resolve
from harness.core.errors import UsageError
from harness.core.records import Machine, Result, Span, Workload
from harness.machine.gpus import profile
from harness.planning import calibration
from harness.planning.cost.estimate import estimate
from harness.planning.cost.footprint import Footprint
from harness.planning.cost.inventory import Inventory
from harness.planning.cost.memory import WeightFormat
from harness.planning.planner import Planner

# Bits a weight of a Linear with 16-bit scales and zeros of groups of 128; FP8 has a float32 for 128 x 128.
PACKED = {
    "BF16": None,
    "FP8": 8 + 32 / 128**2,
    "GPTQ-Int8": 8 + 24 / 128,
    "GPTQ-Int4": 4 + 20 / 128,
    "AWQ": 4 + 20 / 128,
    "AWQ-INT4": 4 + 20 / 128,
}
CARDS = {"A100-80GB": "A100 80GB", "H20-96GB": "H20"}
MEASURED = ("load_s", "first_token_s", "decode_tok_s")


@cache
def spec(model: str) -> ModelSpec:
    """Read what is known of a model of the catalog."""
    return model_spec.read_spec(resolve.resolve(model))


def published(row: Mapping[str, str]) -> Span:
    """Plan what was measured: all the seconds, by the tokens that were made, or on the H20 by those of the prompt as well."""
    load = Workload(prompt_tokens=int(row["input_len"]), new_tokens=int(row["gen_len"]))
    bits = PACKED[row["quant"]]
    dtype = "bfloat16" if bits is None else "float16"
    held = WeightFormat(dtype=dtype, packed_bits=bits, in_blocks=row["quant"] == "FP8")
    footprint = Footprint(Inventory(spec(f"Qwen/{row['model']}"), held), "gpu:0", load, calibration.default())
    found = estimate(footprint, "bf16", profile([CARDS[row["gpu"]]]))
    counted = load.new_tokens + (load.prompt_tokens if "(prompt+generated)" in row["env"] else 0)
    first, decode, more = found.first_token_s, found.decode_tok_s, load.new_tokens - 1
    return Span(
        low=counted / (first.high + more / decode.low),
        best=counted / (first.best + more / decode.best),
        high=counted / (first.low + more / decode.high),
    )


@cache
def _planner(model: str, machine: bytes) -> Planner:
    return Planner(spec(model), msgspec.json.decode(machine, type=Machine))


def measured(result: Result) -> dict[str, Span] | None:
    """Plan the case of a result for the machine that it ran on, by the constants of the package alone."""
    try:
        planner = _planner(result.case.model, msgspec.json.encode(result.machine))
    except UsageError:  # of files of one's own, which the catalog does not know
        return None
    found = planner.plan(msgspec.structs.replace(result.case, model=planner.spec.name)).estimate
    return {figure: getattr(found, figure) for figure in MEASURED} if found is not None else None


def answer(asked: Mapping[str, Any]) -> dict[str, Span] | None:
    """Plan one question and return its spans by figure."""
    if "published" in asked:
        return {"tokens_per_s": published(asked["published"])}
    return measured(msgspec.convert(asked["result"], type=Result, strict=False))


def main() -> None:
    """Answer line by line."""
    print(json.dumps({"harness": harness.__file__}))
    for line in sys.stdin:
        found = answer(json.loads(line))
        spans = {name: [span.low, span.best, span.high] for name, span in found.items()} if found else None
        print(json.dumps(spans))


if __name__ == "__main__":
    main()
