"""Runs of `pytest cases/` on fake cards, each made once for all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from harness.core.placements import FILE, PLACEMENTS
from harness.core.records import Result
from harness.core.units import exact_size
from harness.planning import calibration
from harness.planning.device_map.infer import STRATEGIES
from harness.results import store
from tests.support import small_models

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
LAYERS, WIDTH, VOCABULARY = 4, 64, 512
SHORT = ("--repeats", "1", "--prompt-tokens", "16", "--new-tokens", "2")
GROWING = ("--repeats", "1", "--prompt-tokens", "1", "--new-tokens", "24")  # while decoding only the KV cache grows: let it
PARTS = ("load", "prefill", "decode")

# Where the table of placements can be tried: each on one card that needs no more, and on two of which the second is larger. Those
# of several processes need cards that take part in collectives.
SINGLE = tuple(row.name for row in PLACEMENTS.values() if "gpu" in row.devices and not row.parallel and not row.experts_in_ram)
# On one card, of a model with experts.
MIXED = ("cpu", "direct", *(row.name for row in PLACEMENTS.values() if row.experts_in_ram))
ON_ONE = tuple(name for name in SINGLE if PLACEMENTS[name].least_gpus <= 1)
ON_TWO = SINGLE
# On two cards that are together too small: those that fill what they find.
ON_SMALL = tuple(name for name in SINGLE if PLACEMENTS[name].device_map in STRATEGIES and not PLACEMENTS[name].first_gpu_only)


class Run(NamedTuple):
    """What a run left: its folder of results, what pytest printed, its exit status."""

    folder: Path
    output: str
    status: int

    @property
    def results(self) -> list[Result]:
        """The results, in the order of the cases."""
        found, problems = store.Store(self.folder).read()
        assert found, self.output
        assert not problems
        return found

    def of(self, placement: str) -> Result:
        """Return the only result of a placement."""
        (found,) = [result for result in self.results if result.case.placement == placement]
        return found


class Runs:
    """All runs below one folder; `make` does the work, and whoever opens the folder later finds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.mute, self.mixture = folder / "tiny", folder / "mute" / "tiny", folder / "mixture"

    def __getitem__(self, name: str) -> Run:
        said = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return Run(self.folder / name, *said)

    def make(self) -> None:
        """Save the model, with a tokenizer and without, and run everything: two runs at a time."""
        sizes = {"hidden_size": WIDTH, "intermediate_size": 172, "num_attention_heads": 4, "vocab_size": VOCABULARY}
        for folder in (self.model, self.mute):
            small_models.save("llama", folder, num_hidden_layers=LAYERS, **sizes)
        small_models.save("qwen3_moe", self.mixture, vocab_size=VOCABULARY)
        for folder in (self.model, self.mixture):
            small_models.write_letters(folder, VOCABULARY)
        with ThreadPoolExecutor(2) as pool:
            # Two of one model at first would both trace it; the longest run is not the last.
            jobs = (self._on_two, self._mixed, self._on_one, self._on_small, self._limited, self._astray)
            for done in [pool.submit(job) for job in jobs]:
                done.result()

    def _on_one(self) -> None:
        spread = {**self._ends(0), "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": "disk", "model.layers.3": 0}
        self._run("one", "8", self.model, *SHORT, *_each(ON_ONE), *self._map("one", spread))

    def _on_two(self) -> None:
        spread = {**self._ends(0), "model.layers.0": 1, "model.layers.1": 0, "model.layers.2": "cpu", "model.layers.3": 1}
        self._run("two", "8,12", self.model, *SHORT, *_each(ON_TWO), *self._map("two", spread))

    def _on_small(self) -> None:
        limit = exact_size(CONTEXT_BYTES + self.weights_bytes * 45 // 100)
        self._run("small", "8,8", self.model, *SHORT, *_each(ON_SMALL), "--run-all", "--vram", limit)

    def _mixed(self) -> None:
        self._run("mixed", "8", self.mixture, *SHORT, *_each(MIXED))

    def _limited(self) -> None:
        """Run under limits that are known from a run that had enough: half the weights, a quarter of the rest, 1 KiB less."""
        self._run("enough", "8", self.mute, *GROWING, "--placement", "direct", "--vram", "2GiB")
        direct = self["enough"].of("direct")
        loaded, most = peak(direct, "load"), peak(direct, "cold")
        limits = (loaded // 2, loaded + (most - loaded) // 4, most - 1024)
        words = (word for limit in limits for word in ("--vram", exact_size(limit)))
        self._run("short", "8", self.mute, *GROWING, "--placement", "direct", "--run-all", *words)

    def _astray(self) -> None:
        """Run what a library would do that goes on in the RAM whatever card it was told."""
        code = "\n    device_map=(\\{.*?\\}|[^\n]*),\n\t" + '\n    device_map={"": "cpu"},\n'
        words = ["-k", "test_load", *_each(name for name in ON_TWO if name not in ("ram-to-gpu", FILE))]
        self._run("astray", "8,8", self.mute, *words, FAKE_CODE=code)

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of the model's weights."""
        return (self.model / "model.safetensors").stat().st_size

    def _ends(self, device: int) -> dict[str, str | int]:
        return dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), device)

    def _map(self, name: str, device_map: dict[str, str | int]) -> tuple[str, str]:
        file = self.folder / f"map-{name}.json"
        file.write_text(json.dumps(device_map), encoding="utf-8")
        return "--device-map", str(file)

    def _run(self, name: str, cards: str, model: Path, *words: str, **settings: str) -> None:
        """Run cases on cards such as "8,12", two of 8 and 12 GiB, and note how it went."""
        path = os.pathsep.join([str(SITE), str(ROOT)])
        env = {**os.environ, "FAKE_CARDS": cards, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **settings}  # tensors are tiny
        command = [sys.executable, "-m", "pytest", "cases", "-q", "--model", str(model), "--results", str(self.folder / name)]
        done = subprocess.run(
            [*command, "--precision", "bf16", "--calibrate", "never", *words],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        (self.folder / f"{name}.json").write_text(json.dumps([done.stdout + done.stderr, done.returncode]), encoding="utf-8")


CONTEXT_BYTES = int(calibration.default()["gpu_context_bytes"].best)


def _each(placements: Iterable[str]) -> list[str]:
    return [word for name in placements for word in ("--placement", name) if name != FILE]  # which a map asks for by being given


def peak(result: Result, phase: str) -> int:
    """Return the most bytes that a phase had on the first card."""
    return max(one.vram_peak_bytes.get("gpu:0", 0) for one in result.phases if one.name == phase)
