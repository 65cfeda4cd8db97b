"""Constants with an origin, and what results of this machine make of them."""

from __future__ import annotations

import re

import msgspec
import pytest
from msgspec.structs import replace

from harness.core.records import Case, Estimate, Machine, Outcome, Result, Span, TierEstimate
from harness.core.units import GIB
from harness.planning.calibration import BOUND, _digest, correct, default, device_of, gpu_context, with_context
from harness.planning.device_map.infer import free_bytes
from tests.support import builders

HERE = builders.machine()


def estimate(tok_s: float = 10.0, corrections: dict[str, float] | None = None, fixed_token_s: float = 0.0) -> Estimate:
    tier = TierEstimate(
        weights_bytes=GIB,
        kv_bytes=0,
        activation_bytes=0,
        overhead_bytes=0,
        allocated_bytes=GIB,
        peak_bytes=GIB,
        load_peak_bytes=GIB,
        low_bytes=GIB,
        high_bytes=GIB,
        capacity_bytes=None,
    )
    return Estimate(
        tiers={"cpu": tier},
        load_s=Span(low=1, best=2, high=4),
        first_token_s=Span(low=0.5, best=1, high=2),
        decode_tok_s=Span(low=tok_s / 2, best=tok_s, high=tok_s * 2),
        corrections=corrections or {},
        fixed_token_s=fixed_token_s,
        constants=default().digest,
    )


def ran(token_s: float = 0.05, *, expected: Estimate | None = None, of: Case | None = None, machine: Machine = HERE) -> Result:
    metrics = {"load_s": 4.0, "first_token_s": 0.5, "token_p50_s": token_s}
    return builders.result(of, metrics=metrics, estimate=expected or estimate(), machine=machine)


def test_every_constant_has_an_interval_and_an_origin() -> None:
    for name, constant in default().constants.items():
        assert constant.low <= constant.best <= constant.high, name
        assert re.match(r"(measured|published|estimate|torch)[:, ]", constant.origin), name


def test_results_give_the_ratio_of_measured_and_estimated() -> None:
    found = correct([ran()])
    key = ("cpu", "bf16")
    ratios = [found.ratio(figure, *key) for figure in ("load", "first_token", "token")]
    assert [round(ratio.best, 3) for ratio in ratios if ratio] == [1.667, 0.5, 0.5]
    assert found.ratio("token", "cpu", "int8") is None


def test_a_load_of_a_moment_does_not_make_that_of_a_large_model_ten_times_as_long() -> None:
    """Seen with codegen-16b left on the disk: 0.1 s estimated, 1.7 measured; the next model took 24 s, and 245 were said."""
    moment = msgspec.structs.replace(estimate(), load_s=Span(low=0.1, best=0.1, high=0.2))
    result = msgspec.structs.replace(ran(expected=moment), metrics={"load_s": 1.7})
    ratio = correct([result]).ratio("load", "cpu", "bf16")
    assert ratio is not None
    assert 1.0 < ratio.best < 3.0


def test_what_other_constants_estimated_corrects_nothing() -> None:
    for digest in ("", "0123abcd"):
        other = msgspec.structs.replace(estimate(), constants=digest)
        assert correct([ran(expected=other)]).ratios == {}
    table = dict(default().constants)
    table["load_s"] = msgspec.structs.replace(table["load_s"], best=table["load_s"].best * 2)
    assert _digest(table) != default().digest == _digest(dict(reversed(default().constants.items())))


def test_the_median_counts_and_the_interval_holds_all() -> None:
    found = correct([ran(seconds) for seconds in (0.04, 0.05, 0.2)]).ratio("token", "cpu", "bf16")
    assert found is not None
    assert (found.best, found.results) == (0.5, 3)
    assert found.low <= 0.4
    assert found.high >= 2.0


def test_a_correction_is_not_applied_twice() -> None:
    """The second run was estimated with the first one's ratio; both must give the same."""
    first = correct([ran()]).ratio("token", "cpu", "bf16")
    assert first is not None
    corrected = estimate(tok_s=10.0 / first.best, corrections={"token": first.best})
    again = correct([ran(expected=corrected)]).ratio("token", "cpu", "bf16")
    assert again is not None
    assert again.best == pytest.approx(first.best)


@pytest.mark.parametrize(("measured", "ratio"), [(0.07, 0.5), (0.1, 1.0), (0.16, 2.0), (0.03, 0.25)])
def test_reading_at_a_measured_bandwidth_is_not_corrected(measured: float, ratio: float) -> None:
    """Of 0.1 s a token 0.04 are settled; all that was measured more or less belongs to the other 0.06."""
    found = correct([ran(measured, expected=estimate(fixed_token_s=0.04))]).ratio("token", "cpu", "bf16")
    assert found is not None
    assert found.best == pytest.approx(ratio)


def test_a_token_that_is_nearly_all_reading_tells_nothing_of_the_rest() -> None:
    assert correct([ran(expected=estimate(fixed_token_s=0.09))]).ratio("token", "cpu", "bf16") is None


@pytest.mark.parametrize(
    ("tiers", "counts"),
    [({"gpu:0": GIB}, True), ({"gpu:0": GIB, "cpu": 0}, True), ({"cpu": GIB}, False), ({"gpu:0": GIB, "cpu": GIB}, False)],
)
def test_weights_that_lay_elsewhere_than_estimated_correct_nothing(tiers: dict[str, int], counts: bool) -> None:
    """Seen with a torch for CPU beside a card: auto went on in the RAM, and its seconds became the ratio of the GPU."""
    on_gpu = msgspec.structs.replace(estimate(), tiers={"gpu:0": estimate().tiers["cpu"]})
    result = msgspec.structs.replace(ran(expected=on_gpu), loaded=builders.loaded(tiers=tiers))
    assert (correct([result]).ratio("token", "gpu", "bf16") is not None) == counts


def test_only_what_ran_here_and_to_its_end_counts() -> None:
    other = builders.machine(builders.gpu())
    failed = builders.result(outcome=Outcome.OOM, estimate=estimate(), metrics={"token_p50_s": 1.0})
    assert correct([failed, ran(machine=other), builders.result()], HERE).ratios == {}


def test_a_case_under_a_limit_on_ram_reads_its_files_anew_and_tells_nothing_of_the_machine() -> None:
    limited = msgspec.structs.replace(builders.case(), ram_bytes=GIB)
    assert correct([ran(of=limited)]).ratios == {}
    assert correct([ran(of=msgspec.structs.replace(limited, ram_bytes=None, vram_bytes=GIB))]).ratios


def test_processes_that_wait_for_one_another_tell_nothing_of_the_machine() -> None:
    shared = msgspec.structs.replace(builders.loaded(), rank_bytes=[504, 504])
    assert correct([msgspec.structs.replace(ran(), loaded=shared)]).ratios == {}


def test_a_machine_that_was_busy_does_not_spoil_everything() -> None:
    found = correct([ran(1e6)]).ratio("token", "cpu", "bf16")
    assert found is not None
    assert found.best == BOUND


KINDS = [("cpu", "cpu"), ("gpu:0", "gpu"), ("gpu:0 gpu:1", "gpu"), ("gpu:0 cpu", "gpu+spill"), ("cpu disk", "cpu+disk")]


@pytest.mark.parametrize(("tiers", "device"), KINDS)
def test_what_computes_and_what_is_read_decide_the_kind(tiers: str, device: str) -> None:
    assert device_of(dict.fromkeys(tiers.split(), 1)) == device


def test_a_disturbed_figure_counts_only_where_there_is_no_other() -> None:
    disturbed = msgspec.structs.replace(ran(0.5), noisy={"decode_tok_s": "others used 0.9 of 2 cores"})
    alone, both = correct([disturbed]).ratio("token", "cpu", "bf16"), correct([disturbed, ran(0.05)])
    quiet = both.ratio("token", "cpu", "bf16")
    assert alone is not None
    assert quiet is not None
    assert (round(alone.best, 3), round(quiet.best, 3), quiet.results) == (5.0, 0.5, 1)
    loaded = both.ratio("load", "cpu", "bf16")
    assert loaded is not None
    assert loaded.results == 2  # loading was not disturbed


def test_a_context_that_was_measured_here_stands_in_for_the_constant() -> None:
    assert gpu_context(builders.machine(builders.gpu())) == default()["gpu_context_bytes"]
    cards = [replace(builders.gpu(index), context_bytes=size) for index, size in enumerate((300_000_000, 520_000_000))]
    found = with_context(default(), builders.machine(*cards))
    assert (found["gpu_context_bytes"].best, found["gpu_context_bytes"].low) == (520_000_000, 300_000_000)
    assert found.digest == default().digest
    assert default()["gpu_context_bytes"].best == 450e6


def test_auto_is_planned_with_what_a_context_leaves_of_the_card() -> None:
    one = builders.gpu()
    assert one.capacity_bytes is not None
    assert free_bytes(one) == one.capacity_bytes - 450_000_000
    assert free_bytes(replace(one, context_bytes=520_000_000)) == one.capacity_bytes - 520_000_000
