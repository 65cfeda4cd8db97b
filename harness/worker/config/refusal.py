"""Why transformers makes no model of a config: in its own words where they are for users, else by the key that is at fault.

Its configs check kinds of values (huggingface_hub's strict dataclasses) and say them in words of Python, and what they do not check
ends in an error of Python somewhere in the model. Which key that comes from is found by leaving out one after another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError

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
Attempt = Callable[[Mapping[str, Any]], object]
_WHO = f"transformers {transformers.__version__}"


def sentence_of(error: Exception, config: Mapping[str, Any], attempt: Attempt) -> str:
    """Say what is wrong with a config that ended in an error; `attempt` does again what did, with another config."""
    field = _FIELD.search(str(error)) if isinstance(error, StrictDataclassFieldValidationError) else None
    path = next((path for path in _paths(config) if field is not None and path[-1] == field["field"]), ())
    if path and (wanted := _wanted(error)):
        return f"gives {'.'.join(path)} as {quote(_at(config, path))}, and {_WHO} takes {wanted}"
    cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
    if type(cause) is ValueError:
        return f'{_WHO} refuses it: "{_words(error)}"'
    path = _culprit(config, attempt, _words(error))
    if path:
        return f"gives {'.'.join(path)} as {quote(_at(config, path))}, and {_WHO} makes no model of that"
    return f'{_WHO} makes no model of it ("{_words(error)}")'


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


def _culprit(config: Mapping[str, Any], attempt: Attempt, words: str, within: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the path of the key, as deep inside as it gets, without which the attempt succeeds; none if there is no such key.

    Those whose values the words name are tried first. Where a second fault lies behind, the first without which it is that one.
    """
    table, other = _at(config, within), ()
    for key in sorted(table, key=lambda key: str(table[key]) not in words):
        path = (*within, key)
        found = words if key == "model_type" else _outcome(attempt, _without(config, path))
        if found is None:
            inner = _culprit(config, attempt, words, path) if isinstance(table[key], Mapping) else ()
            return inner or path
        if found != words and not other:
            other = path
    return other


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


def _without(config: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    first, *rest = path
    kept = {key: value for key, value in config.items() if key != first}
    return {**kept, first: _without(config[first], rest)} if rest else kept
