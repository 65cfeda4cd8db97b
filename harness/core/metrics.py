"""METRICS: every figure of a result: label, unit, which way is better, how it is measured; and which time until ready one is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from harness.core import units
from harness.core.records import Record, Result

#: How much slower a case may be that needs much less memory or a plainer call: nobody reads a tenth faster, and memory runs out.
UNNOTICED = 0.1

#: What a case does, phase by phase, in words; what keeps the short names are records.
PHASES = {
    "start": "starting",
    "import": "importing libraries",
    "tokenizer": "reading the tokenizer",
    "load": "loading",
    "cold": "cold round",
    "warm": "warm round",
    "score": "quality probe",
    "chat": "chatting",
}


def phase_title(name: str) -> str:
    """Say in words what a case does; a phase of a later version is called as it says."""
    return PHASES.get(name, name)


UNTIL_READY = ("load", "cold")  #: the phases whose times add up to `ready_s`
SOME = 0.1  #: of the files: what is read by chance, as code of libraries is, is less
#: When a model was ready so, by where its files came from, the disk or the page cache: as plans say.
AT_FIRST, AGAIN = "at first", "again"
READY_NAMES = {"": "ready", AT_FIRST: "ready at first", AGAIN: "ready again"}
_DENSEST = 8  # times the bytes in the file that a weight takes in RAM at most: 4 bits that become 32


class Metric(Record, frozen=True, kw_only=True):
    """One row of the table."""

    label: str
    unit: str  #: a key of FORMATTERS
    better: str  #: "lower" or "higher"
    how: str  #: how it is measured


FORMATTERS: Mapping[str, Callable[[float], str]] = {
    "bytes": units.format_size,
    "s": units.format_seconds,
    "tok_s": units.format_rate,
    "share": units.format_share,
    "j": lambda value: f"{units.significant(value)} J",
    "ratio": units.significant,
    "count": lambda value: f"{value:.0f}",
}

METRICS: Mapping[str, Metric] = {
    "load_s": Metric(label="load", unit="s", better="lower", how="wall time of the loading code, imports already done"),
    "first_token_s": Metric(
        label="time to first token",
        unit="s",
        better="lower",
        how="wall time of the first generate() up to its first token, cold: memory-mapped weights are read here",
    ),
    "ready_s": Metric(
        label="ready",
        unit="s",
        better="lower",
        how="load and first token: at first with the files from the disk, again with them in the page cache, where a run tells",
    ),
    "warm_first_token_s": Metric(
        label="time to first token, warm",
        unit="s",
        better="lower",
        how="median over the undisturbed warm rounds, prompt in to first token out",
    ),
    "prefill_tok_s": Metric(
        label="prefill",
        unit="tok_s",
        better="higher",
        how="prompt tokens x batch / warm time to first token, median of the undisturbed warm rounds",
    ),
    "decode_tok_s": Metric(
        label="decode",
        unit="tok_s",
        better="higher",
        how="batch x (new tokens - 1) / (last token - first token), median of the undisturbed warm rounds",
    ),
    "token_p50_s": Metric(
        label="token, median", unit="s", better="lower", how="median time between tokens of the undisturbed warm rounds"
    ),
    "token_p95_s": Metric(
        label="token, 95th percentile",
        unit="s",
        better="lower",
        how="over all tokens of the undisturbed warm rounds; absent below 20 tokens",
    ),
    "ram_needed_bytes": Metric(
        label="RAM needed",
        unit="bytes",
        better="lower",
        how="what must fit: anonymous memory, and the pages of files that every token reads (mapped weights, libraries); the most "
        "over load and generation. Verdicts, filters and rankings go by it",
    ),
    "ram_peak_bytes": Metric(
        label="peak RAM, resident",
        unit="bytes",
        better="lower",
        how="kernel high-water mark (VmHWM) over load and generation; the sum over several processes, minus the file pages that "
        "they share (smaps, after each request)",
    ),
    "ram_anon_peak_bytes": Metric(
        label="peak RAM, anonymous",
        unit="bytes",
        better="lower",
        how="anonymous memory, which the kernel cannot drop; highest of the parent's samples and the ends of phases, summed over "
        "processes",
    ),
    "load_ram_peak_bytes": Metric(label="peak RAM while loading", unit="bytes", better="lower", how="VmHWM of the load phase"),
    "vram_peak_bytes": Metric(
        label="peak VRAM, allocated", unit="bytes", better="lower", how="torch.cuda.max_memory_allocated of the fullest GPU"
    ),
    "vram_process_peak_bytes": Metric(
        label="peak VRAM, process",
        unit="bytes",
        better="lower",
        how="memory of the process as NVML reports it, sampled, of the fullest GPU",
    ),
    "load_vram_peak_bytes": Metric(
        label="peak VRAM while loading",
        unit="bytes",
        better="lower",
        how="torch.cuda.max_memory_allocated of the load phase, of the fullest GPU",
    ),
    "disk_bytes": Metric(label="weights on disk", unit="bytes", better="lower", how="bytes of the parameters that stay on disk"),
    "token_disk_bytes": Metric(
        label="disk reads per token",
        unit="bytes",
        better="lower",
        how="bytes read from disk in the warm rounds / forward passes: mapped weights that do not fit in RAM are read again",
    ),
    "energy_j": Metric(
        label="energy",
        unit="j",
        better="lower",
        how="NVML energy counters of the GPUs that hold weights: mean of the rounds that count, times the rounds requested",
    ),
    "import_s": Metric(
        label="imports", unit="s", better="lower", how="time of the imports that this precision needs beyond torch and transformers"
    ),
    "tokenizer_s": Metric(label="tokenizer", unit="s", better="lower", how="wall time of AutoTokenizer.from_pretrained"),
    "weights_s": Metric(label="weights", unit="s", better="lower", how="part of load that reads (and quantizes) weights"),
    "dispatch_s": Metric(label="dispatch", unit="s", better="lower", how="part of load that moves and hooks modules"),
    "perplexity": Metric(
        label="perplexity", unit="ratio", better="lower", how="exp of the mean negative log-likelihood of the probe's passages"
    ),
    "top1_agreement": Metric(
        label="next-token agreement", unit="share", better="higher", how="share of positions with the reference's most likely token"
    ),
    "kl": Metric(
        label="KL divergence",
        unit="ratio",
        better="lower",
        how="mean KL(reference || this) of the next-token distribution, in nats",
    ),
    "answers_correct": Metric(
        label="answers correct",
        unit="count",
        better="higher",
        how="of the ten short questions of the probe, plus one for a model with tools",
    ),
}
_FORMATTERS: Mapping[str, Callable[[float], str]] = {key: FORMATTERS[metric.unit] for key, metric in METRICS.items()}


def format_metric(key: str, value: float) -> str:
    """Write the value of METRICS[key] with its unit; of another version's metric as a bare number."""
    return formatter(key)(value)


def formatter(key: str) -> Callable[[float], str]:
    """Return what writes the values of a metric."""
    return _FORMATTERS.get(key, units.significant)


def from_disk(result: Result, phases: Collection[str] = UNTIL_READY) -> int | None:
    """Return the bytes that came from the disk in these phases; None if a system does not count them."""
    read = [one.disk_read_bytes for one in result.phases if one.name in phases]
    return sum(size for size in read if size is not None) if read and None not in read else None


def loaded_bytes(result: Result) -> int:
    """Return the bytes of the weights as they were loaded, in RAM and on the GPUs."""
    tiers = result.loaded.tier_bytes if result.loaded else {}
    return sum(size for name, size in tiers.items() if name != "disk")


def when_ready(result: Result) -> str:
    """Return AT_FIRST if the files were read from the disk, AGAIN if they were in the page cache; "" if in part, or not known."""
    read, files = from_disk(result), result.files_bytes
    if read is not None and read < SOME * (files or loaded_bytes(result) / _DENSEST):
        return AGAIN
    return AT_FIRST if read is not None and files and read > (1 - SOME) * files else ""


def read_alike(one: Result, other: Result) -> bool | None:
    """Say whether two runs had as much of the files in the page cache; None if one of them does not tell."""
    first, second = from_disk(one), from_disk(other)
    sizes = [result.files_bytes or loaded_bytes(result) for result in (one, other)]
    if first is None or second is None:
        return None
    return abs(first - second) <= SOME * max(sizes)
