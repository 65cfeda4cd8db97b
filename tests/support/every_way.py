"""Pairs of model and machine, and every way of loading the one on the other: what a search for the best is held against."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from harness.architecture.model_spec import read_spec
from harness.catalog import resolve
from harness.core.attention import ATTENTIONS, KV_FORMS
from harness.core.placements import FILE, PLACEMENTS, distinct
from harness.core.precisions import PRECISIONS, defaults
from harness.core.records import Case, Plan, Verdict, Workload
from harness.machine.gpus import profile
from harness.planning.choice.recommend import advise_best, advise_usual, worth
from harness.planning.device_map.experts import experts_of
from harness.planning.device_map.infer import Device
from harness.planning.planner import Planner
from harness.planning.quality import quality_kept

GIB = 1 << 30


class Pair(NamedTuple):
    """A model, a machine that is only described, and how much is asked of both."""

    model: str
    cards: tuple[str, ...]
    ram_gib: int
    context: int = 80

    def planner(self, device_map: Mapping[str, Device] | None = None) -> Planner:
        """Return a planner of the model on the machine."""
        machine = profile(list(self.cards), ram=self.ram_gib * GIB)
        return Planner(read_spec(resolve.resolve(self.model)), machine, here=False, device_map=device_map)

    @property
    def workload(self) -> Workload:
        """What is asked: an answer of 16 tokens to a prompt that fills the rest of the context."""
        return Workload(prompt_tokens=self.context - 16, new_tokens=16)

    @property
    def named(self) -> str:
        """The pair in words."""
        return f"{self.model}, {' + '.join(self.cards) or 'no GPU'}, {self.ram_gib} GiB RAM, {self.context:,} tokens"


PAIRS = (
    Pair("smollm2-1.7b-instruct", (), 16),
    Pair("qwen2.5-7b-instruct", (), 16),
    Pair("qwen3-30b-a3b", (), 128),
    Pair("llama-3.1-8b-instruct", ("RTX 3070",), 16),
    Pair("qwen2.5-7b-instruct", ("RTX 3070",), 32, 8192),
    Pair("qwen2.5-14b-instruct", ("RTX 3070",), 32),
    Pair("qwen3-30b-a3b", ("RTX 3070",), 64),
    Pair("gemma-2-9b-it", ("RTX 3070",), 32),
    Pair("mistral-7b-instruct-v0.3", ("8GiB",), 16),
    Pair("gpt-oss-20b", ("8GiB",), 32),
    Pair("moss-moon-003-sft-int4", ("8GiB",), 32),
    Pair("deepseek-v2-lite-chat", ("RTX 3070",), 64),
    Pair("qwen2.5-7b-instruct", ("RTX 3060 12GB",), 32),
    Pair("qwen2.5-7b-instruct", ("RTX 3060 12GB",), 32, 16384),
    Pair("qwen2.5-14b-instruct", ("RTX 3060 12GB",), 32, 16000),
    Pair("qwen3-14b", ("RTX 3060 12GB",), 64),
    Pair("qwen2.5-32b-instruct", ("RTX 3060 12GB",), 128),
    Pair("mixtral-8x7b-instruct-v0.1", ("RTX 3060 12GB",), 128),
    Pair("gpt-oss-20b", ("RTX 3060 12GB",), 32),
    Pair("moss-moon-003-sft-int8", ("RTX 3060 12GB",), 64),
    Pair("llama-2-13b-chat-hf", ("RTX 4060 Ti 16GB",), 64),
    Pair("phi-4", ("RTX 4060 Ti 16GB",), 32),
    Pair("gemma-3-27b-it", ("RTX 4060 Ti 16GB",), 64),
    Pair("qwen3-30b-a3b", ("RTX 4060 Ti 16GB",), 64),
    Pair("gpt-oss-20b", ("RTX 4060 Ti 16GB",), 32, 32768),
    Pair("mistral-nemo-instruct-2407", ("RTX 4060 Ti 16GB",), 32, 32768),
    Pair("llama-3.1-8b-instruct", ("RTX 4090",), 64, 32000),
    Pair("qwen2.5-32b-instruct", ("RTX 4090",), 64),
    Pair("llama-3.1-70b-instruct", ("RTX 4090",), 128),
    Pair("qwen3-30b-a3b", ("RTX 4090",), 64),
    Pair("mixtral-8x7b-instruct-v0.1", ("RTX 4090",), 128),
    Pair("gpt-oss-120b", ("RTX 4090",), 128),
    Pair("mistral-small-24b-instruct-2501", ("RTX 4090",), 64, 8192),
    Pair("qwen3-30b-a3b-fp8", ("RTX 4090",), 64),
    Pair("gemma-2-9b-it", ("RTX 4060 Ti 16GB", "RTX 3060 12GB"), 64, 4000),
    Pair("qwen2.5-14b-instruct", ("RTX 3060 12GB", "RTX 3060 12GB"), 64),
    Pair("qwen2.5-32b-instruct", ("RTX 4090", "RTX 3060 12GB"), 64),
    Pair("llama-3.1-70b-instruct", ("RTX 4090", "RTX 4090"), 128),
    Pair("qwen3-30b-a3b", ("RTX 4090", "RTX 4090"), 128),
    Pair("mixtral-8x7b-instruct-v0.1", ("RTX 3090", "RTX 3090"), 128),
)


def every_way(pair: Pair) -> Iterator[tuple[Plan, Planner]]:
    """Yield what is planned of every precision, placement, KV cache and attention, and of every number of blocks on the cards."""
    planner = pair.planner()
    gpus = len(planner.machine.gpus)
    places = [name for name in distinct(PLACEMENTS, gpus) if not PLACEMENTS[name].lacks_gpus(gpus)]
    places += ["experts-in-ram"] * (gpus > 0 and bool(experts_of(planner.spec.skeleton)))
    precisions = [row.name for row in PRECISIONS.values() if planner.spec.stored_as or row.requires_checkpoint is None]
    for precision, place, kv, attention in itertools.product(precisions, places, KV_FORMS, (None, *ATTENTIONS)):
        yield planner.plan(_case(pair, precision, place, kv, attention)), planner
    for device_map in _maps(planner) if gpus else ():
        other = pair.planner(device_map)
        for precision in precisions:
            yield other.plan(_case(pair, precision, FILE)), other


def _case(pair: Pair, precision: str, place: str, kv: str = "dynamic", attention: str | None = None) -> Case:
    return Case(model=pair.model, precision=precision, placement=place, workload=pair.workload, kv=kv, attention=attention)


def _maps(planner: Planner) -> Iterator[dict[str, Device]]:
    """Yield a map for every number of blocks on each card, the rest in RAM, with embeddings and head on the first card or not."""
    pieces = planner.spec.skeleton.pieces
    blocks = [piece.path for piece in pieces if piece.whole]
    others = [piece.path for piece in pieces if not piece.whole]
    for counts in _counts(len(blocks), len(planner.machine.gpus)):
        places: list[Device] = [gpu for gpu, count in enumerate(counts) for _ in range(count)]
        near = dict(zip(blocks, [*places, *["cpu"] * (len(blocks) - len(places))], strict=True))
        for beside in (0, "cpu"):
            yield {**dict.fromkeys(others, beside), **near}


def _counts(blocks: int, gpus: int) -> Iterator[Sequence[int]]:
    """Yield how many blocks go to each card: every number on one; on two in steps of a twelfth, for there are thousands."""
    if gpus == 1:
        yield from ((count,) for count in range(blocks + 1))
    else:
        steps = sorted({blocks * part // 12 for part in range(13)})
        yield from ((first, rest) for first in steps for rest in {*steps, blocks - first} if first + rest <= blocks)


class Held(NamedTuple):
    """What a search answers for a pair, beside all that there is; a plan is None where nothing fits."""

    pair: Pair
    searched: Plan | None
    usual: Plan | None  #: what `plan` without options answers
    best: Plan | None  #: of every way, the best by the same measure
    fastest: Plan | None  #: of every way as sure that keeps as much quality
    autos: Mapping[str, Plan]  #: device_map="auto", by precision
    stored: str  #: the precision that the checkpoint has

    @property
    def share(self) -> float:
        """The speed of what was searched for as a share of the fastest that keeps as much; 1 if nothing fits."""
        return speed(self.searched) / speed(self.fastest) if self.fastest else 1.0

    @property
    def gain(self) -> float | None:
        """How many times as fast as `auto` in the precision that is stored, where that fits and leaves something off the cards."""
        auto = self.autos.get(self.stored)
        if auto is None or auto.estimate is None or not auto.verdict.is_good or not self.pair.cards:
            return None
        spills = any(tier.weights_bytes for name, tier in auto.estimate.tiers.items() if not name.startswith("gpu"))
        return speed(self.searched) / speed(auto) if spills else None

    @property
    def lost_to_auto(self) -> float:
        """How many times as fast `auto` is in the same precision, where it fits as surely; 0 if it does not."""
        auto = self.autos.get(self.searched.case.precision) if self.searched else None
        is_sure = auto is not None and self.searched is not None and auto.verdict in (Verdict.FITS, self.searched.verdict)
        return speed(auto) / speed(self.searched) if is_sure and auto is not None and auto.verdict.is_good else 0.0


def speed(one: Plan | None) -> float:
    """Return the tokens/s of a plan."""
    return one.estimate.decode_tok_s.best if one is not None and one.estimate is not None else 0.0


def answered(pair: Pair) -> Plan | None:
    """Return what `plan` without options answers for a pair."""
    source, planner = resolve.resolve(pair.model), pair.planner()
    usual = [
        _case(pair, precision, place)
        for precision in defaults(planner.spec.stored_as)
        for place in distinct(PLACEMENTS, len(planner.machine.gpus))
    ]
    return advise_usual(source, planner, usual).best


def held(pair: Pair) -> Held:
    """Search for the best way of a pair, and hold it against every way."""
    source, planner = resolve.resolve(pair.model), pair.planner()
    stored = defaults(planner.spec.stored_as, ("bf16",))[-1]
    searched = advise_best(source, planner, pair.workload).best
    every = [one for one, _ in every_way(pair)]
    good = [one for one in every if one.verdict is Verdict.FITS] or [one for one in every if one.verdict.is_good]
    kept = [one for one in good if searched and quality_kept(one) >= quality_kept(searched)]
    return Held(
        pair=pair,
        searched=searched,
        usual=answered(pair),
        best=max(good, key=worth, default=None),
        fastest=max(kept, key=speed, default=None),
        autos={one.case.precision: one for one in every if one.case.place == "auto"},
        stored=stored,
    )
