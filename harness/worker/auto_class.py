"""Which of transformers' Auto classes loads a checkpoint, by its config: asked of transformers' own tables.

Models are measured that write text one token after another from a prompt of text: what AutoModelForCausalLM loads, and of what
AutoModelForImageTextToText loads the decoders, whose prompts may be text alone. All others are told apart by the class that their
config names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from harness.architecture.ask_worker import NotMeasured

MEASURED = (AutoModelForCausalLM, AutoModelForImageTextToText)
# Tables that repeat what others say more precisely.
_LAST = ("AutoModelForPreTraining", "AutoModelForMultimodalLM", "AutoModelForTextEncoding", "AutoModel")
# What the names of the tables do not say in plain words; the others are read as they are written.
NOUNS: Mapping[str, str] = {
    "AutoModelForSeq2SeqLM": "an encoder-decoder",
    "AutoModelForMaskedLM": "an encoder, trained to fill gaps",
    "AutoModelForSpeechSeq2Seq": "a model that writes down speech",
    "AutoModelForCTC": "a model that writes down speech",
    "AutoModelForTextEncoding": "an encoder",
    "AutoModelForMultimodalLM": "a model of several kinds of input",
    "AutoModelForPreTraining": "a model for training",
}


def auto_class_of(config: Any, named: str | None) -> Any:
    """Return the Auto class that loads a model of this config; `named` is the class that its config.json names, if any.

    Raises:
        NotMeasured: it is no decoder; the sentence says what it is and what loads it.
    """
    for auto in MEASURED:
        if named in _classes(auto, config) and not config.is_encoder_decoder:
            return auto
    other = next((auto for auto in _tables() if named in _classes(auto, config)), None)
    if other is not None and other not in MEASURED:
        raise NotMeasured(_sentence(str(named), other.__name__))
    if config.is_encoder_decoder:
        first = next((auto for auto in _tables() if _classes(auto, config)), transformers.AutoModel)
        raise NotMeasured(_sentence(named or type(config).__name__, first.__name__, "an encoder-decoder"))
    able = next((auto for auto in MEASURED if _classes(auto, config)), None)
    if able is None:
        first = next((auto for auto in (*_tables(), transformers.AutoModel) if _classes(auto, config)), transformers.AutoModel)
        raise NotMeasured(_sentence(named or type(config).__name__, first.__name__))
    return able


def _tables() -> Iterator[Any]:
    """Yield the Auto classes that are for something, the most telling first; not AutoModel, whose classes have no head."""
    names = [name for name in dir(transformers) if name.startswith("AutoModelFor")]
    first = [name for name in NOUNS if name not in _LAST]
    for name in dict.fromkeys([*first, *(name for name in names if name not in _LAST), *_LAST[:-1]]):
        yield getattr(transformers, name)


def _classes(auto: Any, config: Any) -> tuple[str, ...]:
    """Name the classes that an Auto class has for a config."""
    found = auto._model_mapping.get(type(config), ())
    return tuple(one.__name__ for one in (found if isinstance(found, (tuple, list)) else (found,)))


def _sentence(named: str, auto: str, noun: str | None = None) -> str:
    words = " ".join(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*", auto.removeprefix("AutoModelFor")))
    what = noun or NOUNS.get(auto) or (f"a model for {words}" if auto != "AutoModel" else "a model without a head for text")
    return f"names {named}, {what}, which {auto} loads: only models are measured that continue a text (AutoModelForCausalLM)"
