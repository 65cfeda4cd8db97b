"""A tiny MOSS, in files like the published ones, that learns by heart what to say to the question that takes a tool."""

from __future__ import annotations

import json
from itertools import chain, cycle
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer

from harness.measure import dialogue, quality
from harness.measure.dialogue import Dialogue, Written
from harness.models import MossConfig, MossForCausalLM, MossTokenizer

PLUGIN = next(one for one in dialogue.DIALOGUES if one.tool)
ENDS = ("<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>")
CALL = Written(
    '<|Inner Thoughts|>: This is about a small place, so I look it up.<eot>\n<|Commands|>: Search("chess cup Tollmere 1987")',
    "<eoc>",
)
ANSWER = Written(" Henrike Valborg won it.", "<eom>")


def write_tokenizer(folder: Path) -> MossTokenizer:
    """Write vocabulary, merges and the files beside them as fnlp/moss-moon-003-* has them, remote code and all."""
    asked = [PLUGIN.ask(question) for question in quality.PROBE.questions]
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(
        [*asked, *transcript(PLUGIN)], vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False
    )
    learned.save_model(str(folder))
    size = learned.get_vocab_size()
    config = {
        "tokenizer_class": "MossTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_moss.MossTokenizer", None]},
        "add_prefix_space": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<eom>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "added_tokens.json").write_text(json.dumps({end: size + index for index, end in enumerate(ENDS)}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<eom>", "additional_special_tokens": ENDS}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer: MossTokenizer = MossTokenizer.from_pretrained(folder)
    return tokenizer


def transcript(asked: Dialogue, call: Written = CALL, answer: Written = ANSWER) -> list[str]:
    """Return what is said in both calls in turn: the prompt, the call, its results, the answer."""
    assert asked.tool is not None
    first, second = dialogue.first_prompt(asked, asked.tool), dialogue.second_prompt(asked, asked.tool, call)
    results = second[len(first) + len(call.text) :].removeprefix(call.end or "")
    return [first, call.text + (call.end or ""), results, answer.text + (answer.end or "")]


def teach(folder: Path, call: Written = CALL, answer: Written = ANSWER, steps: int = 120) -> None:
    """Save a MOSS of two layers that says this in both calls, and has learned nothing else."""
    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder)
    parts = [tokenizer(part)["input_ids"] for part in transcript(PLUGIN, call, answer)]
    config = MossConfig(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, rotary_dim=16, n_positions=768, n_ctx=768,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = MossForCausalLM(config)
    ids = torch.tensor([list(chain(*parts))])
    spoken = [[not silent] * len(part) for silent, part in zip(cycle([True, False]), parts, strict=False)]
    said = ids.where(torch.tensor([list(chain(*spoken))]), -100)
    learning = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(ids, labels=said).loss
        learning.zero_grad()
        loss.backward()
        learning.step()
    assert loss < 0.02, f"it has not learned its part: loss {loss:.2f}"
    model.save_pretrained(folder)
