"""Every placement that uses a GPU, for real: loaded where it says, in the precision it says, and measured there.

Not run on a card yet.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.core.placements import PLACEMENTS, distinct
from harness.core.precisions import PRECISIONS, defaults
from harness.core.records import Outcome, Result
from tests.gpu.contact import Contact, ended_well, explain
from tests.support import small_models

pytestmark = pytest.mark.gpu

# The precision that most people load comes first: what is wrong with all of them shows there.
ASKED = sorted(defaults(None), key=lambda name: name != "bf16")
PLACED = [row.name for row in PLACEMENTS.values() if "gpu" in row.devices and row.name in distinct(PLACEMENTS, gpus=2)]
POSSIBLE = [
    (precision, placement)
    for precision in ASKED
    for placement in PLACED
    if not any(trait in PRECISIONS[precision].incompatible for trait in PLACEMENTS[placement].traits)
]


def get(contact: Contact, precision: str, placement: str) -> Result:
    """Return the result of a case."""
    if placement not in distinct(PLACEMENTS, len(contact.machine.gpus)):
        pytest.skip(f"on one card {placement} is what another placement is")
    result = contact.together(precision, placement)
    if result.outcome is Outcome.SKIPPED:
        pytest.skip(str(result.why))
    return ended_well(result)


def on_gpus(result: Result) -> dict[str, int]:
    """Return the bytes of weights by GPU, of those that hold any."""
    held = result.loaded.tier_bytes if result.loaded else {}
    return {tier: size for tier, size in held.items() if tier.startswith("gpu:") and size}


def keeps_no_copy(direct: Result, moved: Result) -> bool:
    """Say whether loading straight onto the GPU took clearly less RAM of its own than loading into RAM first."""
    weights = sum(direct.loaded.dtype_bytes.values()) if direct.loaded else 0
    return direct.metrics["ram_anon_peak_bytes"] < moved.metrics["ram_anon_peak_bytes"] - weights / 4


@pytest.mark.parametrize(("precision", "placement"), POSSIBLE)
def test_loads_where_and_as_asked(contact: Contact, precision: str, placement: str) -> None:
    result = get(contact, precision, placement)
    assert result.loaded is not None
    assert set(result.checks.values()) == {"ok"}, result.checks
    held = on_gpus(result)
    assert held, f"no GPU holds weights: {result.loaded.tier_bytes}"
    if PLACEMENTS[placement].device_map != "balanced_low_0":  # which keeps the first GPU for others
        assert "gpu:0" in held


@pytest.mark.parametrize(("precision", "placement"), POSSIBLE)
def test_vram_is_measured_and_holds_the_weights(contact: Contact, precision: str, placement: str) -> None:
    result = get(contact, precision, placement)
    most = max(on_gpus(result).values())
    assert result.metrics["vram_peak_bytes"] >= most
    assert result.metrics["load_vram_peak_bytes"] <= result.metrics["vram_peak_bytes"] * 1.5
    if "vram_process_peak_bytes" in result.metrics:  # NVML does not see into every container
        assert result.metrics["vram_process_peak_bytes"] > most


@pytest.mark.parametrize(("precision", "placement"), POSSIBLE)
def test_answers_are_sound(contact: Contact, precision: str, placement: str) -> None:
    """Of synthetic weights only that they are numbers: no NaN, no infinity."""
    result = get(contact, precision, placement)
    assert result.quality is not None
    assert result.quality.verdict != "broken", result.quality.why


def test_direct_keeps_no_copy_in_ram(contact: Contact) -> None:
    """No checkpoint of the catalog is stored in float32, so that the RAM holds a copy where it is loaded there first."""
    direct, moved = get(contact, "fp32", "direct"), get(contact, "fp32", "ram-to-gpu")
    assert keeps_no_copy(direct, moved), f"{direct.metrics['ram_anon_peak_bytes']} of {moved.metrics['ram_anon_peak_bytes']} B"


@pytest.mark.parametrize("precision", [name for name in ASKED if PRECISIONS[name].scheme is None])
@pytest.mark.parametrize(("placement", "other"), [("gpu+cpu", "cpu"), ("disk", "disk")])
def test_spills_where_it_says(contact: Contact, precision: str, placement: str, other: str) -> None:
    loaded = get(contact, precision, placement).loaded
    assert loaded is not None
    assert loaded.tier_bytes.get(other, 0) > 0


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_map_may_leave_blocks_of_a_quantized_model_in_ram(contact: Contact, precision: str, tmp_path: Path) -> None:
    model = tmp_path / "llama"
    small_models.save("llama", model, num_hidden_layers=6)
    half = {f"model.layers.{number}": 0 if number < 3 else "cpu" for number in range(6)}
    rest = {"model.embed_tokens": 0, "model.rotary_emb": 0, "lm_head": 0, "model.norm": "cpu"}
    (tmp_path / "map.json").write_text(json.dumps({**rest, **half}), encoding="utf-8")
    mapped = Contact(tmp_path / "results", contact.machine, str(model))
    (result,) = mapped.cases("--precision", precision, "--device-map", str(tmp_path / "map.json"))
    assert result.outcome is Outcome.OK, explain(result)
    assert set(result.checks.values()) == {"ok"}
    assert result.loaded is not None
    assert result.loaded.linear_dtype_bytes.keys() > {PRECISIONS[precision].linear_dtype}
