"""Rewrite the golden of the present format of results: python -m tests.support.goldens

`data/results-now.jsonl` has a line in which every field of a result is filled, made from the types, and a bare one. When a test
says that it has changed, the format has. Then all goldens of older formats must still be read as they are: they are never
rewritten. After a release, copy the golden to `results-vN-RELEASE.jsonl` beside it; that copy is one of them from then on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from harness.core.records import SCHEMA, Result, encode_record
from tests.support import builders

DATA = Path(__file__).parents[1] / "data"
NOW = DATA / "results-now.jsonl"


def lines() -> bytes:
    """Write a full and a bare result."""
    full = msgspec.convert(_filled(inspect.type_info(Result), "result"), Result)
    return b"".join(encode_record(each) + b"\n" for each in (full, builders.result()))


def _filled(kind: inspect.Type, name: str) -> Any:
    """Make a value of a type that is not the default of any field, in plain dicts and lists."""
    if isinstance(kind, inspect.StructType):
        return {field.encode_name: SCHEMA if field.name == "schema" else _filled(field.type, field.name) for field in kind.fields}
    if isinstance(kind, inspect.UnionType):
        return _filled(next(each for each in kind.types if not isinstance(each, inspect.NoneType)), name)
    if isinstance(kind, inspect.DictType):
        return {f"a {name}": _filled(kind.value_type, name)}
    if isinstance(kind, (inspect.ListType, inspect.VarTupleType)):
        return [_filled(kind.item_type, name)]
    if isinstance(kind, inspect.EnumType):
        return list(kind.cls)[-1].value
    simple = {inspect.StrType: f"the {name}", inspect.IntType: 7, inspect.FloatType: 0.5, inspect.BoolType: True}
    return simple[type(kind)]


if __name__ == "__main__":
    NOW.write_bytes(lines())
    print(f"wrote {NOW}")
