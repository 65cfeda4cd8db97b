"""Dtypes by torch's names, as a table of bits."""

from __future__ import annotations

from collections.abc import Mapping

# Bits of one element.
DTYPE_BITS: Mapping[str, int] = {
    "bool": 8,
    "uint8": 8,
    "int8": 8,
    "uint16": 16,
    "int16": 16,
    "uint32": 32,
    "int32": 32,
    "uint64": 64,
    "int64": 64,
    "float16": 16,
    "bfloat16": 16,
    "float32": 32,
    "float64": 64,
    "complex64": 64,
    "complex128": 128,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2fnuz": 8,
    "float8_e8m0fnu": 8,
    "float4_e2m1": 4,
    "float6_e2m3": 6,
    "float6_e3m2": 6,
}
# Bytes of one element, of the dtypes whose elements are whole bytes.
DTYPE_BYTES: Mapping[str, int] = {name: bits // 8 for name, bits in DTYPE_BITS.items() if bits % 8 == 0}
# The names that torch has for what weights are computed in, which a config may say, by those of the table.
FLOAT_NAMES: Mapping[str, str] = {
    **{name: name for name in DTYPE_BITS if name.startswith(("float16", "float32", "float64", "bfloat16", "float8"))},
    "float4_e2m1fn_x2": "float4_e2m1",
    "half": "float16",
    "float": "float32",
    "double": "float64",
}
