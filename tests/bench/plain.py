"""What a user would write: load, generate, look at the peak. Compared with what the harness reports of the same work."""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import harness.measure.quality


class Clock(BaseStreamer):
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 the streamer's interface
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def high_water_bytes() -> int:
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(model_dir: str, dtype: str, prompt_tokens: int, new_tokens: int, rounds: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, device_map={"": "cpu"})
    load_s = time.perf_counter() - begun
    ids = tokenizer(harness.measure.quality.prompt_text())["input_ids"]
    prompt = torch.tensor([(ids * (prompt_tokens // len(ids) + 1))[:prompt_tokens]])
    speeds, seconds = [], []
    for _ in range(rounds + 1):
        clock, start = Clock(), time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=clock,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        seconds.append(time.perf_counter() - start)
        first, last = clock.times[1], clock.times[-1]
        speeds.append((new_tokens - 1) / (last - first))
    print(json.dumps({"load_s": load_s, "round_s": seconds, "decode_tok_s": speeds[1:], "ram_peak_bytes": high_water_bytes()}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
