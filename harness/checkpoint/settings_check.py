"""What of a quantization_config transformers does not take, by the row of its method; it ends in its errors while it loads.

Said of transformers 5.24 (`utils.quantization_config`) and held against its classes, value by value, by
tests/checkpoint/test_settings_check.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.checkpoint.formats.files import quote
from harness.core.dtypes import FLOAT_NAMES
from harness.core.methods.config import TEXT_CONFIGS, method_name
from harness.core.methods.table import METHODS

KEY = "quantization_config"


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
    method = METHODS.get(method_name(settings))
    if method is None:
        return
    need = None if method.faults is not None and method.faults(settings) else method.tables  # which says more
    if need is not None and not any(isinstance(value := settings.get(key), Mapping) and value for key in need.keys):
        yield f"gives no {KEY}.{' or '.join(need.keys)}, without which transformers {need.otherwise}"
    for one in method.settings:
        wants = f"transformers wants of {method.title}: {one.wanted}"
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
