"""Frames from readings: the components of every tier add up, and each is what torch, the plan or the worker knows it to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core.units import GIB, MIB
from harness.live.frame import OWN_PARTS, LiveFrame, TierFrame
from harness.live.moment import frame, split
from harness.live.reading import RamReading
from harness.measure.beacon import Outlook
from harness.measure.sampler import Memory
from tests.live import moments


def tier(found: LiveFrame, name: str) -> TierFrame:
    (one,) = [each for each in found.tiers if each.name == name]
    return one


def own_bytes(one: TierFrame) -> int:
    return sum(size for name, size in one.parts.items() if name in OWN_PARTS)


def test_the_parts_of_a_real_run_add_up_at_every_moment() -> None:
    readings, said = moments.recorded()
    for count in range(1, len(readings) + 1):
        ram = tier(frame(readings[:count], said), "cpu")
        assert sum(ram.parts.values()) == ram.total_bytes
        assert own_bytes(ram) == ram.process_bytes
        assert ram.parts["kv"] == readings[count - 1].beat.tokens * MIB  # type: ignore[union-attr]  # every one has a beat
    assert ram.parts["other"] < 0.05 * own_bytes(ram)  # what nothing explains is little


@given(
    anonymous=st.integers(0, 40 * GIB),
    mapped=st.integers(0, 20 * GIB),
    available=st.integers(0, 40 * GIB),
    cached=st.integers(0, 40 * GIB),
)
def test_the_parts_of_ram_add_up_whatever_the_system_says(anonymous: int, mapped: int, available: int, cached: int) -> None:
    """The system's figures are read one after the other, and need not agree."""
    ram = RamReading(total_bytes=32 * GIB, available_bytes=available, cached_bytes=cached)
    now = moments.reading(ram=ram, memory=Memory(ram_bytes=anonymous + mapped, anon_bytes=anonymous), beat=moments.beat(5))
    found = tier(frame([now], moments.announced()), "cpu")
    assert own_bytes(found) == found.process_bytes
    assert all(size > 0 for size in found.parts.values())
    assert sum(found.parts.values()) == max(32 * GIB, anonymous + mapped)


def test_a_card_is_told_by_what_torch_has_allocated_and_reserved() -> None:
    now = moments.reading(gpus={"gpu:0": moments.card()}, beat=moments.beat(512, vram={"gpu:0": (7 * GIB, 7 * GIB + 256 * MIB)}))
    found = tier(frame([now], moments.announced()), "gpu:0")
    assert found.parts == {
        "weights": 6 * GIB,
        "kv": 512 * MIB,
        "activations": 512 * MIB,
        "reserve": 256 * MIB,
        "context": 768 * MIB,
        "others": GIB,
        "free": 3 * GIB,
    }
    assert own_bytes(found) == found.process_bytes == 8 * GIB
    assert (found.predicted_bytes, found.end_bytes, found.is_red) == (9 * GIB, 11 * GIB, False)


def test_a_card_of_which_torch_says_nothing_is_told_by_the_plan_and_the_rest_is_other() -> None:
    found = tier(frame([moments.reading(gpus={"gpu:0": moments.card()}, beat=moments.beat(512))], moments.announced()), "gpu:0")
    assert found.parts["context"] == 512 * MIB
    assert found.parts["other"] == 8 * GIB - 6 * GIB - 512 * MIB - 512 * MIB - 256 * MIB
    assert own_bytes(found) == 8 * GIB


def test_where_nvml_does_not_list_the_process_torch_and_the_planned_context_stand_for_it() -> None:
    """As in a container without the ids of its host."""
    now = moments.reading(
        gpus={"gpu:0": moments.card(process_bytes=None)}, beat=moments.beat(512, vram={"gpu:0": (7 * GIB, 7 * GIB)})
    )
    found = tier(frame([now], moments.announced()), "gpu:0")
    assert found.process_bytes == 7 * GIB + 512 * MIB
    assert found.parts["context"] == 512 * MIB
    assert found.parts["others"] == 9 * GIB - found.process_bytes


def test_ram_is_told_by_what_the_worker_held_before_it_loaded_and_after() -> None:
    found = tier(frame([moments.reading(beat=moments.beat(512))], moments.announced()), "cpu")
    assert found.parts["overhead"] == GIB
    assert found.parts["weights"] == GIB + GIB // 2  # one made, and half a GiB of the file more than the libraries had
    assert found.parts["kv"] == 256 * MIB
    assert found.parts["activations"] == 128 * MIB
    assert (found.anonymous_bytes, found.mapped_bytes) == (4 * GIB, GIB)
    assert found.parts["cache"] == 5 * GIB  # of files that are not mapped here


def test_while_it_loads_the_weights_are_what_came_and_the_tick_is_the_peak_of_loading() -> None:
    now = moments.reading(beat=moments.beat(phase="load", loaded=None))
    found = tier(frame([now], moments.announced(weights_bytes={})), "cpu")
    assert found.parts["weights"] == 2 * GIB
    assert found.parts["other"] == 2 * GIB
    assert found.predicted_bytes == 5 * GIB


def test_of_another_process_only_the_whole_is_known() -> None:
    found = frame([moments.reading(gpus={"gpu:0": moments.card()})])
    assert own_bytes(tier(found, "cpu")) == tier(found, "cpu").parts["other"] == 5 * GIB
    assert tier(found, "gpu:0").parts["other"] == 8 * GIB
    assert found.words == ["process 4242 is no case of fitmatrix: what it holds is known only as a whole"]


def test_a_worker_that_has_said_nothing_yet_is_a_case_nevertheless() -> None:
    assert frame([moments.reading(is_case=True)]).words == ["process 4242 is a case that has not begun to load"]


def test_a_limit_ends_what_may_be_held_before_the_machine_does() -> None:
    said = moments.announced(limits_bytes={"cpu": 6 * GIB, "gpu:0": 9 * GIB}, uncounted_bytes=GIB // 4)
    found = frame([moments.reading(gpus={"gpu:0": moments.card()}, beat=moments.beat(5))], said)
    assert tier(found, "cpu").end_bytes == 6 * GIB - GIB // 4
    assert tier(found, "gpu:0").end_bytes == 9 * GIB
    unlimited = frame([moments.reading(beat=moments.beat(5))], moments.announced())
    assert tier(unlimited, "cpu").end_bytes == 4 * GIB + 20 * GIB - GIB  # what a run leaves to the machine is not had


def test_a_tier_that_is_nearly_full_says_what_to_try_in_the_words_of_the_plan() -> None:
    full = moments.card(used_bytes=int(11.9 * GIB), process_bytes=int(11.8 * GIB))
    found = frame([moments.reading(gpus={"gpu:0": full}, beat=moments.beat(5))], moments.announced())
    assert tier(found, "gpu:0").is_red
    assert found.words[0] == "gpu:0 ends: 11.8 GiB of 11.9 GiB. Try --precision int4."


def test_a_tier_that_holds_more_than_the_plan_said_at_worst_says_so() -> None:
    large = moments.card(total_bytes=80 * GIB, used_bytes=20 * GIB, process_bytes=20 * GIB)
    now = moments.reading(gpus={"gpu:0": large}, beat=moments.beat(5))
    what, way = frame([now], moments.announced(outlook=Outlook())).words[0].split(". ")
    assert what == "gpu:0 holds more than planned: 20.0 GiB, peak planned 9.00 GiB"
    assert way == "fitmatrix plan chatglm-6b --best shows ways that take less."
    mine = frame([now], moments.announced(outlook=Outlook(), typed="./my models/chatglm-6b")).words[0]
    assert "fitmatrix plan './my models/chatglm-6b' --best shows" in mine  # what is pasted finds a directory, too


def test_a_card_that_answers_no_more_is_gone() -> None:
    found = frame([moments.reading(gpus={"gpu:10": moments.card()}, gone=("gpu:0", "gpu:2"))], moments.announced())
    cards = [("gpu:0", True), ("gpu:2", True), ("gpu:10", False)]
    assert [(one.name, one.is_gone) for one in found.tiers] == [*cards, ("cpu", False), ("disk", False)]
    assert "gpu:0 is gone: NVML does not answer for it any more." in found.words


def test_rates_are_those_of_the_last_seconds_by_the_clock_of_the_worker() -> None:
    readings = [
        moments.reading(second, read_bytes=int(second * GIB), beat=moments.beat(100 + 4 * int(second), second - 0.2))
        for second in map(float, range(30))
    ]
    found = frame(readings, moments.announced())
    assert found.tokens_per_s == pytest.approx(4)
    assert found.disk_bytes_per_s == pytest.approx(GIB)
    assert found.disk_bytes_per_token == pytest.approx(GIB / 4)
    assert "reading 256 MiB a token from disk, 1.07 GB/s" in found.words


def test_a_rate_does_not_reach_back_into_another_phase() -> None:
    before = [moments.reading(float(s), beat=moments.beat(9, float(s), phase="cold", made=9)) for s in range(3)]
    after = [moments.reading(3.0 + s, beat=moments.beat(5 * s, 3.0 + s, begun_s=3.0, made=9 + 5 * s)) for s in range(3)]
    assert frame([*before, *after[:1]], moments.announced()).tokens_per_s is None
    assert frame([*before, *after], moments.announced()).tokens_per_s == pytest.approx(5)


def test_the_strip_collapses_modules_that_lie_together() -> None:
    assert frame([moments.reading()], moments.announced()).strip == [("gpu:0", 3), ("cpu", 1), ("gpu:0", 1)]


def test_a_machine_without_a_case_says_how_to_begin_one() -> None:
    now = moments.reading(pid=None, memory=None, read_bytes=None)
    found = frame([now])
    assert [one.process_bytes for one in found.tiers] == [None, None]
    assert sum(tier(found, "cpu").parts.values()) == 32 * GIB
    assert found.words == ["no case runs now: pytest cases/ or fitmatrix chat begins one, --pid N watches any process"]


def test_a_process_that_may_not_be_read_is_told() -> None:
    found = frame([moments.reading(memory=None)])
    assert found.words == ["the memory of process 4242 may not be read, or it has just ended"]


@given(st.integers(0, 1000), st.lists(st.integers(-5, 400), max_size=6))
def test_a_split_gives_no_more_than_there_is(whole: int, wanted: list[int]) -> None:
    found = split(whole, [(str(number), size) for number, size in enumerate(wanted)])
    assert sum(found.values()) == whole
    assert all(0 <= found[str(number)] <= max(size, 0) for number, size in enumerate(wanted))


def test_a_rate_is_of_the_last_seconds() -> None:
    """A minute at one token a second, then a quarter of one at ten."""
    tokens = [*range(60), *(60 + 10 * second for second in range(16))]
    readings = [moments.reading(float(second), beat=moments.beat(count, float(second))) for second, count in enumerate(tokens, 1)]
    assert frame(readings, moments.announced()).tokens_per_s == pytest.approx(10)


def test_what_a_file_system_reads_by_the_way_makes_no_token_slow() -> None:
    def words(read_bytes: int) -> str:
        at = [moments.reading(float(s), beat=moments.beat(1 + 5 * s, float(s)), read_bytes=s * read_bytes) for s in (0, 1)]
        return " ".join(frame(at, moments.announced()).words)

    assert "a token from disk" in words(50 * MIB)
    assert "a token from disk" not in words(MIB)
