"""Trace what `trace_rows` leaves out and write tests/data/traced_placements.csv: loading, split models, long generations.

    python -m tests.oracle.trace_placements

Splits are those that the plan computes: transformers' own loader puts a hollow checkpoint of full size where the plan says, with
accelerate's hooks, and all its layers run. Takes a minute a model.
"""

from __future__ import annotations

import gc
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import harness.models  # noqa: F401 registers our own architectures
from harness.catalog import shipped
from harness.core.precisions import PRECISIONS
from harness.core.records import Case, Workload
from harness.worker.trace import fake_model, workload
from harness.worker.trace.ledger import Ledger
from harness.worker.trace.load import Cards, Loader, loaded, trace_load
from harness.worker.trace.workload import Trace
from tests.oracle import planned_rows, rows, trace_rows
from tests.oracle.rows import Row
from tests.support import hollow

# What tells rows apart: model, precision, placement, cards, size.
Done = tuple[str, str, str, str, tuple[int, int, int]]
CAPABILITY = "8.0"
LONG = ((16, 8, 16),)  # batch, prompt, new tokens
LOADING = (1, 8, 1)


class Split(NamedTuple):
    """A model on cards that do not hold it alone, or on one that it shares with the RAM; batch, prompt and new tokens."""

    model: str
    cards: str
    placement: str
    size: tuple[int, int, int] = (1, 2048, 3)


SPLITS = (
    Split("meta-llama/Llama-3.1-8B-Instruct", "16GiB+16GiB", "auto"),
    Split("meta-llama/Llama-3.1-8B-Instruct", "12GiB", "gpu+cpu", (4, 1500, 3)),
    Split("Qwen/Qwen3-8B", "12GiB+12GiB", "recommended"),
    Split("Qwen/Qwen3-8B", "12GiB+12GiB+12GiB", "balanced_low_0", (4, 1500, 3)),
    Split("google/gemma-2-9b-it", "16GiB+16GiB", "sequential"),
    Split("google/gemma-2-9b-it", "14GiB", "gpu+cpu", (4, 1500, 3)),
    Split("google/gemma-3-4b-it", "8GiB+8GiB", "auto"),
    Split("microsoft/phi-2", "6GiB+6GiB", "auto", (4, 1500, 3)),
    Split("microsoft/phi-2", "5GiB", "gpu+cpu"),
    Split("deepseek-ai/DeepSeek-V2-Lite-Chat", "24GiB+24GiB", "auto", (4, 1500, 3)),
)
LOADED = ("meta-llama/Llama-3.1-8B-Instruct", "google/gemma-2-2b-it", "deepseek-ai/DeepSeek-V2-Lite-Chat", "Qwen/Qwen3-30B-A3B")
GENERATING = ("meta-llama/Llama-3.1-8B-Instruct", "google/gemma-3-4b-it", "microsoft/phi-2", "Qwen/Qwen3-30B-A3B")


def main() -> None:
    """Write the rows that the file lacks."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made = rows.read(rows.PLACED) if rows.PLACED.exists() else []
    with tempfile.TemporaryDirectory(prefix="hollow-") as folder:
        done = {(row.model, row.precision, row.placement, row.cards, row.size) for row in made}
        for row in chain(_splits(Path(folder), done), _loads(Path(folder), done), _long(done)):
            print(row.model, row.precision, row.placement, row.tier, row.size, flush=True)
            made.append(row)
            rows.write(made, rows.PLACED)


def _long(done: Set[Done]) -> Iterator[Row]:
    """Yield generations of many tokens, whose worst moment is their last step."""
    for model in GENERATING:
        lacking = [size for size in LONG if (_short(model), "bf16", "direct", "2000GiB", size) not in done]
        if lacking:
            yield from trace_rows.placed_rows(model, shipped.catalog()[model].config, "bf16", lacking)


def _loads(root: Path, done: Set[Done]) -> Iterator[Row]:
    """Yield what a card holds at most while a model is loaded onto it."""
    for model in LOADED:
        folder, kind = _folder(root, model)
        for precision in ("bf16", "int8", "int4"):
            if (_short(model), precision, "direct", "2000GiB", LOADING) in done:
                continue
            (found,) = trace_load(folder, precision, {"": 0}, Cards(capability="9.0"), ahead=not PRECISIONS[precision].quantizes)
            batch, prompt, new = LOADING
            yield Row(
                model=_short(model),
                architecture=kind,
                precision=precision,
                placement="direct",
                tier="gpu:0",
                batch=batch,
                prompt_tokens=prompt,
                new_tokens=new,
                weights_bytes=found.held_bytes,
                kv_bytes=0,
                peak_bytes=0,
                peak_in="load",
                load_peak_bytes=found.peak_bytes,
            )


def _splits(root: Path, done: Set[Done]) -> Iterator[Row]:
    """Yield what each card holds of a model that is split."""
    for split in SPLITS:
        if (_short(split.model), "bf16", split.placement, split.cards, split.size) in done:
            continue
        folder, kind = _folder(root, split.model)
        cards, loader = Cards(count=len(split.cards.split("+")), capability=CAPABILITY), Loader(ahead=True, dispatches=True)
        with loaded(folder, "bf16", _map(split), cards, loader) as (ledger, model):
            yield from _on_each(split, kind, ledger, model)
            del model
        gc.collect()


def _on_each(split: Split, kind: str, ledger: Ledger, model: Any) -> Iterator[Row]:
    """Run a workload and yield what each card held."""
    held, loading = dict(ledger.live), dict(ledger.peak)
    run = workload.run(ledger, model, fake_model.layers_of(model), *split.size)
    cached = _cached(run)
    for device in sorted((one for one in held if one.type == "cuda" and held[one]), key=lambda one: one.index):
        yield Row(
            model=_short(split.model),
            architecture=kind,
            precision="bf16",
            placement=split.placement,
            tier=f"gpu:{device.index}",
            batch=split.size[0],
            prompt_tokens=split.size[1],
            new_tokens=split.size[2],
            weights_bytes=held[device],
            kv_bytes=cached[device],
            peak_bytes=ledger.peak[device],
            peak_in="unknown",
            cards=split.cards,
            load_peak_bytes=loading[device],
        )


def _cached(run: Trace) -> Counter[torch.device]:
    """Count the bytes of the final KV cache by device."""
    found = Counter[torch.device]()
    for layer in run.cached[-1]:
        for number in layer:
            found[run.allocations[number].device] += run.allocations[number].nbytes
    return found


def _map(split: Split) -> dict[str, Any]:
    """Return the device map of the plan, as from_pretrained takes it."""
    batch, prompt, new = split.size
    load = Workload(batch=batch, prompt_tokens=prompt, new_tokens=new)
    case = Case(model=planned_rows.spec(split.model).name, precision="bf16", placement=split.placement, workload=load)
    homes = planned_rows.planner(split.model, split.cards).plan(case).device_map
    assert isinstance(homes, Mapping)
    return {path: int(str(home).partition(":")[2]) if str(home).startswith("gpu") else home for path, home in homes.items()}


def _folder(root: Path, model: str) -> tuple[Path, str]:
    """Return the hollow checkpoint of a model of the catalog, and its model type."""
    config, folder = shipped.catalog()[model].config, root / _short(model)
    return folder if folder.exists() else hollow.write(folder, config), config["model_type"]


def _short(model: str) -> str:
    return model.rpartition("/")[2].lower()


if __name__ == "__main__":
    main()
