"""What torch's allocator needs and keeps, planned against replayed.

Workloads of other sizes than those that records rest on are traced, and their allocations run through the model of the allocator
(`harness.worker.trace.allocator`): nothing here ran on a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from statistics import median, quantiles
from typing import NamedTuple

import pytest
import torch

import harness.models  # noqa: F401 registers our own architectures
from harness.architecture.card_kernels import WITH_FLASH, kernels_of
from harness.catalog.shipped import catalog, hub_id
from harness.core.records import Case, Workload
from harness.planning.calibration import Bytes
from harness.worker.trace import fake_model, kernels, workload
from harness.worker.trace.ledger import fake_card
from harness.worker.trace.reserve import GENERATED, ReplayedWorkload, Weights, replay_workload
from harness.worker.trace.whole import stand_ins
from tests.oracle.oracle_peaks import planner, spec
from tests.support.reporting import Figure, Section, table

# With and without grouped heads, sliding windows, experts, latent or linear attention, scores in memory.
MODELS = (
    "llama-3.1-8b-instruct",
    "gemma-3-4b-it",
    "qwen3-30b-a3b",
    "phi-2",
    "codegen-6b-mono",
    "glm-4-9b-chat-hf",
    "gemma-2-9b-it",
    "deepseek-v2-lite-chat",
    "qwen3.5-27b",
)
SIZES = ((1, 1900), (3, 2048), (8, 900))  # batch, prompt: none of those in `reserve`
WITHIN = {"median": 0.01, "90th percentile": 0.05}


class Compared(NamedTuple):
    """One workload: what was replayed and what was planned, weights included."""

    model: str
    size: tuple[int, int]
    allocator: str
    replayed: int
    planned: Bytes

    @property
    def error(self) -> float:
        return self.planned.best / self.replayed - 1


def replays(model: str) -> Iterator[ReplayedWorkload]:
    """Trace and replay the workloads of one model in bf16."""
    torch.set_num_threads(1)
    card, fake = kernels_of(WITH_FLASH), fake_model.build_fake(catalog()[hub_id(model)].config, "bf16")
    with fake_card({}, card.capability) as ledger, kernels.chosen_as_on(card, ledger, whole=False):
        fake_model.place_on_card(fake)
        weights, layers = Weights.on(ledger), fake_model.layers_of(fake)
        assert layers is not None
        traced = fake_model.representatives(layers.kinds)
        kept = fake_model.keep(fake, layers, traced)
        workload.run(ledger, fake, kept, 1, 3, 2)
        for size in SIZES:
            yield replay_workload(ledger, fake, kept, stand_ins(layers.kinds, traced), weights, (*size, GENERATED))


def planned(model: str, size: tuple[int, int], *, expandable: bool) -> Bytes:
    """Return what a plan says of weights, KV cache, activations and what the allocator needs beyond."""
    load = Workload(batch=size[0], prompt_tokens=size[1], new_tokens=GENERATED)
    case = Case(model=spec(model).name, precision="bf16", placement="direct", workload=load)
    planner(model).plan(case)
    footprint = planner(model).footprints[case.id]
    terms = (footprint.with_expandable_segments if expandable else footprint).terms()["gpu:0"]
    held = float(terms.weights + terms.kv)
    return Bytes(low=held, best=held, high=held) + terms.activation + terms.fragments


@cache
def compared() -> list[Compared]:
    return [
        Compared(model, size, name, replayed.least, planned(model, size, expandable=name == "expandable segments"))
        for model in MODELS
        for size, one in zip(SIZES, replays(model), strict=True)
        for name, replayed in (("usual segments", one.usual), ("expandable segments", one.expandable))
    ]


@pytest.mark.parametrize("allocator", ["usual segments", "expandable segments"])
def test_the_least_limit_is_planned(allocator: str, figures: list[Figure]) -> None:
    rows = [row for row in compared() if row.allocator == allocator]
    off = [abs(row.error) for row in rows]
    found = {"median": median(off), "90th percentile": quantiles(off, n=10)[8]}
    figures.append(
        Figure(
            what=f"least limit with {allocator}, weights included, plan against replay: median, 90th percentile, worst",
            found=f"{found['median']:.2%}, {found['90th percentile']:.2%}, {max(off):.2%}",
            wanted="1 %, 5 %",
            rows=len(rows),
        )
    )
    assert all(found[name] <= most for name, most in WITHIN.items())


def test_few_replays_lie_above_the_interval(figures: list[Figure], section: Section) -> None:
    above = [row for row in compared() if row.replayed > row.planned.high]
    figures.append(
        Figure(what="replayed limits above the plan's upper bound", found=str(len(above)), wanted="5 %", rows=len(compared()))
    )
    lines = [
        (row.model, f"{row.size[0]} x {row.size[1]}", row.allocator, f"{row.replayed / 1e9:.2f}", f"{row.error:+.2%}")
        for row in compared()
    ]
    section.notes.append("\n".join(table(["model", "batch x prompt", "allocator", "replayed, GB", "error"], lines)))
    assert len(above) <= 0.05 * len(compared())
