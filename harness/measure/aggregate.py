"""From the worker's answers to the metrics of a result: pure arithmetic on raw samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from harness.core.records import Loaded, Phase
from harness.core.units import format_share
from harness.measure.protocol import GenerateDone, LoadDone

GENERATING = ("load", "cold", "warm")
_NOISY_SHARE = 0.10  # pyperf's limit: a standard deviation of 10 % of the mean
_P95_NEEDS = 20  # with fewer samples than 1 / (1 - 0.95) the percentile is just the maximum


def of_load(done: LoadDone) -> dict[str, float]:
    """Return the seconds of loading, and the bytes that stay on the disk if any do."""
    figures = dict(done.seconds)
    on_disk = done.loaded.tier_bytes.get("disk", 0)
    return figures | ({"disk_bytes": on_disk} if on_disk else {})


def samples(rounds: Sequence[GenerateDone]) -> dict[str, list[float]]:
    """Return the raw samples of the warm rounds, one a round, and the times between all their tokens.

    A round of several generations counts as their mean. One that stopped at its first token has no speed of decoding.
    """
    firsts = [statistics.fmean(times[0] for times in done.generations) for done in rounds]
    return {
        "warm_first_token_s": firsts,
        "prefill_tok_s": [done.prompt_tokens * done.batch / first for done, first in zip(rounds, firsts, strict=True)],
        "decode_tok_s": [decode_tok_s(done) for done in rounds if len(done.token_s) > 1],
        "token_s": [later - earlier for done in rounds for times in done.generations for earlier, later in pairwise(times)],
        "round_s": [done.total_s for done in rounds],
    }


def decode_tok_s(done: GenerateDone) -> float:
    """Return batch x (new tokens - 1) / (last token - first token), over all generations of the round."""
    span = sum(times[-1] - times[0] for times in done.generations)
    return done.batch * sum(len(times) - 1 for times in done.generations) / span


def of_rounds(cold: GenerateDone | None, warm: Sequence[GenerateDone], *, asked: int | None = None) -> dict[str, float]:
    """Return the metrics of speed: the cold round's first token, and the medians of the warm rounds.

    Energy is that of a generation, the mean of these rounds, times as many as were `asked` for: more may have run, and fewer may
    count.
    """
    figures: dict[str, float] = {}
    if cold is not None:
        figures["first_token_s"] = cold.token_s[0]
    if not warm:
        return figures
    raw = samples(warm)
    for key in ("warm_first_token_s", "prefill_tok_s", "decode_tok_s"):
        if raw[key]:
            figures[key] = statistics.median(raw[key])
    if tokens := sorted(raw["token_s"]):
        figures["token_p50_s"] = statistics.median(tokens)
    if len(tokens) >= _P95_NEEDS:
        figures["token_p95_s"] = tokens[math.ceil(0.95 * len(tokens)) - 1]
    energy = [done.energy_j / len(done.generations) for done in warm if done.energy_j is not None]
    if len(energy) == len(warm):
        figures["energy_j"] = statistics.fmean(energy) * (len(energy) if asked is None else asked)
    return figures


def of_phases(phases: Sequence[Phase]) -> dict[str, float]:
    """Return the peaks of memory over loading and generating; the probe is ours, not the user's, and does not count."""
    counted = [phase for phase in phases if phase.name in GENERATING]
    loading = [phase for phase in counted if phase.name == "load"]
    figures = {
        "ram_peak_bytes": _highest(phase.ram_peak_bytes for phase in counted),
        "ram_anon_peak_bytes": _highest(phase.ram_anon_bytes for phase in counted),
        "load_ram_peak_bytes": _highest(phase.ram_peak_bytes for phase in loading),
        "vram_peak_bytes": _highest(size for phase in counted for size in phase.vram_peak_bytes.values()),
        "load_vram_peak_bytes": _highest(size for phase in loading for size in phase.vram_peak_bytes.values()),
    }
    return {key: value for key, value in figures.items() if value is not None}


def rereads(phases: Sequence[Phase], passes: int) -> dict[str, float]:
    """Return what a token reads from the disk in the warm rounds of this many passes each; nothing if it reads none."""
    warm = [phase.disk_read_bytes for phase in phases if phase.name == "warm" and phase.disk_read_bytes is not None]
    read = statistics.median(warm) / passes if warm else 0.0
    return {"token_disk_bytes": read} if read else {}


def _highest(values: Iterable[int | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def ready(figures: Mapping[str, float]) -> dict[str, float]:
    """Return ready_s where both of its parts are there."""
    if "load_s" in figures and "first_token_s" in figures:
        return {"ready_s": figures["load_s"] + figures["first_token_s"]}
    return {}


def noise(raw: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Say which figures are noisy: those whose standard deviation is a tenth of the mean or more."""
    found = {}
    for key in ("decode_tok_s", "warm_first_token_s", "prefill_tok_s"):
        values = raw.get(key, ())
        if len(values) >= 2 and (share := statistics.stdev(values) / statistics.fmean(values)) >= _NOISY_SHARE:
            found[key] = f"standard deviation {format_share(share)} of the mean over {len(values)} rounds"
    return found


def dtype_share(loaded: Loaded, dtype: str) -> float:
    """Return the share of the bytes of Linear weights that have `dtype`; 1.0 when there are none."""
    total = sum(loaded.linear_dtype_bytes.values())
    return loaded.linear_dtype_bytes.get(dtype, 0) / total if total else 1.0
