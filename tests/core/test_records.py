"""The records: strict, frozen, one line of JSON each, and what they derive."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from typing import Any

import msgspec
import pytest

from harness.core import records as records
from harness.core.records import SCHEMA, Case, Machine, Outcome, Record, Result, Tier, Verdict, encode_record, to_builtins
from harness.core.units import GIB
from tests.support import builders
from tests.support.builders import machine, result

RECORDS = [each for each in vars(records).values() if isinstance(each, type) and issubclass(each, Record) and each is not Record]
# Numbers that count things have no unit; max_memory is what transformers calls it, corrections are ratios.
NO_UNIT = {"prompt_tokens", "new_tokens", "images", "batch", "repeats", "cores", "schema", "max_memory", "corrections"} | {
    "cpus",
    "cpu_throttles",
    "threads",
}
UNITS = ("_bytes", "_s", "_tok_s", "_j", "_cores", "_mhz", "_share")


def test_a_case_is_named_by_what_is_crossed() -> None:
    assert Case(model="chatglm-6b", precision="int4", placement="gpu+cpu").id == "chatglm-6b/int4/gpu+cpu"


def test_the_workload_is_part_of_a_case_but_not_of_its_name() -> None:
    short, long = builders.case(new_tokens=8), builders.case(new_tokens=80)
    assert short.id == long.id
    assert short != long


@pytest.mark.parametrize(
    ("free", "limit", "capacity"),
    [(6, 8, 6), (8, 6, 6), (None, 8, 8), (8, None, 8), (None, None, 12), (0, 8, 0)],
)
def test_a_case_may_use_the_least_of_free_and_allowed(free: int | None, limit: int | None, capacity: int) -> None:
    assert Tier(name="cpu", kind="cpu", total_bytes=12, free_bytes=free, limit_bytes=limit).capacity_bytes == capacity


def test_a_tier_of_which_nothing_is_known_has_no_capacity() -> None:
    assert Tier(name="disk", kind="disk").capacity_bytes is None


def test_a_machine_finds_its_tiers_by_name() -> None:
    two = machine(builders.gpu(0), builders.gpu(1))
    assert [tier.name for tier in two.gpus] == ["gpu:0", "gpu:1"]
    assert two.tier("gpu:1") is two.tiers[1]
    assert two.tier("gpu:2") is None


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_records_are_frozen_strict_and_by_keyword(kind: type[Record]) -> None:
    config = kind.__struct_config__
    assert config.frozen
    assert config.forbid_unknown_fields
    assert not [each for each in inspect.signature(kind).parameters.values() if each.kind is not each.KEYWORD_ONLY]


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_quantities_carry_their_unit_in_the_name(kind: type[Record]) -> None:
    if kind in (records.Span, records.Makeup, records.Result):  # the first two have the unit of what holds them, metrics METRICS
        return
    numbers = {name for name, annotation in typing.get_type_hints(kind).items() if numbers_in(annotation) & {int, float}}
    assert not [name for name in numbers - NO_UNIT if not name.endswith(UNITS)]
    assert not [
        name
        for name, annotation in typing.get_type_hints(kind).items()
        if name.endswith("_bytes") and float in numbers_in(annotation)
    ]


def numbers_in(annotation: Any) -> set[Any]:
    """Return the plain types of a field's numbers, also those in lists and mappings; a device map's are places, not numbers."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (dict, tuple, list):
        inside = inside[-1:]
    if isinstance(annotation, types.UnionType) and str in inside:
        return set()
    return {annotation} if not inside else set().union(*map(numbers_in, inside))


def test_a_result_is_one_line_whatever_it_holds() -> None:
    line = encode_record(result(why="two\nlines\r\u2028", log_tail="a\nb", metrics={"load_s": 0.1}))
    assert b"\n" not in line
    assert b"\r" not in line
    assert json.loads(line)["why"] == "two\nlines\r\u2028"


def test_a_result_comes_back_as_it_was() -> None:
    whole = result(
        metrics={"load_s": 1 / 3, "ram_peak_bytes": 2**53},
        phases=[records.Phase(name="load", start_s=0.1, end_s=2.0, ram_peak_bytes=GIB, vram_peak_bytes={"gpu:0": 5})],
        timeline=records.Timeline(t_s=[0.05], ram_bytes=[GIB], ram_anon_bytes=[1], vram_bytes={"gpu:0": [2]}),
        loaded=builders.loaded(),
        quality=records.Quality(probe="1", verdict="intact", why="because"),
        environment={"torch": "2.9"},
    )
    assert msgspec.json.decode(encode_record(whole), type=Result) == whole


def test_outcomes_and_verdicts_are_stored_as_their_words() -> None:
    plain = to_builtins(result(outcome=Outcome.OOM, verdict=Verdict.TOO_BIG))
    assert (plain["outcome"], plain["verdict"], plain["schema"]) == ("oom", "too_big", SCHEMA)
    assert type(plain["outcome"]) is str


@pytest.mark.parametrize(
    "change", [{"speed": 3}, {"outcome": "melted"}, {"metrics": {"load_s": "fast"}}, {"case": "tiny/bf16/cpu"}]
)
def test_a_result_with_anything_else_in_it_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(to_builtins(result()) | change, Result)


def test_the_format_s_history_tells_of_the_current_schema_and_no_later() -> None:
    told = re.findall(r"^(\d+)\. \d{4}-\d{2}: ", records.__doc__ or "", re.MULTILINE)
    assert [int(number) for number in told] == list(range(1, SCHEMA + 1))


def test_the_records_have_a_json_schema() -> None:
    schema = msgspec.json.schema(Result)
    assert schema["$defs"]["Result"]["additionalProperties"] is False
    assert set(schema["$defs"]["Outcome"]["enum"]) == {outcome.value for outcome in Outcome}


def test_equal_machines_are_equal_whoever_probed_them() -> None:
    again = msgspec.json.decode(encode_record(machine(builders.gpu())), type=Machine)
    assert again == machine(builders.gpu())


@pytest.mark.parametrize(
    ("limits", "id_"),
    [
        ({}, "tiny/bf16/cpu"),
        ({"vram_bytes": 8 * GIB}, "tiny/bf16/cpu@vram8GiB"),
        ({"vram_bytes": 12 * 10**9, "ram_bytes": 3 * GIB // 2}, "tiny/bf16/cpu@vram12GB@ram1536MiB"),
    ],
)
def test_the_id_of_a_case_says_its_limits(limits: dict[str, int], id_: str) -> None:
    assert msgspec.structs.replace(builders.case(), **limits).id == id_


def test_a_case_from_before_there_were_limits_has_none() -> None:
    plain = to_builtins(builders.case())
    del plain["vram_bytes"], plain["ram_bytes"]
    assert msgspec.convert(plain, records.Case) == builders.case()
