"""What transformers takes in a quantization_config, setting by setting: the rows of METHODS name what is said here of theirs.

Said of transformers 5.24 (`utils.quantization_config`) and held against its classes, value by value, by
tests/checkpoint/test_settings_check.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """What one key may hold; `wanted` says it in words. A key that is not there is as good, unless it is `required`."""

    key: str
    wanted: str
    takes: Callable[[Any], bool]
    required: bool = False


class PackedTables(NamedTuple):
    """Tables of settings, one of which says what is packed and how; `otherwise` is what transformers does without any."""

    keys: tuple[str, ...]
    otherwise: str


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _of_kind(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _is_group(value: Any) -> bool:
    return _is_number(value) and (value > 0 or value == -1)


def _is_block(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(_is_number(side) and side > 0 for side in value))


def _is_scheme(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ("dynamic", "static")


def _is_awq_version(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.lower() in _AWQ_VERSIONS)


_AWQ_VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")
_GROUP = Setting("group_size", "a number above 0, or -1 for whole columns", _is_group)
_FLAG = "true or false"
BITSANDBYTES = (
    Setting("load_in_4bit", _FLAG, _of_kind(bool)),
    Setting("load_in_8bit", _FLAG, _of_kind(bool)),
    Setting("llm_int8_threshold", "a number with a point", _of_kind(float)),
    Setting("llm_int8_skip_modules", "a list of names", _of_kind(list, type(None))),
    Setting("llm_int8_enable_fp32_cpu_offload", _FLAG, _of_kind(bool)),
    Setting("llm_int8_has_fp16_weight", _FLAG, _of_kind(bool)),
    Setting("bnb_4bit_quant_type", "the name of a type", _of_kind(str)),
    Setting("bnb_4bit_use_double_quant", _FLAG, _of_kind(bool)),
)
FP8 = (
    Setting("weight_block_size", "two numbers above 0", _is_block),
    Setting("activation_scheme", "dynamic or static", _is_scheme),
    Setting("scale_fmt", "float or ue8m0", _one_of("float", "ue8m0")),
    Setting("expert_dtype", "fp8 or fp4", _one_of("fp8", "fp4")),
)
GPTQ = (Setting("bits", "2, 3, 4 or 8", _one_of(2, 3, 4, 8), required=True), _GROUP)
AUTO_ROUND = (Setting("bits", "2 to 8", _one_of(2, 3, 4, 5, 6, 7, 8)), _GROUP)
AWQ = (Setting("version", "gemm, gemv, gemv_fast or llm-awq", _is_awq_version),)
AQLM = tuple(
    Setting(key, "a whole number", _of_kind(int))
    for key in ("in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook")
)
METAL = (
    Setting("bits", "2, 4 or 8", _one_of(2, 4, 8)),
    Setting("group_size", "a number above 0", lambda value: _is_number(value) and value > 0),
)
HIGGS = (
    Setting("bits", "2, 3 or 4", _one_of(2, 3, 4)),
    Setting("p", "1 or 2", _one_of(1, 2)),
    Setting("group_size", "64, 128 or 256", _one_of(64, 128, 256)),
)
SPQR = (
    Setting("bits", "3", lambda value: isinstance(value, int) and value == 3),
    Setting("beta1", "16", lambda value: isinstance(value, int) and value == 16),
    Setting("beta2", "16", lambda value: isinstance(value, int) and value == 16),
)
BITNET = (
    Setting("linear_class", "bitlinear or autobitlinear", _one_of("bitlinear", "autobitlinear")),
    Setting("quantization_mode", "online or offline", _one_of("online", "offline")),
)
SINQ = (Setting("method", "sinq or asinq", lambda value: str(value).lower() in ("sinq", "asinq")),)
