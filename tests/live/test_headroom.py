"""Room in tokens: against a run that the kernel ended, and by what is known to grow."""

from __future__ import annotations

import random

import pytest

from harness.core.units import GIB, MIB
from harness.live.headroom import CONTEXT, Headroom, growth, planned_kv, points_of
from harness.live.moment import frame
from harness.measure.beacon import Outlook
from tests.live import moments

LAST = 200  # the token of the last beat before the kernel ended the recorded run


def room(*args: object, **changes: object) -> Headroom:
    found = frame(moments.growing(*args), moments.announced(**changes)).room  # type: ignore[arg-type]  # as growing takes them
    assert found is not None
    return found


def test_the_end_of_a_real_run_was_foreseen_within_2_percent_from_its_second_half_on() -> None:
    readings, said = moments.recorded()
    late = [count for count in range(2, len(readings) + 1) if readings[count - 1].beat.tokens > LAST / 2]  # type: ignore[union-attr]
    assert len(late) > 10
    for count in late:
        found = frame(readings[:count], said).room
        assert found is not None
        assert found.ends == "cpu"
        assert readings[count - 1].beat.tokens + found.tokens == pytest.approx(LAST + 1, rel=0.02)  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(5))
def test_the_end_is_foreseen_within_2_percent_through_what_comes_and_goes(seed: int) -> None:
    """Copies of 16 MiB at random beside half a MiB a token, with room for 4,000 tokens."""
    noise = random.Random(seed)
    tokens = range(64, 1664, 20)
    held = [2 * GIB + count * MIB // 2 + noise.randint(-16 * MIB, 16 * MIB) for count in tokens]
    found = room(tokens, held, limits_bytes={"cpu": 4 * GIB})
    assert (found.ends, found.is_measured) == ("cpu", False)
    assert tokens[-1] + found.tokens == pytest.approx(4096, rel=0.02)


def test_what_clearly_grows_by_more_than_the_cache_is_measured() -> None:
    """Such as scores of eager attention, which the plan counts as activations."""
    tokens = range(64, 464, 10)
    found = room(tokens, [2 * GIB + count * MIB for count in tokens], limits_bytes={"cpu": 4 * GIB})
    assert found.is_measured
    assert found.bytes_per_token == pytest.approx(MIB)
    assert tokens[-1] + found.tokens == pytest.approx(2048, abs=2)


def test_memory_that_an_earlier_text_left_on_the_heap_is_no_growth() -> None:
    tokens = range(64, 464, 10)
    found = room(tokens, [3 * GIB] * len(tokens), limits_bytes={"cpu": 4 * GIB})
    assert found == Headroom(tokens=2048, ends="cpu", bytes_per_token=MIB / 2)


def test_the_first_tier_to_end_is_named() -> None:
    readings = [moments.reading(gpus={"gpu:0": moments.card()}, beat=moments.beat(10, vram={"gpu:0": (7 * GIB, 7 * GIB)}))]
    assert frame(readings, moments.announced()).room == Headroom(tokens=3 * 1024, ends="gpu:0", bytes_per_token=MIB)
    said = moments.announced(limits_bytes={"gpu:0": 8 * GIB + 100 * MIB})
    assert frame(readings, said).room == Headroom(tokens=100, ends="gpu:0", bytes_per_token=MIB)
    assert frame(readings, said).words[-1] == "room for 100 more tokens, then gpu:0 ends"


def test_the_context_of_the_model_may_end_first() -> None:
    said = moments.announced(outlook=Outlook(kv={"cpu": [(1, 1), (2048, 2048)]}, context_length=2048))
    found = frame([moments.reading(beat=moments.beat(48))], said)
    assert found.room == Headroom(tokens=2000, ends=CONTEXT)
    assert found.words == ["room for 2,000 more tokens, then the model's context ends"]


def test_no_room_is_told_while_no_text_is_written_or_nothing_is_known_to_grow() -> None:
    assert frame([moments.reading(beat=moments.beat(0, phase="load"))], moments.announced()).room is None
    assert frame([moments.reading(beat=moments.beat(9))], moments.announced(outlook=Outlook())).room is None
    assert frame([moments.reading(beat=moments.beat(9))]).room is None


def test_a_full_tier_has_no_room_and_not_less() -> None:
    assert room([64, 65], [5 * GIB, 5 * GIB], limits_bytes={"cpu": 4 * GIB}).tokens == 0


def test_the_cache_grows_by_the_plan_through_windows_and_beyond_the_last_count() -> None:
    """Half of the layers keep 1,024 tokens at most."""
    said = moments.announced(outlook=Outlook(kv={"cpu": [(1, 200), (1024, 204_800), (2048, 307_200)]}))
    assert [planned_kv(said, "cpu", tokens) for tokens in (0, 1, 512, 1024, 1536, 2048, 3072)] == [
        0,
        200,
        102_400,
        204_800,
        256_000,
        307_200,
        409_600,
    ]
    assert planned_kv(said, "gpu:0", 512) == 0


def test_points_are_those_of_the_present_text_and_count_the_tokens_since_the_last_beat() -> None:
    earlier = moments.growing([500, 510], [GIB, GIB])
    readings = [
        *earlier,
        *(
            moments.reading(10.0 + second, beat=moments.beat(64 + 10 * second, 9.8 + second, made=600 + 10 * second))
            for second in range(3)
        ),
    ]
    assert [round(tokens) for tokens, _ in points_of(readings, "cpu")] == [66, 76, 86]


def test_growth_of_one_point_is_what_is_planned() -> None:
    assert growth([(10, 5)], 2.0) == (5, 2.0, False)


def test_a_few_readings_say_nothing_of_growth_however_steep() -> None:
    few = [(float(tokens), tokens * 64 * MIB) for tokens in range(1, 6)]
    assert growth(few, float(MIB)).slope == MIB
    many = [(float(tokens), tokens * 64 * MIB) for tokens in range(1, 13)]
    assert growth(many, float(MIB)).is_measured
