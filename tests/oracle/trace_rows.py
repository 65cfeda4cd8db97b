"""Trace the models of the catalog at many sizes and write tests/data/traced_rows.csv.

    python -m tests.oracle.trace_rows [MODEL ...]    # these models anew, or all that the file lacks

The first and the last layer of every kind run; the KV cache of the layers left out is added where it would be alive. Nothing of
the records is used (`harness.architecture.traced_memory`), so that they can be held against these rows. Takes seconds a row.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import transformers

import harness.models  # noqa: F401 registers our own architectures
from harness.architecture import traces
from harness.architecture.card_kernels import WITH_FLASH, kernels_of
from harness.catalog import shipped
from harness.core.precisions import PRECISIONS as TABLE
from harness.worker.trace import fake_model, kernels, workload
from harness.worker.trace.fake_model import Layers
from harness.worker.trace.ledger import CARD, GRAIN, Ledger, fake_card
from harness.worker.trace.workload import Trace
from tests.oracle import rows
from tests.oracle.rows import Row

PROMPTS, BATCHES, NEW_TOKENS = (64, 501, 2048, 4000, 8192, 32768), (1, 8), 3
PRECISIONS = ("bf16", "int8", "int4")
# Of the other precisions, which hold what one of these does in other widths, a size or two.
MORE = {"fp16": ((1, 2048), (8, 4000)), "fp32": ((1, 501), (4, 2048))}


class Whole(NamedTuple):
    """A model of which some layers are kept: its weights, the kind of every layer, and which are there."""

    weights_bytes: int
    kinds: tuple[int, ...]
    kept: tuple[int, ...]


class Peak(NamedTuple):
    """What one workload holds: the final KV cache, and the most of each pass, weights included."""

    kv_bytes: int
    passes: tuple[int, ...]


def main() -> None:
    """Write the rows of the models that are named, or of those that have none yet."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    named = [shipped.hub_id(name) for name in sys.argv[1:]]
    done = {row.model for row in _written()}
    for model in named or [model for model in models() if _short(model) not in done]:
        before = [row for row in _written() if row.model != _short(model)]
        made = list(traced(model))
        rows.write(sorted([*before, *made], key=lambda row: (row.model, row.precision, row.placement, row.size)))
        print(f"{model}: {len(made)} rows", flush=True)


def _written() -> list[Row]:
    return rows.read() if rows.ROWS.exists() else []


def _short(model: str) -> str:
    return model.rpartition("/")[2].lower()


def models() -> list[str]:
    """Name one model of the catalog for each shape; the first of every architecture come before the others."""
    first: dict[str, str] = {}
    for name, model in shipped.catalog().items():
        first.setdefault(traces.key_of(model.config), name)
    kinds = [shipped.catalog()[name].config["model_type"] for name in first.values()]
    return [name for _, name in sorted(zip((kinds[:at].count(kind) for at, kind in enumerate(kinds)), first.values(), strict=True))]


def traced(model: str) -> Iterator[Row]:
    """Yield the rows of one model in every precision that can be traced."""
    config = shipped.catalog()[model].config
    usual = tuple((batch, prompt) for prompt in PROMPTS for batch in BATCHES)
    for precision, sizes in {**dict.fromkeys(PRECISIONS, usual), **MORE}.items():
        if config.get("quantization_config") and TABLE[precision].quantizes:
            continue  # what is quantized already is not quantized again
        try:
            context = _context(config)
            fitting = [(batch, prompt, NEW_TOKENS) for batch, prompt in sizes if prompt + NEW_TOKENS <= context]
            yield from placed_rows(model, config, precision, fitting)
        except (ValueError, TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
            print(f"{model} {precision}: not traced: {str(error).splitlines()[0][:200]}", flush=True)


def _context(config: Mapping[str, Any]) -> int:
    from harness.worker.build_skeleton import read_model_config

    text = read_model_config(config).get_text_config(decoder=True)
    return int(getattr(text, "max_position_embeddings", None) or getattr(text, "max_sequence_length", None) or 1 << 15)


def placed_rows(model: str, config: Mapping[str, Any], precision: str, sizes: Sequence[tuple[int, int, int]]) -> Iterator[Row]:
    """Yield a row for each batch, prompt and number of new tokens on a card that holds the whole model."""
    card = kernels_of(WITH_FLASH)
    fake = fake_model.build_fake(config, precision)
    with fake_card({}, card.capability) as ledger:
        fake_model.place_on_card(fake)
        whole, layers = cut(ledger, fake)
        gc.collect()
        gc.freeze()
        with kernels.chosen_as_on(card, ledger, whole=False):
            workload.run(ledger, fake, layers, 1, 3, 2)  # what is made once and kept, such as tables of positions
            for size in sizes:
                run = workload.run(ledger, fake, layers, *size)
                yield _row(model, fake, precision, size, whole, run)
    gc.unfreeze()


def _row(model: str, fake: Any, precision: str, size: tuple[int, int, int], whole: Whole, run: Trace) -> Row:
    peak = peak_of(run, whole)
    return Row(
        model=_short(model),
        architecture=fake.config.model_type,
        precision=precision,
        placement="direct",
        tier="gpu:0",
        prompt_tokens=size[1],
        batch=size[0],
        new_tokens=size[2],
        weights_bytes=whole.weights_bytes,
        kv_bytes=peak.kv_bytes,
        peak_bytes=max(peak.passes),
        peak_in="prefill" if peak.passes[0] == max(peak.passes) else "decode",
    )


def cut(ledger: Ledger, fake: Any) -> tuple[Whole, Layers | None]:
    """Leave the first and the last layer of every kind in a placed model, and say what it was."""
    weights, layers = ledger.live[CARD], fake_model.layers_of(fake)
    if layers is None:
        return Whole(weights, (), ()), None
    chosen = tuple(fake_model.representatives(layers.kinds))
    return Whole(weights, layers.kinds, chosen), fake_model.keep(fake, layers, chosen)


def peak_of(run: Trace, whole: Whole) -> Peak:
    """Follow a run's events and add, at each, the KV cache of the layers that are left out.

    Raises:
        ValueError: the cache has other layers than the model.
    """
    rounded = _left_out(run, whole, _grains)
    live, most = 0, list[int]()
    for number, (start, end) in enumerate(pairwise([*run.passes, len(run.events)])):
        highest = 0
        for event in run.events[start:end]:
            made = run.allocations[max(event, ~event)]
            live += _grains(made.nbytes) if event >= 0 else -_grains(made.nbytes)
            highest = max(highest, live + rounded.at(number, made.layer) if event >= 0 else 0)
        most.append(whole.weights_bytes + highest)
    asked = _left_out(run, whole, int)
    return Peak(asked.at(len(most) - 1, len(whole.kept)) + sum(asked.per_layer[-1]), tuple(most))


def _left_out(run: Trace, whole: Whole, size: Callable[[int], int]) -> LeftOut:
    per_layer = [[sum(size(run.allocations[number].nbytes) for number in layer) for layer in layers] for layers in run.cached]
    if whole.kept and len(per_layer[-1]) != len(whole.kept):
        raise ValueError(f"a cache of {len(per_layer[-1])} layers where {len(whole.kept)} run")
    return LeftOut(whole, per_layer)


class LeftOut:
    """The KV cache of the layers that do not run, as large as that of one that does and is alike."""

    def __init__(self, whole: Whole, per_layer: Sequence[Sequence[int]]) -> None:
        self._whole, self.per_layer = whole, per_layer
        self._like = [whole.kept.index(whole.kinds.index(kind)) for kind in whole.kinds]
        self._out = sorted(set(range(len(whole.kinds))) - set(whole.kept))

    def at(self, number: int, layer: int) -> int:
        """Return its bytes in a pass while a layer that is kept runs: the new tokens are in the layers before that one."""
        before = self.per_layer[number - 1] if number else [0] * len(self._whole.kept)
        after, count = self.per_layer[number], len(self._whole.kept)
        here = -1 if layer < 0 else self._whole.kept[layer] if layer < count else len(self._whole.kinds)
        return sum((after if index < here else before)[self._like[index]] for index in self._out)


def _grains(nbytes: int) -> int:
    return -(-nbytes // GRAIN) * GRAIN


if __name__ == "__main__":
    main()
