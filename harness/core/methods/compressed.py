"""What compressed-tensors takes of a quantization_config, as its own classes answered: `data/compressed_tensors.json`.

`python -m tests.support.compressed_settings` asks a new release; a test holds the file against the one that is installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_PROBED = "float16"  # the dtype of the module that was asked how it is unpacked
# What tells schemes apart that are stored otherwise, and those that are unpacked otherwise.
_SCHEME_KEYS = ("num_bits", "type", "strategy", "group_size")
_UNPACKING_KEYS = (*_SCHEME_KEYS, "symmetric", "block_structure", "scale_dtype")
_PATTERN = "re:"
# Formats of sparse weights that the library names and has no class for, and what read them: vLLM took its kernels out (its pull
# requests 32688 and 36799).
READERS: Mapping[str, str] = {
    "sparse-bitmask": "compressed-tensors of 2025",
    "sparse-24-bitmask": "vLLM of 2025",
    "marlin-24": "vLLM of 2025",
}
_ANOTHER = "take another checkpoint, or the 16-bit one"


class FormatLoading(Record, frozen=True, kw_only=True):
    """What transformers does with weights while it loads and at the first forward pass."""

    stored: str | None  #: the format of the files; None: there are several
    apart: bool = False  #: modules outside of experts are packed in several ways, and transformers unpacks in one while it loads
    whole: bool = True  #: all can be unpacked while loading; else the first forward pass does it
    dtype: str | None = None  #: the only dtype that weights have after the first forward pass
    scales: str | None = None  #: the dtype that scales of 8 bits have then
    # Outputs and inputs whose multiples unpacked weights fill, where their scales have the dtype asked for: the library pads them
    # to whole blocks, and what it returns is a view (quantization/lifecycle/forward.py, `_process_block`).
    filled: tuple[int, int] | None = None
    fault: str | None = None  #: why that does not work


class _Unpacking(Record, frozen=True, kw_only=True):
    """How a format is unpacked: by which functions, and the dtypes of weight and scales of a module of float16 thereafter."""

    by: str
    weight: str
    weight_scale: str


class _Answers(Record, frozen=True, kw_only=True):
    """By value, written as JSON, why the library refuses it; None: it takes it."""

    version: str
    arguments: tuple[str, ...]
    of_a_group: tuple[str, ...]
    words: dict[str, dict[str, str | None]]
    statuses: dict[str, str | None]
    formats: dict[str, str | None]
    unpacked: dict[str, _Unpacking]  #: the formats that it has a class for, which transformers asks for while it loads
    inferred: tuple[tuple[str, int, int, str | None, str | None, str], ...]  #: type, bits, group, inputs, dtype of scales: format
    unfilled: tuple[tuple[str, str], ...]  #: formats and strategies whose zero points a module has no room for as they are stored
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
    said = line(json.dumps(value), _SHOWN)
    return f"{_library()} does not take {where} = {said} ({why.rstrip('.')}): {_ANOTHER}"


def loading(settings: Mapping[str, Any], holds: Callable[[str], bool] | None = None) -> FormatLoading:
    """Return what transformers does with weights; `holds` says whether the files hold any in a format, None if that is not known.

    A group's own format counts. Where it has none, transformers unpacks by that at the top while it loads, and the library by one
    that it infers from the scheme, at the first forward pass: the files are taken to be in the first of both that they may be in.
    """
    known, top, schemes = _answers().unpacked, settings.get("format"), schemes_in(settings)
    if not schemes:
        return FormatLoading(stored=top if isinstance(top, str) else None)
    inferred = [one.get("format") or _inferred(one) for one in schemes]
    fits = isinstance(top, str) and top in known and (holds is None or holds(top))
    stored = [one.get("format") or (str(top) if fits else _inferred(one)) for one in schemes]
    dense = [(*_way(one), form) for one, form in zip(schemes, stored, strict=True) if not is_of_experts(one)]
    apart = len(set(dense)) > 1
    whole = not apart and all(_is_unpacked_alike(one.get("format") or top, form) for one, form in zip(schemes, stored, strict=True))
    kept = [known[form] for form in inferred if form in known]
    narrow = {one.weight for one in kept} - {_PROBED}
    return FormatLoading(
        stored=stored[0] if len(set(stored)) == 1 else None,
        apart=apart,
        whole=whole,
        dtype=next(iter(sorted(narrow)), None),
        scales=next((one.weight_scale for one in kept if one.weight_scale != _PROBED), None),
        filled=next((block for one in schemes if whole and (block := _block(one["weights"])) is not None), None),
        fault=next(_unloadable(schemes, stored, [] if whole else inferred, holds), None),
    )


def _unloadable(
    schemes: Sequence[Mapping[str, Any]], stored: Sequence[str], unpacked_by: Sequence[str], holds: Callable[[str], bool] | None
) -> Iterator[str]:
    """Say why weights cannot be unpacked by formats at the first forward pass; without formats, while they are loaded."""
    known = _answers()
    for form in stored:
        if form not in known.unpacked and (holds is None or holds(form)):
            what = f"{_library()} unpacks no weights of the format {line(json.dumps(form), _SHOWN)}"
            yield f"{what}, which {READERS[form]} reads: {_ANOTHER}" if form in READERS else f"{what}: {_ANOTHER}"
    for one, form, by in zip(schemes, stored, unpacked_by, strict=False):
        weights = one["weights"]
        if not _is_unpacked_alike(by, form):
            yield f"{_library()} unpacks weights in {form} as {by}, where groups say no format: {_ANOTHER}"
        if weights.get("symmetric") is False and (by, _strategy(weights)) in known.unfilled:
            why = f"transformers makes modules for other zero points than {by} stores, where it does not unpack while loading"
            yield f"{why} (of groups that are packed in several ways): {_ANOTHER}"


def _is_unpacked_alike(one: Any, other: str) -> bool:
    known = _answers().unpacked
    return isinstance(one, str) and one in known and other in known and known[one].by == known[other].by


def _inferred(scheme: Mapping[str, Any]) -> str:
    """Return the format that the library takes for a scheme without one, "" for one that it does not take at all."""
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    size = weights.get("group_size")
    kind = _folded(inputs.get("type", "int")) if isinstance(inputs, Mapping) else None
    scales = weights.get("scale_dtype")
    asked = (
        _folded(weights.get("type", "int")),
        weights.get("num_bits", 8),
        size if any(row[2] == size for row in _answers().inferred) else _GROUP,
        kind,
        scales if any(row[4] == scales for row in _answers().inferred) else None,
    )
    return next((form for *one, form in _answers().inferred if tuple(one) == asked), "")


def _strategy(weights: Mapping[str, Any]) -> str:
    """Return the strategy of weights; where the config names none, the group size implies it, as in the library."""
    said, size = _folded(weights.get("strategy")), weights.get("group_size")
    return str(said or ("tensor" if size is None else "group" if isinstance(size, int) and size > 0 else "channel"))


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the sides of the blocks that weights are scaled in; None of other strategies."""
    sides = weights.get("block_structure")
    if _strategy(weights) != "block" or not isinstance(sides, list) or len(sides) != 2:
        return None
    outputs, inputs = sides
    return (outputs, inputs) if type(outputs) is int and type(inputs) is int and min(sides) > 0 else None


def _way(scheme: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(scheme["weights"].get(key)) for key in _UNPACKING_KEYS)


def schemes_in(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups of layers of a quantization_config that say how their weights are packed."""
    listed = [_whole(name, group) for name, group in _groups(settings).items()]
    return [group for group in listed if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)]


def _whole(name: str, group: Any) -> Any:
    """Return a group with its weights, which one that lists targets alone has from its name."""
    return {"targets": group, "weights": preset(name)} if isinstance(group, list) else group


def differ(schemes: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether groups of layers are packed in more than one way."""
    return len({tuple(str(one["weights"].get(key)) for key in _SCHEME_KEYS) for one in schemes}) > 1


def is_of_experts(scheme: Mapping[str, Any]) -> bool:
    """Say whether a group of layers singles out the experts of a mixture (transformers' `get_dense_scheme`)."""
    return any(target.startswith(_PATTERN) and "experts" in target for target in _targets(scheme))


def scheme_number(settings: Mapping[str, Any], module: str) -> int | None:
    """Return the number of the scheme that names a module by its path, or by a pattern of it; None if none does."""
    named = enumerate(schemes_in(settings))
    return next((number for number, one in named if any(_meets(target, module) for target in _targets(one))), None)


def _targets(scheme: Mapping[str, Any]) -> list[str]:
    targets = scheme.get("targets")
    return [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []


def _meets(target: str, module: str) -> bool:
    if not target.startswith(_PATTERN):
        return target == module
    try:
        return re.match(target.removeprefix(_PATTERN), module) is not None
    except re.error:
        return False


def preset(name: str) -> Mapping[str, Any] | None:
    """Return what the library means by the name of a group that lists targets alone: how their weights are packed."""
    return _answers().presets.get(name.upper())


def _library() -> str:
    return f"{TITLE} {_answers().version.rpartition('.')[0]}"


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
    sparsity = settings.get("sparsity_config")
    form = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if isinstance(form, str) and form in READERS:
        yield "sparsity_config.format", form, f"it unpacks none such, and {READERS[form]} reads them"
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
