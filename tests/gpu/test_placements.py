"""Every placement that uses a GPU, for real: loaded where it says, in the precision it says, and measured there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.placements import PLACEMENTS, distinct
from harness.core.precisions import PRECISIONS, defaults
from harness.core.records import Outcome, Result
from harness.results import store

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
ASKED = defaults(None)
PLACED = [row.name for row in PLACEMENTS.values() if "gpu" in row.devices and row.name in distinct(PLACEMENTS, gpus=2)]
WORDS = [
    *(word for name in ASKED for word in ("--precision", name)),
    *(word for name in PLACED for word in ("--placement", name)),
]
POSSIBLE = [
    (precision, placement)
    for precision in ASKED
    for placement in PLACED
    if not any(trait in PRECISIONS[precision].incompatible for trait in PLACEMENTS[placement].traits)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    directory = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "pytest", "cases", "-q", "--results", str(directory), *WORDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (directory / store.NAME).exists(), done.stdout + done.stderr
    found, problems = store.Store(directory).read()
    assert not problems
    return {(result.case.precision, result.case.placement): result for result in found}


def get(results: dict[tuple[str, str], Result], precision: str, placement: str) -> Result:
    result = results[precision, placement]
    if result.outcome is Outcome.SKIPPED:
        pytest.skip(str(result.why))
    assert result.outcome is Outcome.OK, f"{result.why}\n{result.log_tail}"
    return result


def on_gpus(result: Result) -> dict[str, int]:
    """Return the bytes of weights by GPU, of those that hold any."""
    held = result.loaded.tier_bytes if result.loaded else {}
    return {tier: size for tier, size in held.items() if tier.startswith("gpu:") and size}


def keeps_no_copy(direct: Result, moved: Result) -> bool:
    """Say whether loading straight onto the GPU took clearly less RAM of its own than loading into RAM first."""
    weights = sum(direct.loaded.dtype_bytes.values()) if direct.loaded else 0
    return direct.metrics["ram_anon_peak_bytes"] < moved.metrics["ram_anon_peak_bytes"] - weights / 4


@pytest.mark.parametrize(("precision", "placement"), POSSIBLE)
def test_loads_where_and_as_asked(results: dict[tuple[str, str], Result], precision: str, placement: str) -> None:
    result = get(results, precision, placement)
    assert result.loaded is not None
    assert set(result.checks.values()) == {"ok"}
    held = on_gpus(result)
    assert held, f"no GPU holds weights: {result.loaded.tier_bytes}"
    if PLACEMENTS[placement].device_map != "balanced_low_0":  # which keeps the first GPU for others
        assert "gpu:0" in held


@pytest.mark.parametrize(("precision", "placement"), POSSIBLE)
def test_vram_is_measured_and_holds_the_weights(results: dict[tuple[str, str], Result], precision: str, placement: str) -> None:
    result = get(results, precision, placement)
    assert result.loaded is not None
    most = max(on_gpus(result).values())
    assert result.metrics["vram_peak_bytes"] >= most
    assert result.metrics["load_vram_peak_bytes"] <= result.metrics["vram_peak_bytes"] * 1.5
    if "vram_process_peak_bytes" in result.metrics:  # NVML does not see into every container
        assert result.metrics["vram_process_peak_bytes"] > most


@pytest.mark.parametrize(("precision", "placement"), POSSIBLE)
def test_answers_are_sound(results: dict[tuple[str, str], Result], precision: str, placement: str) -> None:
    result = get(results, precision, placement)
    assert result.quality is not None
    assert result.quality.verdict != "broken", result.quality.why


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_direct_keeps_no_copy_in_ram(results: dict[tuple[str, str], Result], precision: str) -> None:
    """The default model is stored in bfloat16, so that the RAM holds a copy, not the file, where it is loaded there first."""
    direct, moved = get(results, precision, "direct"), get(results, precision, "ram-to-gpu")
    assert keeps_no_copy(direct, moved), f"{direct.metrics['ram_anon_peak_bytes']} of {moved.metrics['ram_anon_peak_bytes']} B"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("placement", "other"), [("gpu+cpu", "cpu"), ("disk", "disk")])
def test_spills_where_it_says(results: dict[tuple[str, str], Result], precision: str, placement: str, other: str) -> None:
    loaded = get(results, precision, placement).loaded
    assert loaded is not None
    assert loaded.tier_bytes.get(other, 0) > 0


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_map_may_leave_blocks_of_a_quantized_model_in_ram(precision: str, tmp_path: Path) -> None:
    """Unverified: no machine with a GPU was at hand when it was written."""
    half = {f"model.layers.{number}": 0 if number < 15 else "cpu" for number in range(30)}
    (tmp_path / "map.json").write_text(json.dumps({"model.embed_tokens": 0, "lm_head": 0, "model.norm": "cpu", **half}))
    options = ["--precision", precision, "--device-map", str(tmp_path / "map.json"), "--results", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pytest", "cases", "-q", *options], cwd=ROOT, check=False)
    (result,), _ = store.Store(tmp_path).read()
    assert result.outcome is Outcome.OK, f"{result.why}\n{result.log_tail}"
    assert set(result.checks.values()) == {"ok"}
    assert result.loaded is not None
    assert result.loaded.linear_dtype_bytes.keys() > {PRECISIONS[precision].linear_dtype}
