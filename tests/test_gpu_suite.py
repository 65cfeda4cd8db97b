"""What of the suite for GPUs (tests/gpu) can be checked without one: that it asks for what it looks at, and that it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from harness.core.placements import PLACEMENTS, distinct
from harness.core.records import Estimate, Makeup, Outcome, Result, Span, TierEstimate
from harness.core.units import GIB
from harness.planning.calibration import default
from harness.results import store
from tests.gpu import conftest, report
from tests.gpu import test_placements as suite
from tests.support import builders

ROOT = Path(__file__).parents[1]


def test_every_case_that_is_looked_at_is_asked_for() -> None:
    placements = set(suite.PLACED)
    assert placements > placements & set(distinct(PLACEMENTS, 1)) > set()
    assert {precision for precision, _ in suite.POSSIBLE} == set(suite.ASKED)
    assert {placement for _, placement in suite.POSSIBLE} == placements
    assert {"direct", "balanced_low_0"} <= placements <= PLACEMENTS.keys()
    assert len(suite.POSSIBLE) == len(set(suite.POSSIBLE))
    assert suite.ASKED[0] == "bf16"


def test_every_module_has_its_place_in_the_order() -> None:
    modules = {path.stem.removeprefix("test_") for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert modules == set(conftest.ORDER)


def test_without_a_card_all_of_it_is_skipped_with_one_sentence() -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    reasons = {line.rpartition(": ")[2] for line in done.stdout.splitlines() if line.startswith("SKIPPED")}
    assert reasons == {"needs an NVIDIA GPU, and NVML knows none here"}
    assert " passed" not in done.stdout
    assert not (ROOT / "first-contact").exists()


def held(**tier_bytes: int) -> Result:
    tiers = {name.replace("gpu", "gpu:"): size for name, size in tier_bytes.items()}
    return builders.result(loaded=builders.loaded(tiers=tiers))


def test_some_gpu_is_enough_where_the_first_is_kept_free() -> None:
    assert suite.on_gpus(held(gpu1=7, cpu=3)) == {"gpu:1": 7}
    assert suite.on_gpus(held(gpu0=0, cpu=3)) == {}


def test_a_copy_in_ram_is_found() -> None:
    weights = sum(builders.loaded().dtype_bytes.values())
    one, other = (builders.result(loaded=builders.loaded(), metrics={"ram_anon_peak_bytes": 1.0e9 + more}) for more in (0, weights))
    assert not suite.keeps_no_copy(one, one)
    assert suite.keeps_no_copy(one, other)


# ---- the report ------------------------------------------------------------------------------------------------------------


def on_a_card(allocated: float = 4.0, process: float = 4.6, tok_s: float = 20.0, **changes: object) -> Result:
    """A case that was to allocate 4 GiB of a card, to need 5 at most, and to say 10 to 40 tokens a second."""
    tier = TierEstimate(
        weights_bytes=3 * GIB,
        kv_bytes=GIB,
        activation_bytes=0,
        overhead_bytes=GIB // 2,
        allocated_bytes=4 * GIB,
        peak_bytes=int(4.5 * GIB),
        load_peak_bytes=4 * GIB,
        low_bytes=4 * GIB,
        high_bytes=5 * GIB,
        capacity_bytes=11 * GIB,
        needed_high_bytes=5 * GIB,
    )
    span = Span(low=1, best=2, high=4)
    process_bytes = Makeup(whole=4.5 * GIB, parts={"gpu_context_bytes": 450e6})
    estimate = Estimate(
        tiers={"gpu:0": tier},
        load_s=span,
        first_token_s=span,
        decode_tok_s=Span(low=10, best=20, high=40),
        constants=default().digest,
        makeup={"vram_process_bytes": process_bytes, "token_s": Makeup(whole=0.05, parts={"gpu_s_per_operation": 0.05})},
    )
    metrics = {
        "vram_peak_bytes": allocated * GIB,
        "vram_process_peak_bytes": process * GIB,
        "decode_tok_s": tok_s,
        "token_p50_s": 1 / tok_s,
    }
    made = builders.result(
        builders.case("bf16", "direct"), metrics=metrics, estimate=estimate, machine=builders.machine(builders.gpu())
    )
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, set()),
        ({"allocated": 4.07}, set()),
        ({"allocated": 4.2}, {"allocated"}),
        ({"allocated": 3.9}, {"allocated"}),
        ({"process": 5.1}, {"process"}),
        ({"tok_s": 41.0}, {"decode"}),
        ({"tok_s": 9.0}, {"decode"}),
    ],
)
def test_what_did_not_hold_is_told(changes: dict[str, float], broken: set[str]) -> None:
    rows = list(report.compared(on_a_card(**changes)))
    assert [row.figure for row in rows] == ["allocated", "process", "decode"]
    assert {row.figure for row in rows if not row.holds} == broken


def test_a_noisy_speed_is_not_held_against_the_plan() -> None:
    noisy = on_a_card(tok_s=1.0, noisy={"decode_tok_s": "others used 0.9 of 2 cores"})
    assert [row.figure for row in report.compared(noisy)] == ["allocated", "process"]
    assert not list(report.compared(on_a_card(outcome=Outcome.OOM)))


def test_the_report_names_estimates_failures_and_the_constants_that_follow(tmp_path: Path) -> None:
    kept = store.Store(tmp_path)
    kept.prepare()
    context = 3 * 450e6  # three times what the package says of a context
    for number in range(3):
        slow = on_a_card(process=(4.5 * GIB - 450e6 + context) / GIB, tok_s=8.0)
        kept.append(replace(slow, case=replace(slow.case, model=f"model{number}")))
    kept.append(on_a_card(outcome=Outcome.OOM, stage="load", why="CUDA out of memory"))
    text = report.write(tmp_path, 61.0)
    assert text == (tmp_path / report.NAME).read_text(encoding="utf-8")
    assert "4 cases in 61 s. 3 of 9 estimates held." in text
    assert "| `bf16/direct` | decode | 8.00 tokens/s | 10 to 40 tokens/s | **no** |" in text
    assert "| `tiny/bf16/direct` | oom | load | CUDA out of memory |" in text
    assert {"`gpu_context_bytes`", "`gpu_s_per_operation`"} <= set(text.replace("|", " ").split())
    assert "results.jsonl" in text


def test_without_results_there_is_no_report(tmp_path: Path) -> None:
    assert report.write(tmp_path, 1.0) == ""
