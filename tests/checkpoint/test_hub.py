"""What answers at HF_ENDPOINT may be anything: its shape, its bytes and its time are bounded, and what is wrong is a sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from harness.catalog import download
from harness.catalog.resolve import Source
from harness.checkpoint.formats.files import LocalFile
from tests.support.hub_server import NASTY, HubServer, serving

ROOT = Path(__file__).parents[2]
# In a process of its own, because huggingface_hub reads its settings when it is imported; with little patience.
ASK = """
import json, resource, sys, time
from harness.catalog import download
from harness.checkpoint import hub, reader
from harness.core.errors import HarnessError

hub.WHOLE_S, hub.TIMEOUT_S = 1.0, 0.9
calls = {"read": reader.read_hub, "fetch": download.fetch, "stored": lambda name: download.stored_as(download.resolve(name))}
try:
    reader.read_hub("o/warm-up")  # imports
except HarnessError:
    pass
for call in sys.argv[1:]:
    how, name = call.split()
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        said = str(calls[how](name))
        error = ""
    except HarnessError as wrong:
        said, error = str(wrong), type(wrong).__name__
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    print(json.dumps({"name": name, "said": said, "error": error, "seconds": time.monotonic() - begun, "grown": grown}), flush=True)
"""


def ask(hub: HubServer, home: Path, how: str, names: list[str]) -> dict[str, dict[str, Any]]:
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("HF_") and "PROXY" not in name.upper()}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-W", "error", "-c", ASK, *(f"{how} o/{name}" for name in names)]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **settings}, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return {answer["name"].partition("/")[2]: answer for answer in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("hub")
    for name in [*NASTY, "fine", "slow-file", "endless-file"]:
        folder = root / "o" / name
        folder.mkdir(parents=True)
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "vocab_size": 16}
        (folder / "config.json").write_text(json.dumps(config))
        safetensors.torch.save_file({"model.embed_tokens.weight": torch.zeros(16, 8)}, folder / "model.safetensors")
    with serving(root) as server:
        yield server


@pytest.mark.parametrize("how", ["read", "fetch"])
def test_whatever_answers_is_one_sentence_in_bounded_time_and_memory(hub: HubServer, tmp_path: Path, how: str) -> None:
    found = ask(hub, tmp_path, how, list(NASTY))
    assert found.keys() == NASTY.keys()
    for name, answer in found.items():
        assert answer["error"] in ("UsageError", "CheckpointError"), answer
        assert len(answer["said"].splitlines()) == 1, answer
        assert answer["seconds"] < 20, answer
        assert answer["grown"] < 400 << 20, answer
        too_much = "64.0 MiB" in answer["said"] or "TimeoutError" in answer["said"]  # on a busy machine time is up before
        assert too_much if name == "endless" else "64.0 MiB" not in answer["said"], answer


def test_what_drips_is_given_up(hub: HubServer, tmp_path: Path) -> None:
    found = ask(hub, tmp_path, "read", ["drip-body", "drip-headers", "bomb", "away", "slow-file", "fine"])
    for name in ("drip-body", "drip-headers"):
        assert "cannot be reached (TimeoutError)" in found[name]["said"]
        assert 0.9 < found[name]["seconds"] < 10
    assert "sends packed what was asked for plain" in found["bomb"]["said"]
    assert "sends its list of files by another place" in found["away"]["said"]
    assert "the server sent no whole answer in 1 s" in found["slow-file"]["said"]
    assert found["fine"]["error"] == "", "an honest hub is read as before"


def test_a_file_that_never_ends_does_not_fill_the_disk(hub: HubServer, tmp_path: Path) -> None:
    answer = ask(hub, tmp_path, "fetch", ["endless-file"])["endless-file"]
    assert "what answered sends more than" in answer["said"]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 1 << 20


def test_a_collection_asks_no_more_than_it_needs(hub: HubServer, tmp_path: Path) -> None:
    found = ask(hub, tmp_path, "stored", ["endless", "config-huge", "drip-body", "fine"])
    assert {answer["said"] for answer in found.values()} == {"None"}
    assert max(answer["grown"] for answer in found.values()) < 400 << 20


def test_a_config_of_gigabytes_is_not_read_to_collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sparse: whoever reads it waits for its zeros, and holds them."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(3 << 30)
    read: list[int] = []
    whole = LocalFile.read

    def noted(file: LocalFile, offset: int, length: int) -> bytes:
        read.append(length)
        return whole(file, offset, length)

    monkeypatch.setattr(LocalFile, "read", noted)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"reads all of {path}"))
    assert download.stored_as(Source(name="x", kind="directory", location=str(tmp_path))) is None
    assert sum(read) < 64 << 20
