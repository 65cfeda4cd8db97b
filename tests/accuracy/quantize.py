"""Quantize a small model as its publisher would: `python -m tests.accuracy.quantize MODEL DIR BITS`, by GPTQ in gptqmodel.

It runs in a process of its own, for gptqmodel sets up the whole of one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from pydoc_data.topics import topics

# Inputs of the layers are divided by this: 576 of SmolLM2 are not by gptqmodel's usual 128.
GROUP = 64
_TEXTS, _LETTERS = 48, 2000


def quantize(model: str, directory: str, bits: int) -> None:
    """Write a quantized copy of a model, calibrated on Python's own help texts: English, on every machine, and not in the probe."""
    os.cpu_count = lambda: max(4, len(os.sched_getaffinity(0)))  # gptqmodel 7.6 starts no quantizer on fewer
    os.chdir(Path(directory).parent)  # it leaves a folder of logs where it runs
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=bits, group_size=GROUP, device="cpu")
    texts = [text[:_LETTERS] for _, text in sorted(topics.items()) if len(text) > _LETTERS][:_TEXTS]
    made = GPTQModel.load(model, config)
    made.quantize(texts, batch_size=1)
    made.save(directory)


if __name__ == "__main__":
    source, target, width = sys.argv[1:]
    quantize(source, target, int(width))
