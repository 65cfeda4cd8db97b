"""Run a model for real on the CPU, from its config and with random weights, and print how far its memory rose, in bytes.

    python -m tests.oracle.real_run < {"config": {...}, "tiny": {...}, "prompt_tokens": 4096, "new_tokens": 3, "batch": 1}

The tiny model runs first, so that what libraries keep for themselves is there before counting begins.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

STATUS = Path("/proc/self/status")


def main() -> None:
    """Answer one request."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(1)
    run(build(asked["tiny"]), 64, asked["new_tokens"], 1)
    gc.collect()
    before = resident("VmRSS")
    model = build(asked["config"])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew: a head that is tied after it was made is gone by now
    run(model, asked["prompt_tokens"], asked["new_tokens"], asked["batch"])
    print(resident("VmHWM") - before)


def build(config: dict[str, Any]) -> Any:
    """Build a causal language model in float32."""
    given = {name: value for name, value in config.items() if name != "model_type"}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**given), dtype=torch.float32).eval()


def run(model: Any, prompt: int, new_tokens: int, batch: int) -> None:
    """Generate from prompts of one token repeated."""
    ids = torch.full((batch, prompt), 7)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)


def resident(name: str) -> int:
    """Read a figure of /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
