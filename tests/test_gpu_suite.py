"""What of the suite for GPUs (tests/gpu) can be checked without one: that it asks for what it then looks at, and can fail."""

from __future__ import annotations

from harness.core.placements import PLACEMENTS
from harness.core.records import Result
from tests.gpu import test_placements as suite
from tests.support import builders


def test_every_case_that_is_looked_at_is_asked_for() -> None:
    pairs = list(zip(suite.WORDS[::2], suite.WORDS[1::2], strict=True))
    asked = {option: {name for flag, name in pairs if flag == option} for option in ("--precision", "--placement")}
    assert {precision for precision, _ in suite.POSSIBLE} == asked["--precision"]
    assert {placement for _, placement in suite.POSSIBLE} == asked["--placement"]
    assert {"direct", "balanced_low_0"} <= asked["--placement"] <= PLACEMENTS.keys()
    assert len(suite.POSSIBLE) == len(set(suite.POSSIBLE))


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
