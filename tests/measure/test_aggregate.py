"""The arithmetic of a result: rates, medians, percentiles, peaks and noise, on samples written by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from harness.core.metrics import METRICS
from harness.core.records import Phase
from harness.measure import aggregate
from harness.measure.protocol import GenerateDone, LoadDone
from tests.support.builders import loaded


def generated(*token_s: float, prompt_tokens: int = 100, batch: int = 1, energy_j: float | None = None) -> GenerateDone:
    """A round whose tokens came at these times."""
    return GenerateDone(
        token_s=list(token_s),
        total_s=token_s[-1] + 0.01,
        prompt_tokens=prompt_tokens,
        new_tokens=len(token_s),
        batch=batch,
        text="",
        phases=[],
        energy_j=energy_j,
    )


def paced(first_s: float, step_s: float, tokens: int = 5, **more: int) -> GenerateDone:
    return generated(*(first_s + step_s * index for index in range(tokens)), **more)


def phase(name: str, ram: int | None = None, anon: int | None = None, **vram: int) -> Phase:
    """A phase with its peaks; gpu0=5 is 5 bytes on gpu:0."""
    tiers = {f"gpu:{card.removeprefix('gpu')}": size for card, size in vram.items()}
    return Phase(name=name, start_s=0, end_s=1, ram_peak_bytes=ram, ram_anon_bytes=anon, vram_peak_bytes=tiers)


# Loading


def test_loading_takes_what_the_worker_timed() -> None:
    seconds = {"load_s": 2.0, "tokenizer_s": 0.1, "weights_s": 1.5}
    assert aggregate.of_load(LoadDone(seconds=seconds, loaded=loaded(), phases=[])) == seconds


@pytest.mark.parametrize(("tiers", "figure"), [({"cpu": 5, "disk": 7}, {"disk_bytes": 7}), ({"cpu": 5}, {}), ({"disk": 0}, {})])
def test_bytes_on_the_disk_are_told_where_there_are_any(tiers: dict[str, int], figure: dict[str, float]) -> None:
    assert aggregate.of_load(LoadDone(seconds={}, loaded=loaded(tiers=tiers), phases=[])) == figure


@pytest.mark.parametrize(
    ("parts", "ready"),
    [({"load_s": 2.0, "first_token_s": 0.5}, {"ready_s": 2.5}), ({"load_s": 2.0}, {}), ({"first_token_s": 0.5}, {}), ({}, {})],
)
def test_ready_is_loaded_and_the_first_token_out(parts: dict[str, float], ready: dict[str, float]) -> None:
    assert aggregate.ready(parts) == ready


# Generating


@pytest.mark.parametrize(
    ("done", "rate"),
    [
        (generated(0.5, 0.7, 0.9, 1.1, 1.3), 5.0),  # 4 tokens in 0.8 s; the first one is prefill's
        (generated(0.5, 0.7, 0.9, 1.1, 1.3, batch=4), 20.0),
        (generated(10.0, 10.25), 4.0),
    ],
)
def test_decoding_is_counted_from_the_first_token_to_the_last(done: GenerateDone, rate: float) -> None:
    assert aggregate.decode_tok_s(done) == pytest.approx(rate)


def test_prefill_is_the_whole_batch_s_prompt_by_the_first_token() -> None:
    found = aggregate.of_rounds(None, [paced(0.5, 0.1, prompt_tokens=100, batch=2)])
    assert found["prefill_tok_s"] == pytest.approx(400)


def test_medians_stand_for_the_warm_rounds() -> None:
    rounds = [paced(0.1, 0.1), paced(0.2, 0.05), paced(9.0, 5.0)]
    found = aggregate.of_rounds(None, rounds)
    assert found["warm_first_token_s"] == pytest.approx(0.2)
    assert found["decode_tok_s"] == pytest.approx(10)
    assert found["prefill_tok_s"] == pytest.approx(500)
    assert found["token_p50_s"] == pytest.approx(0.1)


def test_the_cold_round_gives_the_first_token_and_nothing_else() -> None:
    cold, warm = paced(3.0, 0.1), paced(0.1, 0.1)
    assert aggregate.of_rounds(cold, []) == {"first_token_s": 3.0}
    assert aggregate.of_rounds(cold, [warm]) == {"first_token_s": 3.0, **aggregate.of_rounds(None, [warm])}


def test_nothing_generated_nothing_told() -> None:
    assert aggregate.of_rounds(None, []) == {}


@pytest.mark.parametrize(("tokens", "rounds", "told"), [(20, 1, False), (21, 1, True), (11, 2, True), (10, 2, False)])
def test_a_95th_percentile_needs_twenty_steps(tokens: int, rounds: int, told: bool) -> None:
    found = aggregate.of_rounds(None, [paced(0.1, 0.01, tokens)] * rounds)
    assert ("token_p95_s" in found) == told
    assert "token_p50_s" in found


@pytest.mark.parametrize(("steps", "rank"), [(20, 19), (21, 20), (40, 38), (100, 95), (101, 96)])
def test_the_95th_percentile_is_the_least_that_95_of_100_do_not_exceed(steps: int, rank: int) -> None:
    """The steps last 1, 2, 3 ... seconds, so the value is its rank."""
    times = [0.5 + index * (index + 1) / 2 for index in range(steps + 1)]
    assert aggregate.of_rounds(None, [generated(*times)])["token_p95_s"] == pytest.approx(rank)


@given(st.lists(st.floats(0.001, 10), min_size=20, max_size=60))
def test_percentiles_are_times_that_happened_and_in_order(steps: list[float]) -> None:
    times = [0.5]
    for step in steps:
        times.append(times[-1] + step)
    found = aggregate.of_rounds(None, [generated(*times)])
    seen = [later - earlier for earlier, later in pairwise(times)]
    assert found["token_p95_s"] in seen
    assert min(seen) <= found["token_p50_s"] <= found["token_p95_s"] <= max(seen)


@pytest.mark.parametrize(
    ("energies", "total"), [([5.0, 6.0, 7.0], 18.0), ([5.0, None, 7.0], None), ([None, None], None), ([0.0, 0.0], 0.0)]
)
def test_energy_is_told_only_if_every_round_has_it(energies: list[float | None], total: float | None) -> None:
    rounds = [generated(0.1, 0.2, energy_j=energy) for energy in energies]
    assert aggregate.of_rounds(None, rounds).get("energy_j") == total


@pytest.mark.parametrize("count", [2, 3, 5])
def test_energy_is_that_of_the_rounds_that_were_asked_for_however_many_count(count: int) -> None:
    rounds = [generated(0.1, 0.2, energy_j=6.0)] * count
    assert aggregate.of_rounds(None, rounds, asked=3)["energy_j"] == 18.0


def test_every_warm_round_is_kept_raw() -> None:
    raw = aggregate.samples([paced(0.1, 0.1, 3), paced(0.2, 0.05, 3)])
    assert raw["warm_first_token_s"] == [0.1, 0.2]
    assert raw["decode_tok_s"] == pytest.approx([10, 20])
    assert raw["token_s"] == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert raw["round_s"] == pytest.approx([0.31, 0.31])


def test_a_model_that_stopped_after_one_token_has_no_speed_of_decoding() -> None:
    """test_speed fails such a case for what it is; its figures must not fall over first."""
    found = aggregate.of_rounds(None, [generated(0.25)])
    assert found == {"warm_first_token_s": 0.25, "prefill_tok_s": 400}


# Memory


def test_peaks_are_the_highest_of_loading_and_generating() -> None:
    phases = [
        phase("load", ram=50, anon=10, gpu0=5, gpu1=9),
        phase("cold", ram=40, anon=30, gpu0=12, gpu1=3),
        phase("warm", ram=60, anon=20, gpu0=11),
    ]
    assert aggregate.of_phases(phases) == {
        "ram_peak_bytes": 60,
        "ram_anon_peak_bytes": 30,
        "load_ram_peak_bytes": 50,
        "vram_peak_bytes": 12,
        "load_vram_peak_bytes": 9,
    }


@pytest.mark.parametrize("name", ["import", "tokenizer", "score"])
def test_what_the_user_s_model_does_not_do_is_not_counted(name: str) -> None:
    ours = phase(name, ram=999, anon=999, gpu0=999)
    theirs = phase("load", ram=1, anon=1, gpu0=1)
    assert set(aggregate.of_phases([theirs, ours]).values()) == {1}
    assert aggregate.of_phases([ours]) == {}


def test_a_machine_without_gpu_has_no_figure_of_vram() -> None:
    assert "vram_peak_bytes" not in aggregate.of_phases([phase("load", ram=5, anon=5)])


def test_an_unknown_peak_does_not_hide_a_known_one() -> None:
    assert aggregate.of_phases([phase("load"), phase("cold", ram=7)]) == {"ram_peak_bytes": 7}


# Noise


def test_steady_figures_are_not_noisy() -> None:
    assert aggregate.noise({"decode_tok_s": [10.0, 10.5, 9.8]}) == {}


def test_a_figure_that_spreads_by_a_tenth_of_its_mean_is_noisy() -> None:
    found = aggregate.noise({"decode_tok_s": [10.0, 10.0, 10.0], "prefill_tok_s": [80.0, 100.0, 120.0]})
    assert found == {"prefill_tok_s": "standard deviation 20.0 % of the mean over 3 rounds"}


@pytest.mark.parametrize("raw", [{}, {"decode_tok_s": [10.0]}, {"decode_tok_s": []}])
def test_one_round_tells_nothing_of_noise(raw: dict[str, list[float]]) -> None:
    assert aggregate.noise(raw) == {}


def test_steps_and_rounds_are_no_figures_to_be_noisy() -> None:
    assert aggregate.noise({"token_s": [1.0, 9.0], "round_s": [1.0, 9.0]}) == {}


# Together


def test_every_figure_is_in_the_table() -> None:
    seconds = dict.fromkeys(("import_s", "tokenizer_s", "load_s", "weights_s", "dispatch_s"), 1.0)
    everything = (
        aggregate.of_load(LoadDone(seconds=seconds, loaded=loaded(tiers={"disk": 1}), phases=[]))
        | aggregate.of_rounds(paced(1, 1), [generated(*range(1, 50), energy_j=1.0)])
        | aggregate.of_phases([phase("load", ram=1, anon=1, gpu0=1)])
        | aggregate.ready({"load_s": 1, "first_token_s": 1})
    )
    assert everything.keys() <= METRICS.keys()
    assert aggregate.noise({key: [1.0, 9.0] for key in METRICS}).keys() <= METRICS.keys()


@pytest.mark.parametrize(
    ("linear", "share"), [({"uint8": 75, "bfloat16": 25}, 0.75), ({"uint8": 10}, 1.0), ({"bfloat16": 10}, 0.0), ({}, 1.0)]
)
def test_how_much_is_held_as_asked_is_a_share_of_bytes(linear: dict[str, int], share: float) -> None:
    assert aggregate.held(loaded(linear), "uint8") == share


def test_a_round_of_several_generations_is_their_mean() -> None:
    """On a GPU one generation is over before the clock stands; the raw times of all tokens are kept."""
    one = paced(0.1, 0.01)
    round_ = replace(one, more_token_s=[[0.3, 0.33, 0.36, 0.39, 0.42]], energy_j=6.0)
    raw = aggregate.samples([round_])
    assert raw["warm_first_token_s"] == [pytest.approx(0.2)]
    assert raw["prefill_tok_s"] == [pytest.approx(one.prompt_tokens * one.batch / 0.2)]
    assert raw["decode_tok_s"] == [pytest.approx(one.batch * 8 / 0.16)]
    assert raw["token_s"] == pytest.approx([0.01] * 4 + [0.03] * 4)
    assert aggregate.of_rounds(None, [round_], asked=5)["energy_j"] == pytest.approx(3.0 * 5)  # five generations, as asked for
