"""What compressed-tensors takes of a quantization_config, as its own classes answered: `data/compressed_tensors.json`.

`python -m tests.support.compressed_settings` asks a new release; a test holds the file against the one that is installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import msgspec

from harness.core.records import Record
from harness.core.text import line
from harness.data import DATA

TITLE = "compressed-tensors"
_GROUP = 128  # stands for any size of a group in what was asked, as -2 does for any below -1
_WIDEST = 16  # the most bits that were asked for
_ARGUMENTS = ("weights", "input_activations", "output_activations")
_SHOWN = 60


class _Answers(Record, frozen=True, kw_only=True):
    """By value, written as JSON, why the library refuses it; None: it takes it."""

    version: str
    arguments: tuple[str, ...]
    of_a_group: tuple[str, ...]
    words: dict[str, dict[str, str | None]]
    statuses: dict[str, str | None]
    formats: dict[str, str | None]
    unpacked: tuple[str, ...]  #: the formats that it has a class for, which transformers asks for while it loads
    widths: dict[str, tuple[int, ...]]  #: by type
    refused: tuple[tuple[str | None, int | None, tuple[int, ...] | None, str | bool, str], ...]
    activations: tuple[tuple[str | None, int | None, str], ...]  #: strategy and size of a group, of inputs
    ordered_activations: str
    presets: dict[str, dict[str, Any] | None]  #: the weights of a group that is called so


@cache
def _answers() -> _Answers:
    return msgspec.json.decode((DATA / "compressed_tensors.json").read_bytes(), type=_Answers)


def settings_refusal(settings: Mapping[str, Any]) -> str | None:
    """Say which setting the library does not take, with its own reason; None if it takes all."""
    found = next(_faults(settings), None)
    if found is None:
        return None
    where, value, why = found
    known = _answers().version.rpartition(".")[0]
    said = line(json.dumps(value), _SHOWN)
    return f"{TITLE} {known} does not take {where} = {said} ({why.rstrip('.')}): take another checkpoint, or the 16-bit one"


def unpacks_format(settings: Mapping[str, Any]) -> bool:
    """Say whether transformers finds a class for every format while it loads, to unpack by."""
    named = [group.get("format") or settings.get("format") for group in _groups(settings).values() if isinstance(group, Mapping)]
    return all(name in _answers().unpacked for name in named or [settings.get("format")])


def preset(name: str) -> Mapping[str, Any] | None:
    """Return what the library means by the name of a group that lists targets alone: how their weights are packed."""
    return _answers().presets.get(name.upper())


def _groups(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    groups = settings.get("config_groups")
    return groups if isinstance(groups, Mapping) else {}


_Fault = tuple[str, Any, str]


def _faults(settings: Mapping[str, Any]) -> Iterator[_Fault]:
    known = _answers()
    if "quantization_status" in settings:
        yield from _word("quantization_status", settings["quantization_status"], known.statuses)
    for name, group in _groups(settings).items():
        where = f"config_groups.{name}"
        if isinstance(group, list):
            if name.upper() not in known.presets:
                yield where, group, "it is no scheme that is known by its name"
        elif isinstance(group, Mapping):
            yield from _of_group(where, group)
        else:
            yield where, group, "it is neither a scheme nor a list of targets"
    cache_scheme = settings.get("kv_cache_scheme")
    if isinstance(cache_scheme, Mapping):
        yield from _of_arguments("kv_cache_scheme", cache_scheme)


def _of_group(where: str, group: Mapping[str, Any]) -> Iterator[_Fault]:
    known = _answers()
    yield from ((f"{where}.{key}", value, "it knows no such key") for key, value in group.items() if key not in known.of_a_group)
    yield from _word(f"{where}.format", group.get("format"), known.formats)
    for key in _ARGUMENTS:
        given = group.get(key)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            yield f"{where}.{key}", given, "it is no table"
            continue
        yield from _of_arguments(f"{where}.{key}", given)
        if key != _ARGUMENTS[0] and given.get("actorder") is not None:
            yield f"{where}.{key}.actorder", given["actorder"], known.ordered_activations
    inputs = group.get("input_activations")
    if isinstance(inputs, Mapping):
        asked = (_folded(inputs.get("strategy")), _size(inputs.get("group_size")))
        yield from ((f"{where}.input_activations", dict(inputs), why) for *one, why in known.activations if tuple(one) == asked)


def _of_arguments(where: str, given: Mapping[str, Any]) -> Iterator[_Fault]:
    known = _answers()
    yield from ((f"{where}.{key}", value, "it knows no such key") for key, value in given.items() if key not in known.arguments)
    for key, answers in known.words.items():
        if key in given:
            yield from _word(f"{where}.{key}", given[key], answers)
    bits, kind = given.get("num_bits", 8), _folded(given.get("type", "int"))
    has = known.widths.get(str(kind), ())
    if isinstance(bits, int) and given.get("zp_dtype") is None and has and min(bits, _WIDEST) not in has:
        yield f"{where}.num_bits", bits, f"of type {kind} it has {', '.join(map(str, has))} bits"
    block = given.get("block_structure")
    asked = (
        _folded(given.get("strategy")),
        _size(given.get("group_size")),
        None if block is None else (_GROUP, _GROUP),
        _folded(given.get("dynamic", False)),
    )
    for *one, why in known.refused:
        if tuple(one) == asked and [type(value) for value in one] == [type(value) for value in asked]:
            yield f"{where}.strategy", given.get("strategy"), why


def _size(group: Any) -> Any:
    """Return what stands for the size of a group in what was asked."""
    return (_GROUP if group > 0 else max(group, -2)) if isinstance(group, int) else group


def _word(where: str, value: Any, answers: Mapping[str, str | None]) -> Iterator[_Fault]:
    spelled = (value.lower(), value.upper()) if isinstance(value, str) and json.dumps(value) not in answers else (value,)
    whys = [answers.get(json.dumps(one), "it knows no such word") for one in spelled]
    yield from ((where, value, why) for why in whys if why is not None)


def _folded(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
