"""Why transformers makes no model of a config: in its own words where they are for users, else by the key that is at fault.

Its configs check kinds of values (huggingface_hub's strict dataclasses) and say them in words of Python, and what they do not check
ends in an error of Python somewhere in the model. Which keys that comes from is found by leaving out one after another: first those
that the module reads in which it ended.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from torch import nn

from harness.checkpoint.formats.files import quote

# What transformers' configs and models raise for values that contradict each other, or are of another kind.
CONTRADICTIONS = (
    StrictDataclassError,
    ValueError,
    TypeError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
)
_FIELD = re.compile(r"Validation error for field '(?P<field>[^']*)'")
_READ = re.compile(r"config\.(\w+)")  # what the source of a module's class reads of its config
_WANTED = re.compile(r"expected (?:an? )?(one of \([^)]*\)|\w+)")
_KINDS: Mapping[str, str] = {
    "int": "a whole number",
    "float": "a number with a point",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
    "None": "null",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "Sequence": "a list",
    "dict": "a table",
}
_MOST_KEYS = 3
Attempt = Callable[[Mapping[str, Any]], object]
_WHO = f"transformers {transformers.__version__}"


def is_of_the_pass(error: Exception, decoder: nn.Module) -> bool:
    """Tell whether an error says no more than that meta tensors have no values, or that an input lacks, as does an image."""
    said = str(error)
    lacking = (name for name in inspect.signature(decoder.forward).parameters if name not in ("self", "kwargs"))
    return (
        isinstance(error, NotImplementedError) or "meta tensor" in said or any(re.search(rf"\b{name}\b", said) for name in lacking)
    )


def sentence_of(error: Exception, config: Mapping[str, Any], attempt: Attempt) -> str:
    """Say what is wrong with a config that ended in an error; `attempt` does again what did, with another config."""
    field = _FIELD.search(str(error)) if isinstance(error, StrictDataclassFieldValidationError) else None
    path = next((path for path in _paths(config) if field is not None and path[-1] == field["field"]), ())
    if path and (wanted := _wanted(error)):
        return f"gives {_given(config, path)}, and {_WHO} takes {wanted}"
    words = _words(error)
    paths = (_read_culprits(error, config, attempt) or _culprits(config, attempt, words))[:_MOST_KEYS]
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
    given = " and ".join(_given(config, path) for path in paths)
    if type(cause) is ValueError:
        return f'{f"gives {given}, and " if given else ""}{_WHO} refuses it: "{words}"'
    if len(paths) > 1:
        return f"gives {given}, and {_WHO} makes no working model of these together"
    if paths:
        return f"gives {given}, and {_WHO} makes no working model of that{_otherwise(config, paths[0])}"
    return f'{_WHO} makes no working model of it ("{words}")'


def _given(config: Mapping[str, Any], path: Sequence[str]) -> str:
    return f"{'.'.join(path)} as {quote(_at(config, path))}"


def _otherwise(config: Mapping[str, Any], path: Sequence[str]) -> str:
    """Say what transformers takes where a key is not given; nothing where that is no plain value."""
    usual = _usual(config, path)
    return f" (without the key it takes {quote(usual)})" if isinstance(usual, bool | int | float | str) else ""


def _usual(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Return what transformers takes where a key is not given, None where it says nothing."""
    *within, key = path
    kind = str(_at(config, within).get("model_type"))
    return getattr(transformers.CONFIG_MAPPING[kind], key, None) if kind in transformers.CONFIG_MAPPING else None


def _words(error: Exception) -> str:
    """Return the last line of what an error says, which of strict dataclasses is that of their cause."""
    said = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ is not None else error
    return (str(said).strip().splitlines() or [""])[-1].strip().rstrip(".")


def _wanted(error: BaseException) -> str | None:
    """Say in words what the field of a strict dataclass takes."""
    texts, one = [], error.__cause__
    while one is not None:
        texts.append(str(one))
        one = one.__cause__
    found = _WANTED.findall("\n".join(texts))
    words = dict.fromkeys(_KINDS.get(kind, kind if kind.startswith("one of") else "a table") for kind in found)
    return " or ".join(words) or None


def _read_culprits(error: Exception, config: Mapping[str, Any], attempt: Attempt) -> list[tuple[str, ...]]:
    """Return the path of each key that the module reads in which an error rose, and that changes it; else of one around that.

    A size is tried without the key, and as 1: what is usual may contradict the others as well.
    """
    words, left = _words(error), [path for path in _paths(config) if path[-1] != "model_type"]
    for module in reversed(_modules(error)):
        read = set(_READ.findall(inspect.getsource(module)))
        paths = [path for path in left if read & _names(config, path)]
        left = [path for path in left if path not in paths]
        cures, others = [], []
        for path in paths:
            value = _at(config, path)
            tries = [_with(config, path)] + ([_with(config, path, 1)] if type(value) is int and value > 1 else [])
            said = [_outcome(attempt, one) for one in tries]
            if None in said:
                cures += _culprits(config, attempt, words, path) or [path] if isinstance(value, Mapping) else [path]
            elif said[0] != words and not isinstance(value, type(_usual(config, path))):  # of another kind, before a second fault
                others.append(path)
        if cures or others:
            return list(dict.fromkeys(cures)) or others[:1]
    return []


def _modules(error: Exception) -> list[type[nn.Module]]:
    """Return the classes of transformers' modules that an error came through, the outermost first."""
    owners = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    kinds = (type(one) for one in owners if isinstance(one, nn.Module))
    return list(dict.fromkeys(kind for kind in kinds if kind.__module__.startswith("transformers.models.")))


def _names(config: Mapping[str, Any], path: Sequence[str]) -> set[str]:
    """Return what transformers' config calls a key, which may have another name there."""
    *within, key = path
    kind = str(_at(config, within).get("model_type"))
    others = transformers.CONFIG_MAPPING[kind].attribute_map if kind in transformers.CONFIG_MAPPING else {}
    return {key, others.get(key, key), *(name for name, other in others.items() if other == key)}


def _culprits(config: Mapping[str, Any], attempt: Attempt, words: str, within: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of each key, as deep inside as it gets, without which the attempt succeeds; none if there is no such key.

    Values that contradict each other are several. Where a second fault lies behind, the first without which it is that one.
    """
    table, other = _at(config, within), ()
    found: list[tuple[str, ...]] = []
    for key in table:
        path = (*within, key)
        said = words if key == "model_type" else _outcome(attempt, _with(config, path))
        if said is None:
            inner = _culprits(config, attempt, words, path) if isinstance(table[key], Mapping) else ()
            found += inner or [path]
        elif said != words and not other:
            other = path
    return found or ([other] if other else [])


def _outcome(attempt: Attempt, config: Mapping[str, Any]) -> str | None:
    """Return what the error of an attempt says, None if it succeeds."""
    try:
        attempt(config)
    except CONTRADICTIONS as error:
        return _words(error)
    return None


def _paths(config: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of all keys, those of a table before its own."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _paths(value, (*before, key))
        yield (*before, key)


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = config
    for key in path:
        value = value[key]
    return value


def _with(config: Mapping[str, Any], path: Sequence[str], *value: Any) -> dict[str, Any]:
    """Return a config with another value at a path, or without the key."""
    first, *rest = path
    kept = {key: value for key, value in config.items() if key != first}
    if rest:
        return {**kept, first: _with(config[first], rest, *value)}
    return {**kept, first: value[0]} if value else kept
