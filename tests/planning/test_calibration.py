"""Constants with an origin, and what results of this machine make of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
import pytest
from msgspec.structs import replace

from harness.core.records import Case, Estimate, Loaded, Machine, Makeup, Outcome, Phase, Result, Span, TierEstimate
from harness.core.units import GIB
from harness.planning.calibrating import evidence
from harness.planning.calibrating.fit import correct, fit_constants, predicted
from harness.planning.calibration import Calibration, _digest, default, device_of, gpu_context, with_context
from harness.planning.device_map.infer import free_bytes
from tests.support import builders

HERE = builders.machine()
# A token of 0.1 s: reading takes 0.04 of it, the processor the rest. Loading takes 2 s, most of them copying.
TOKEN = Makeup(whole=0.1, parts={"cpu_s_per_operation": 0.06, "ram_bandwidth_share_bfloat16": -0.04})
LOAD = Makeup(whole=2.0, parts={"load_s": 0.1, "cast_bytes_per_s": -1.8})


def estimate(makeup: Mapping[str, Makeup] | None = None, tiers: tuple[str, ...] = ("cpu",)) -> Estimate:
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
        tiers=dict.fromkeys(tiers, tier),
        load_s=Span(low=1, best=2, high=4),
        first_token_s=Span(low=0.5, best=1, high=2),
        decode_tok_s=Span(low=5, best=10, high=20),
        constants=default().digest,
        makeup=dict(makeup or {"token_s": TOKEN, "load_s": LOAD}),
    )


def ran(
    token_s: float = 0.1, load_s: float = 2.0, *, expected: Estimate | None = None, of: Case | None = None, machine: Machine = HERE
) -> Result:
    metrics = {"load_s": load_s, "token_p50_s": token_s}
    return builders.result(of, metrics=metrics, estimate=expected or estimate(), machine=machine)


def factor(found: Calibration, name: str) -> float:
    return found[name].best / default()[name].best


def test_every_constant_has_an_interval_and_an_origin() -> None:
    for name, constant in default().constants.items():
        assert constant.low <= constant.best <= constant.high, name
        assert re.match(r"(measured|published|estimate|torch)[:, ]", constant.origin), name


def test_without_results_the_constants_are_those_of_the_package() -> None:
    assert correct([]) == default()


def test_what_was_estimated_right_changes_nothing_but_how_sure_it_is() -> None:
    found = correct([ran(), ran()])
    name = "cpu_s_per_operation"
    assert factor(found, name) == pytest.approx(1.0)
    assert default()[name].low < found[name].low < found[name].best < found[name].high < default()[name].high


@pytest.mark.parametrize("times", [0.5, 1.5, 2.5])
def test_a_figure_moves_to_what_was_measured(times: float) -> None:
    found = fit_constants(default(), evidence.observations([ran(0.1 * times)], default().digest))
    (at,) = (index for index, group in enumerate(found.groups) if group.figure == "token_s")
    assert found.before[at] == pytest.approx(times)
    assert found.after[at] == pytest.approx(1.0, abs=0.12)
    assert "measured: 1 result of this machine" in found.calibration["cpu_s_per_operation"].origin


def test_another_model_of_other_parts_is_predicted_by_what_two_showed() -> None:
    """The processor is twice as slow and the memory half as fast again: two models that differ tell the two apart."""
    slow, fast = {"cpu_s_per_operation": 2.0}, {"ram_bandwidth_share_bfloat16": 1.5}
    shares = (0.9, 0.1)
    results = []
    for number, share in enumerate(shares):
        made = Makeup(whole=0.1, parts={"cpu_s_per_operation": 0.1 * share, "ram_bandwidth_share_bfloat16": -0.1 * (1 - share)})
        measured = 0.1 * share * 2.0 + 0.1 * (1 - share) / 1.5
        results.append(ran(measured, expected=estimate({"token_s": made}), of=builders.case(model=f"model{number}")))
    found = correct(results)
    assert factor(found, *slow) == pytest.approx(2.0, rel=0.1)
    assert factor(found, *fast) == pytest.approx(1.5, rel=0.1)


def test_a_load_of_a_moment_does_not_make_that_of_a_large_model_ten_times_as_long() -> None:
    """Seen with codegen-16b left on the disk: 0.1 s estimated, 1.7 measured; the next model took 24 s, and 245 were said."""
    moment = estimate({"load_s": Makeup(whole=0.11, parts={"load_s": 0.01, "cast_bytes_per_s": -0.1})})
    found = correct([ran(load_s=1.7, expected=moment)])
    assert 1 / factor(found, "cast_bytes_per_s") < 3.0


def test_what_other_constants_estimated_corrects_nothing() -> None:
    for digest in ("", "0123abcd"):
        other = msgspec.structs.replace(estimate(), constants=digest)
        assert not correct([ran(0.3, expected=other)]).fitted
    table = dict(default().constants)
    table["load_s"] = msgspec.structs.replace(table["load_s"], best=table["load_s"].best * 2)
    assert _digest(table) != default().digest == _digest(dict(reversed(default().constants.items())))


def test_a_correction_is_not_applied_twice() -> None:
    """How a figure is made up stands in a result without corrections, so that it does not matter in which order results came."""
    first = correct([ran(0.2)])
    again = msgspec.structs.replace(estimate(), corrections={"cpu_s_per_operation": factor(first, "cpu_s_per_operation")})
    assert correct([ran(0.2, expected=again)]).constants == first.constants
    assert first.digest == default().digest


def test_one_run_that_contradicts_many_counts_little_and_is_named() -> None:
    cases = [builders.case(model=f"model{number}") for number in range(6)]
    results = [ran(0.1, of=case) for case in cases[:5]] + [ran(0.9, of=cases[5])]
    found = fit_constants(default(), evidence.observations(results, default().digest))
    assert factor(found.calibration, "cpu_s_per_operation") == pytest.approx(1.0, rel=0.25)
    assert [(group.case.partition("/")[0], group.figure) for group in found.contradicting] == [("model5", "token_s")]


def test_the_median_of_the_runs_of_a_case_counts() -> None:
    runs = [msgspec.structs.replace(ran(seconds), at=f"2026-01-0{day}") for day, seconds in enumerate((0.09, 0.1, 0.9), 1)]
    found = fit_constants(default(), evidence.observations(runs, default().digest))
    assert [(group.measured, group.results) for group in found.groups if group.figure == "token_s"] == [(0.1, 3)]


def test_the_same_result_counts_once() -> None:
    observed = evidence.observations([ran(0.2)], default().digest)
    assert fit_constants(default(), [*observed, *observed]) == fit_constants(default(), observed)


@pytest.mark.parametrize("tier", ["cpu", "gpu:0"])
@pytest.mark.parametrize(("read_share", "teaches"), [(0.0, True), (0.005, True), (0.08, False), (0.5, False)])
def test_a_load_whose_files_came_from_the_disk_teaches_nothing_of_loading(tier: str, read_share: float, teaches: bool) -> None:
    one, held = ran(load_s=4.0, expected=estimate(tiers=(tier,))), GIB
    loaded = Loaded(model_class="LlamaForCausalLM", tier_bytes={tier: held}, dtype_bytes={}, linear_dtype_bytes={}, device_map={})
    phases = [Phase(name="load", start_s=0.0, end_s=4.0, disk_read_bytes=int(read_share * held))]
    found = evidence.observations([replace(one, loaded=loaded, phases=phases)], default().digest)
    assert {observed.figure for observed in found} == ({"load_s", "token_s"} if teaches else {"token_s"})


def test_what_a_process_settles_anew_is_no_property_of_the_machine() -> None:
    """The heap keeps a tenth or twice of its copies, as it happens: what was measured says nothing of the next process."""
    anon = Makeup(whole=800e6, parts={"heap_share_int4": 200e6, "ram_import_anon_bytes": 274e6})
    result = ran(expected=estimate({"ram_anon_bytes": anon}))
    result = msgspec.structs.replace(result, metrics={"ram_anon_peak_bytes": 1.05e9})
    found = correct([result])
    assert found["heap_share_int4"] == default()["heap_share_int4"]
    assert factor(found, "ram_import_anon_bytes") < 1.2  # and the imports do not answer for it


def test_memory_is_corrected_by_three_cases_and_no_fewer() -> None:
    """It decides what fits: what one model shows of it is too little."""
    anon = estimate({"ram_anon_bytes": Makeup(whole=400e6, parts={"ram_import_anon_bytes": 274e6})})
    runs = [
        replace(ran(expected=anon, of=builders.case(model=f"model{number}")), metrics={"ram_anon_peak_bytes": 450e6})
        for number in range(3)
    ]
    assert not correct(runs[:2]).fitted
    assert factor(correct(runs), "ram_import_anon_bytes") == pytest.approx(1 + 50 / 274, abs=0.08)


def test_a_small_part_of_a_figure_teaches_nothing() -> None:
    """Seen with SmolLM2 in int8: reading takes a quarter of its token, and what the rest was off by slowed ChatGLM's by half."""
    small = Makeup(whole=0.07, parts={"cpu_s_per_operation": 0.05, "ram_bandwidth_share_int8": -0.02})
    assert correct([ran(0.14, expected=estimate({"token_s": small}))]).fitted.keys() == {"cpu_s_per_operation"}


def test_a_speed_and_a_cost_grow_the_other_way() -> None:
    assert predicted(TOKEN, {"cpu_s_per_operation": 0.6931472}) == pytest.approx(0.16)
    assert predicted(TOKEN, {"ram_bandwidth_share_bfloat16": 0.6931472}) == pytest.approx(0.08)


@pytest.mark.parametrize(
    ("tiers", "counts"),
    [({"gpu:0": GIB}, True), ({"gpu:0": GIB, "cpu": 0}, True), ({"cpu": GIB}, False), ({"gpu:0": GIB, "cpu": GIB}, False)],
)
def test_weights_that_lay_elsewhere_than_estimated_correct_nothing(tiers: dict[str, int], counts: bool) -> None:
    """Seen with a torch for CPU beside a card: auto went on in the RAM, and its seconds became those of the GPU."""
    result = msgspec.structs.replace(ran(0.2, expected=estimate(tiers=("gpu:0",))), loaded=builders.loaded(tiers=tiers))
    assert bool(correct([result]).fitted) == counts


def test_only_what_ran_here_and_to_its_end_counts() -> None:
    other = builders.machine(builders.gpu())
    failed = builders.result(outcome=Outcome.OOM, estimate=estimate(), metrics={"token_p50_s": 1.0})
    assert not correct([failed, ran(0.2, machine=other), builders.result()], HERE).fitted


def test_a_case_under_a_limit_on_ram_reads_its_files_anew_and_tells_nothing_of_the_machine() -> None:
    limited = msgspec.structs.replace(builders.case(), ram_bytes=GIB)
    assert not correct([ran(0.2, of=limited)]).fitted
    assert correct([ran(0.2, of=msgspec.structs.replace(limited, ram_bytes=None, vram_bytes=GIB))]).fitted


def test_processes_that_wait_for_one_another_tell_nothing_of_the_machine() -> None:
    shared = msgspec.structs.replace(builders.loaded(), rank_bytes=[504, 504])
    assert not correct([msgspec.structs.replace(ran(0.2), loaded=shared)]).fitted


def test_a_machine_that_was_busy_does_not_spoil_everything() -> None:
    assert "cpu_s_per_operation" not in correct([ran(1e6)]).fitted


def test_a_disturbed_figure_counts_only_where_there_is_no_other() -> None:
    disturbed = msgspec.structs.replace(ran(0.5), noisy={"decode_tok_s": "others used 0.9 of 2 cores"}, at="2026-01-01")
    name = "cpu_s_per_operation"
    alone, quiet, both = (factor(correct(results), name) for results in ([disturbed], [ran()], [disturbed, ran()]))
    assert 1.1 < alone < factor(correct([ran(0.5)]), name)
    assert both == quiet == pytest.approx(1.0)


KINDS = [("cpu", "cpu"), ("gpu:0", "gpu"), ("gpu:0 gpu:1", "gpu"), ("gpu:0 cpu", "gpu+spill"), ("cpu disk", "cpu+disk")]


@pytest.mark.parametrize(("tiers", "device"), KINDS)
def test_what_computes_and_what_is_read_decide_the_kind(tiers: str, device: str) -> None:
    assert device_of(dict.fromkeys(tiers.split(), 1)) == device


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
