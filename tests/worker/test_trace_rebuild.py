"""Rebuilding the shipped records: what is printed, what is written, and what stays as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.architecture import traces
from harness.architecture.ask_worker import ask_worker
from harness.catalog import shipped
from harness.catalog.shipped import ShippedModel
from harness.worker.trace import rebuild

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"vocab_size": 96}
STRANGE = {"model_type": "nosuch"}


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalog of two models, one of which transformers does not have, and no records yet."""
    models = {
        f"us/{name}": ShippedModel(parameters=1, published=1, published_by="", source="", config=config)
        for name, config in (("tiny", TINY), ("odd", STRANGE))
    }
    monkeypatch.setattr(shipped, "catalog", lambda: models)
    monkeypatch.setattr(traces, "SHIPPED", tmp_path / "traces.jsonl")
    answers: dict[str, bytes] = {}

    def ask_once(module: str, question: Mapping[str, Any], what: str, limit_s: float) -> bytes:
        asked = json.dumps(question, sort_keys=True)
        if asked not in answers:
            answers[asked] = ask_worker(module, question, what, limit_s)
        return answers[asked]

    monkeypatch.setattr(rebuild, "ask_worker", ask_once)


@pytest.mark.usefixtures("catalog")
def test_it_prints_what_changed_and_writes_what_it_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert rebuild.rebuild(["tiny"], ["bf16", "fp16"], ["8.0"]) == 0
    told = capsys.readouterr().out
    assert "us/tiny bf16 8.0: added" in told
    assert "us/tiny fp16 8.0: added, as bf16 8.0" in told
    assert rebuild.rebuild(["tiny"], ["bf16"], ["8.0"], missing=True) == 0
    assert "us/tiny" not in capsys.readouterr().out

    key = traces.key_of(TINY)
    records = traces.shipped_records(key)
    made = traces.find(records, "bf16")
    assert made is not None
    older = msgspec.structs.replace(made, source="transformers 4.0.0", weights_bytes=2 * made.weights_bytes)
    traces.SHIPPED.write_bytes(
        traces.pack(key, records | {"bf16 8.0": older}) + b"\n" + traces.pack("0" * 16, {"bf16 8.0": older}) + b"\n"
    )
    assert rebuild.rebuild(["tiny"], ["bf16"], ["8.0"], missing=True) == 0
    told = capsys.readouterr().out
    assert f"{'0' * 16}: gone" in told
    assert "us/tiny bf16 8.0: changed from transformers 4.0.0: -" in told
    assert " at 1 x 64" in told
    assert traces.find(traces.shipped_records(key), "bf16") == made
    assert traces.shipped_records("0" * 16) == {}


@pytest.mark.usefixtures("catalog")
def test_a_model_that_cannot_be_traced_is_said_and_fails_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert rebuild.rebuild(["odd"], ["bf16"], ["8.0"]) == 1
    told = capsys.readouterr().out
    assert "us/odd bf16 8.0: no record: " in told
    assert "nosuch" in told
    assert "1 without a record" in told
    assert traces.SHIPPED.read_bytes() == b""
