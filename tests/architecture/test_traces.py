"""Records of traced memory: those that are shipped against peaks traced one by one, and finding, building and reading them.

`python -m tests.architecture.test_traces` prints the table of errors.
"""

from __future__ import annotations

import csv
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from harness.architecture import traces
from harness.architecture.ask_worker import ask_worker
from harness.architecture.traced_memory import TracedMemory, evaluate
from harness.catalog.shipped import catalog, hub_id
from harness.core.errors import UsageError

# Peaks of whole models, or of four layers and the cache of all, by another program that traces: transformers 5.23 on a card of 8.0.
ROOT = Path(__file__).parents[2]
PEAKS = Path(__file__).parent.parent / "data" / "traced_peaks.csv"
MEDIAN, NINETY_NINTH = 0.003, 0.02
TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"vocab_size": 96}


class Error(NamedTuple):
    """A row of the file and what the record gives beside it, as a share of the row."""

    model: str
    precision: str
    prompt: int
    batch: int
    weights: float
    kv: float
    peak: float


def errors() -> Iterator[Error]:
    """Hold the shipped records against every row whose model and precision have one."""
    with PEAKS.open(newline="") as rows:
        for row in csv.DictReader(rows):
            record = traces.shipped_trace(catalog()[hub_id(row["model"])].config, row["precision"])
            if record is None:
                continue
            prompt, batch = int(row["prompt_tokens"]), int(row["batch"])
            given = evaluate(record, batch, prompt, int(row["new_tokens"]))
            assert given is not None, row
            pairs = (
                (given.weights_bytes, row["weights_bytes"]),
                (given.kv_bytes, row["kv_bytes"]),
                (given.allocated_bytes, row["peak_allocated_bytes"]),
            )
            yield Error(row["model"], row["precision"], prompt, batch, *(ours / int(traced) - 1 for ours, traced in pairs))


def test_shipped_records_give_the_traced_peaks() -> None:
    found = list(errors())
    assert len(found) > 100
    off = sorted(abs(error.peak) for error in found)
    assert statistics.median(off) <= MEDIAN
    assert off[int(0.99 * (len(off) - 1))] <= NINETY_NINTH
    assert max(abs(error.weights) for error in found) < 0.001
    assert max(abs(error.kv) for error in found) < 0.002


def test_a_record_is_found_and_evaluated_without_decoding_the_others() -> None:
    config = catalog()[hub_id("llama-3.1-8b-instruct")].config
    start = time.process_time()
    record = traces.shipped_trace(config, "bf16")
    assert record is not None
    given = evaluate(record, 1, 2048, 16)
    assert given is not None
    assert given.decode is not None
    assert given.worst is given.prefill
    assert time.process_time() - start < 1


def test_shipped_records_stay_small() -> None:
    assert traces.SHIPPED.stat().st_size < 300_000


def test_a_record_stands_for_another_precision_under_its_own_names() -> None:
    (config,) = [entry.config for name, entry in catalog().items() if name.endswith("Mistral-7B-Instruct-v0.1")]
    record = traces.shipped_trace(config, "bf16")
    assert record is not None
    stands = traces.find({"bf16 8.0": record, "fp16 8.0": "bf16 8.0"}, "fp16", "8.9")
    assert stands is not None
    assert stands.precision == "fp16"
    assert any(" float16[" in name for name in stands.names)
    assert not any(" bfloat16[" in name for name in stands.names)
    given, own = evaluate(stands, 2, 5000, 3), evaluate(record, 2, 5000, 3)
    assert given is not None
    assert own is not None
    assert given.allocated_bytes == own.allocated_bytes


def test_what_is_packed_is_unpacked() -> None:
    line = traces.SHIPPED.read_bytes().splitlines()[0]
    key, records = traces.unpack(line)
    assert traces.unpack(traces.pack(key, records)) == (key, records)
    assert traces.shipped_records(key) == records
    assert traces.shipped_records("0" * 16) == {}


def test_the_peak_grows_with_every_side_of_the_workload() -> None:
    record = traces.shipped_trace(catalog()[hub_id("mistral-7b-instruct-v0.1")].config, "bf16")
    assert record is not None
    for batch, prompt in ((1, 100), (2, 4000), (4, 8192)):
        peaks = [evaluate(record, *load) for load in ((batch, prompt, 8), (2 * batch, prompt, 8), (2 * batch, 2 * prompt, 8))]
        sizes = [peak.allocated_bytes for peak in peaks if peak is not None]
        assert sizes == sorted(sizes)
        assert len(set(sizes)) == 3


def test_an_activation_makes_another_key() -> None:
    assert traces.key_of(TINY) != traces.key_of(TINY | {"hidden_act": "gelu"})
    assert traces.key_of(TINY) == traces.key_of(TINY | {"eos_token_id": 3})


def test_no_worker_runs_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert traces.record_for(TINY, "bf16", tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_record_is_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = traces.build_record(TINY, "bf16", tmp_path)
    assert traces.record_for(TINY, "bf16", tmp_path) == built
    (kept,) = tmp_path.iterdir()
    assert msgspec.json.decode(kept.read_bytes(), type=TracedMemory) == built
    monkeypatch.setattr(traces, "ask_worker", None)  # nobody is asked again
    assert traces.build_record(TINY, "bf16", tmp_path) == built
    assert traces.record_for(TINY, "bf16", tmp_path, "7.5") is None  # on which other kernels run
    monkeypatch.setattr(traces, "_BUILT", {})  # as in another process
    assert traces.record_for(TINY, "bf16", tmp_path, "8.9") == built


def test_a_cache_that_cannot_be_written_only_takes_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = traces.shipped_trace(catalog()[hub_id("phi-2")].config, "bf16")
    monkeypatch.setattr(traces, "ask_worker", lambda *_: msgspec.json.encode(record))
    monkeypatch.setattr(traces, "_BUILT", {})
    cache = tmp_path / "a file"
    cache.touch()
    assert traces.build_record(TINY, "bf16", cache) == record
    assert traces.record_for(TINY, "bf16", cache) == record


def test_a_damaged_record_in_the_cache_is_none(tmp_path: Path) -> None:
    config = TINY | {"num_hidden_layers": 7}
    (tmp_path / traces._name(config, "bf16", "8.0")).write_bytes(b'{"source": ')
    assert traces.record_for(config, "bf16", tmp_path) is None


def test_an_architecture_that_nobody_has_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trace for model_type 'nosuch' in bf16: "):
        traces.build_record({"model_type": "nosuch"}, "bf16", tmp_path)


def main() -> None:
    """Print the errors by model and precision, and over all."""
    groups = defaultdict(list)
    for error in errors():
        groups[error.model, error.precision].append(error)
        groups["all", error.precision].append(error)
        groups["all", "all"].append(error)
    print(f"{'model':28} {'precision':9} {'rows':>4} {'median %':>9} {'p99 %':>8} {'worst %':>8} {'weights %':>9} {'KV %':>8}")
    for (model, precision), group in sorted(groups.items()):
        off = sorted(100 * abs(error.peak) for error in group)
        worst = max((error.peak for error in group), key=abs)
        weights, kv = (max((100 * getattr(error, name) for error in group), key=abs) for name in ("weights", "kv"))
        row = f"{len(off):4} {statistics.median(off):9.4f} {off[int(0.99 * (len(off) - 1))]:8.4f} {100 * worst:+8.4f}"
        print(f"{model:28} {precision:9} {row} {weights:+9.4f} {kv:+8.4f}")


if __name__ == "__main__":
    main()


RAISED = """Traceback (most recent call last):
  File "a.py", line 1, in f
    raise E
KeyError: 'b'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 9, in g
"""


@pytest.mark.starts_workers
@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("kill -SEGV $$", "its process was ended by SIGSEGV"),
        ("echo 'no such model' >&2; exit 1", "no such model"),
        (f"cat >&2 <<'.'\n{RAISED}TypeError: of two lines\n    of which this is one\n.\nexit 1", "TypeError: of two lines"),
        (f"cat >&2 <<'.'\n{RAISED}a.E: in g:\n    KeyError: 'c'\n.\nexit 1", "a.E: in g: KeyError: 'c'"),
        ("exit 9", "no message"),
    ],
)
def test_how_a_worker_ended_is_said(does: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "python"
    worker.write_text(f"#!/bin/sh\n{does}\n")
    worker.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(worker))
    with pytest.raises(UsageError, match=f"^no record: {re.escape(told)}$"):
        ask_worker("trace", {}, "no record", 10)


# What has no record: no class in transformers, or sizes that are no polynomials of batch and length; plans of these go by formulas.
NOT_TRACED = {"baichuan", "internlm2", "minimax_m2", "gpt_neo"}  # by model_type
# Others of their kind are; each takes a quarter of an hour.
NOT_YET_TRACED = {"nvidia/Nemotron-H-56B-Base-8K", "Qwen/Qwen3.5-122B-A10B", "Qwen/Qwen3.5-397B-A17B"}


def test_shipped_records_are_of_the_transformers_that_is_pinned() -> None:
    pins = re.findall(r"^transformers==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    made_by = {
        match[1]
        for line in traces.SHIPPED.read_bytes().splitlines()
        for record in traces.unpack(line)[1].values()
        if isinstance(record, TracedMemory) and (match := re.match(r"transformers (\d+\.\d+)", record.source))
    }
    assert made_by <= set(pins), f"made by {sorted(made_by)}: run python -m harness.worker.trace --catalog, which says what changed"


@pytest.mark.parametrize("name", catalog())
def test_every_model_of_the_catalog_comes_with_its_records_or_is_known_to_have_none(name: str) -> None:
    config = catalog()[name].config
    missing = [precision for precision in ("bf16", "int8", "int4") if traces.shipped_trace(config, precision) is None]
    assert bool(missing) == (config["model_type"] in NOT_TRACED or name in NOT_YET_TRACED), missing
