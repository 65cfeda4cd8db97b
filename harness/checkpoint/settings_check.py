"""SETTINGS: what transformers takes in a quantization_config, by method; anything else ends in its errors while it loads.

Said of transformers 5.24 (`utils.quantization_config`) and held against its classes, value by value, by
tests/checkpoint/test_settings_check.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from harness.checkpoint.formats.files import quote
from harness.core.dtypes import FLOAT_NAMES
from harness.core.methods.table import METHODS, TEXT_CONFIGS, method_name

KEY = "quantization_config"


class Setting(NamedTuple):
    """What one key may hold; `wanted` says it in words. A key that is not there is as good, unless it is `required`."""

    key: str
    wanted: str
    takes: Callable[[Any], bool]
    required: bool = False


def fault(config: Mapping[str, Any]) -> str | None:
    """Say what of a config's settings of quantization transformers does not take; None if it takes all, or there are none."""
    places = [config, *(inner for name in TEXT_CONFIGS if isinstance(inner := config.get(name), Mapping))]
    for place in places:
        settings = place.get(KEY)
        if settings is not None and not isinstance(settings, Mapping):
            return f"gives {KEY} as {quote(settings)}, which is no table of settings"
    settings = next((place[KEY] for place in places if place.get(KEY)), None)
    if settings is None:
        is_empty = places[-1].get(KEY) is not None
        return f"gives {KEY} as an empty table, which names no quant_method" if is_empty else None
    return next(_faults(settings), None)


def _faults(settings: Mapping[str, Any]) -> Iterator[str]:
    if settings.get("load_in_4bit") and settings.get("load_in_8bit"):
        yield "says both load_in_4bit and load_in_8bit, and weights are stored in one of them"
    name = settings.get("quant_method")
    if name is not None and not isinstance(name, str):
        yield f"gives {KEY}.quant_method as {quote(name)}, which is no name"
    method = method_name(settings)
    need = NEEDS.get(method)
    if need is not None and not any(isinstance(value := settings.get(key), Mapping) and value for key in need.keys):
        yield f"gives no {KEY}.{' or '.join(need.keys)}, without which transformers {need.otherwise}"
    for one in SETTINGS.get(method, ()):
        wants = f"transformers wants of {METHODS[method].title}: {one.wanted}"
        if one.key not in settings:
            if one.required:
                yield f"gives no {KEY}.{one.key}, which {wants}"
        elif not one.takes(settings[one.key]):
            yield f"gives {KEY}.{one.key} as {quote(settings[one.key])}, and {wants}"


def loading_fault(config: Mapping[str, Any]) -> str | None:
    """Say what of a config, or of that of its text model, transformers does not take as it finds dtype and class; else None."""
    for key in ("dtype", "torch_dtype"):
        said = config.get(key)
        if said is not None and not isinstance(said, dict) and not (isinstance(said, str) and said in FLOAT_NAMES):
            return f"gives {key} as {quote(said)}, and torch has no floating dtype of that name, as is bfloat16"
    classes = config.get("auto_map")
    if not isinstance(classes, dict):
        return "gives auto_map as no table, and transformers looks into it for a class" if "Auto" in str(classes) else None
    wrong = next((name for name, place in classes.items() if not isinstance(place, str | list | dict)), None)
    return f"gives auto_map.{wrong} as {quote(classes[wrong])}, and transformers takes the name of a class" if wrong else None


def generation_fault(config: Mapping[str, Any]) -> str | None:
    """Say what of a generation_config.json transformers does not take when it loads a model; None if it takes all."""
    end, pad = config.get("eos_token_id"), config.get("pad_token_id")
    if not isinstance(end, int | None) and not (isinstance(end, list) and all(isinstance(one, int) for one in end)):
        return f"gives eos_token_id as {quote(end)}, which is no number nor a list of them"
    if not isinstance(pad, int | None):
        return f"gives pad_token_id as {quote(pad)}, which is no number"
    answers, beams = config.get("num_return_sequences") or 1, config.get("num_beams") or 1
    if not isinstance(answers, int) or not isinstance(beams, int) or answers <= beams:
        return None
    if beams == 1:
        what = f"asks for {answers} answers of one beam without do_sample, and transformers refuses that"
        return None if config.get("do_sample") else what
    return f"asks for {answers} answers of {beams} beams, and transformers gives as many as there are beams at most"


class PackedTables(NamedTuple):
    """Tables of settings, one of which says what is packed and how; `otherwise` is what transformers does without any."""

    keys: tuple[str, ...]
    otherwise: str


# None of them is asked for when the config is made: what is missing shows while the model is loaded, or never.
NEEDS: Mapping[str, PackedTables] = {
    "compressed-tensors": PackedTables(("config_groups",), "takes no layer for packed and fills all that are with random numbers"),
    "vptq": PackedTables(("config_for_layers", "shared_layer_config"), "knows the code books of no layer, and ends in an error"),
    "spqr": PackedTables(("shapes",), "knows the size of no packed layer, and ends in an error"),
    "torchao": PackedTables(("quant_type",), "makes no config of the settings"),
}


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
_BITSANDBYTES = (
    Setting("load_in_4bit", _FLAG, _of_kind(bool)),
    Setting("load_in_8bit", _FLAG, _of_kind(bool)),
    Setting("llm_int8_threshold", "a number with a point", _of_kind(float)),
    Setting("llm_int8_skip_modules", "a list of names", _of_kind(list, type(None))),
    Setting("llm_int8_enable_fp32_cpu_offload", _FLAG, _of_kind(bool)),
    Setting("llm_int8_has_fp16_weight", _FLAG, _of_kind(bool)),
    Setting("bnb_4bit_quant_type", "the name of a type", _of_kind(str)),
    Setting("bnb_4bit_use_double_quant", _FLAG, _of_kind(bool)),
)
_FP8 = (
    Setting("weight_block_size", "two numbers above 0", _is_block),
    Setting("activation_scheme", "dynamic or static", _is_scheme),
    Setting("scale_fmt", "float or ue8m0", _one_of("float", "ue8m0")),
    Setting("expert_dtype", "fp8 or fp4", _one_of("fp8", "fp4")),
)
SETTINGS: Mapping[str, tuple[Setting, ...]] = {
    "gptq": (Setting("bits", "2, 3, 4 or 8", _one_of(2, 3, 4, 8), required=True), _GROUP),
    "auto-round": (Setting("bits", "2 to 8", _one_of(2, 3, 4, 5, 6, 7, 8)), _GROUP),
    "awq": (Setting("version", "gemm, gemv, gemv_fast or llm-awq", _is_awq_version),),
    "aqlm": tuple(
        Setting(key, "a whole number", _of_kind(int))
        for key in ("in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook")
    ),
    "bitsandbytes_4bit": _BITSANDBYTES,
    "bitsandbytes_8bit": _BITSANDBYTES,
    "fp8": _FP8,
    "mxfp8": _FP8,
    "metal": (
        Setting("bits", "2, 4 or 8", _one_of(2, 4, 8)),
        Setting("group_size", "a number above 0", lambda value: _is_number(value) and value > 0),
    ),
    "higgs": (
        Setting("bits", "2, 3 or 4", _one_of(2, 3, 4)),
        Setting("p", "1 or 2", _one_of(1, 2)),
        Setting("group_size", "64, 128 or 256", _one_of(64, 128, 256)),
    ),
    "spqr": (
        Setting("bits", "3", lambda value: isinstance(value, int) and value == 3),
        Setting("beta1", "16", lambda value: isinstance(value, int) and value == 16),
        Setting("beta2", "16", lambda value: isinstance(value, int) and value == 16),
    ),
    "bitnet": (
        Setting("linear_class", "bitlinear or autobitlinear", _one_of("bitlinear", "autobitlinear")),
        Setting("quantization_mode", "online or offline", _one_of("online", "offline")),
    ),
    "sinq": (Setting("method", "sinq or asinq", lambda value: str(value).lower() in ("sinq", "asinq")),),
}
