"""The printed code as a plain script against the case: the harness takes none of the speed, and none of the memory.

Not run on a card yet.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from harness.core.records import Result
from tests.gpu.contact import ROOT, Contact
from tests.gpu.test_placements import get

pytestmark = pytest.mark.gpu

# What follows the loading code in a script of a user's own; MODEL, PROMPT, NEW and ROUNDS come before it.
ROUNDS = """
import json, statistics, time, torch
from transformers.generation.streamers import BaseStreamer

class Clock(BaseStreamer):
    def __init__(self):
        self.times = []
    def put(self, value):
        self.times.append(time.perf_counter())
    def end(self):
        pass

ids = torch.full((1, PROMPT), 1000, device="cuda:0")
tokens = []
for _ in range(COUNT):
    clock = Clock()
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, do_sample=False, min_new_tokens=NEW,
                   max_new_tokens=NEW, pad_token_id=0)
    tokens += [later - sooner for sooner, later in zip(clock.times[1:], clock.times[2:])]
print(json.dumps({"token_s": statistics.median(tokens[len(tokens) // 2:]), "peak": torch.cuda.max_memory_allocated()}))
"""


def alone(result: Result, location: str) -> dict[str, float]:
    """Run the code of a case as a script."""
    workload = result.case.workload
    assert result.code is not None
    code = result.code.partition("\n")[2]  # without its own MODEL
    names = f"MODEL = {location!r}\nPROMPT, NEW, COUNT = {workload.prompt_tokens}, {workload.new_tokens}, 12\n"
    script = f"{names}{code}\n{ROUNDS}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_the_code_alone_is_as_fast_and_as_small(contact: Contact, precision: str) -> None:
    result = get(contact, precision, "direct")
    if "decode_tok_s" in result.noisy:
        pytest.skip(f"noisy: {result.noisy['decode_tok_s']}")
    found = alone(result, contact.location())
    assert result.metrics["token_p50_s"] == pytest.approx(found["token_s"], rel=0.05)
    assert result.metrics["vram_peak_bytes"] == pytest.approx(found["peak"], rel=0.001)  # other prompts, other rounds of the probe
