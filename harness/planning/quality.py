"""How much quality a way of loading keeps: measured on the model itself, else on similar ones, else by the tables' rule of thumb.

What a run measures is the share of next tokens that agree with those of its 16-bit reference (`top1_agreement`). Only what packs
weights or the KV cache is looked up: wider forms differ by rounding alone. Weights that stay packed as the checkpoint stores them
lose nothing, for the wider forms of it are unpacked from the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from harness.architecture.model_spec import ModelSpec
from harness.core.attention import KV_FORMS
from harness.core.precisions import PRECISIONS
from harness.core.records import USUAL_KV, Case, Outcome, Plan, Record, Result

AGREEMENT = "top1_agreement"
SIMILAR = 4.0  # models of one class whose sizes differ by less lose about as much
ON_MODEL, ON_SIMILAR, AS_STORED = "measured", "similar models", "as stored"

_Way = tuple[str, str]  # precision and form of the KV cache


class KnownQuality(Record, frozen=True, kw_only=True):
    """Shares of next tokens that stay as they were: of `own` by ways of this model, of `others` by those of similar ones.

    `stored` are the precisions that keep the weights as the checkpoint packs them.
    """

    own: Mapping[_Way, float] = {}
    others: Mapping[_Way, float] = {}
    stored: frozenset[str] = frozenset()

    def of(self, case: Case) -> tuple[float, str] | None:
        """Return the share that a case keeps and how that is known; of a cache that was not the rule, beside such weights."""
        for way, beside in (((case.precision, case.kv), 1.0), ((case.precision, USUAL_KV), KV_FORMS[case.kv].quality_kept)):
            for found, where in ((self.own, ON_MODEL), (self.others, ON_SIMILAR)):
                if way in found:
                    return found[way] * beside, where
        return (KV_FORMS[case.kv].quality_kept, AS_STORED) if case.precision in self.stored else None


def known_quality(spec: ModelSpec, results: Iterable[Result] = ()) -> KnownQuality:
    """Return what is known of the quality that ways of loading a model keep: by results, the median where there are several."""
    own, others = defaultdict[_Way, list[float]](list), defaultdict[_Way, list[float]](list)
    for result in results:
        share, way = result.metrics.get(AGREEMENT), (result.case.precision, result.case.kv)
        if share is None or result.outcome is not Outcome.OK or result.weights != "real" or not _packs(*way):
            continue
        if result.case.model == spec.name:
            own[way].append(share)
        elif _is_similar(result, spec):
            others[way].append(share)
    stored = frozenset(name for name, row in PRECISIONS.items() if row.bits < 16 and spec.keeps_packed(row))
    return KnownQuality(own=_medians(own), others=_medians(others), stored=stored)


def _medians(shares: Mapping[_Way, list[float]]) -> dict[_Way, float]:
    if not shares:
        return {}
    from statistics import median  # slow to import

    return {way: median(each) for way, each in shares.items()}


def quality_kept(one: Plan) -> float:
    """Return the share of the answers that stay right: as is known of it, else by the rules of thumb of the tables."""
    return _quality_of(one.case, one.kept_share)


def quality_to_keep(case: Case, known: KnownQuality) -> float:
    """Return what `quality_kept` says of a case once it is planned."""
    found = known.of(case)
    return _quality_of(case, found[0] if found else None)


def _quality_of(case: Case, kept: float | None) -> float:
    return kept if kept is not None else PRECISIONS[case.precision].quality_kept * KV_FORMS[case.kv].quality_kept


def _packs(precision: str, kv: str) -> bool:
    row = PRECISIONS.get(precision)  # of older results, it may be gone
    return row is not None and kv in KV_FORMS and (row.bits < 16 or KV_FORMS[kv].is_quantized)


def _is_similar(result: Result, spec: ModelSpec) -> bool:
    """Say whether a result is of a model of the same class and about the same size, by the weights that were planned for it."""
    if result.loaded is None or result.loaded.model_class != spec.skeleton.model_class or result.estimate is None:
        return False
    weights = sum(tier.weights_bytes for tier in result.estimate.tiers.values())
    parameters = weights * 8 / PRECISIONS[result.case.precision].bits
    return spec.skeleton.parameters / SIMILAR < parameters < spec.skeleton.parameters * SIMILAR
