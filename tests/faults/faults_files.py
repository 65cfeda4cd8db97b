"""Files of strangers.

1,000 models, each with one file mutated, are read by the real commands; nothing may run, and every refusal is one sentence.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from harness.core.units import MIB, format_size
from tests.support.checkpoint_files import write_safetensors
from tests.support.gguf_files import small_gguf
from tests.support.reporting import Figure
from tests.support.strangers import SIZES, add_pickle, change

ROOT = Path(__file__).parents[2]
CASES, BATCH = 1000, 100
WANTED_S, WANTED_BYTES = 1.0, 200 * MIB
CONFIG = {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128}
TOKENIZER = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {"0": {"content": "<s>", "special": True}}}

Mutate = Callable[[random.Random, bytes], bytes]


def tensors() -> dict[str, tuple[int, ...]]:
    """Return the tensors that CONFIG describes."""
    width, inner, kv = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["hidden_size"] // 2
    block = {
        "input_layernorm": (width,), "post_attention_layernorm": (width,), "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner), "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, width),
    }  # fmt: skip
    layers = range(SIZES["num_hidden_layers"])
    named = {f"model.layers.{layer}.{name}.weight": shape for layer in layers for name, shape in block.items()}
    ends: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (96, width))
    return {**ends, **named, "model.norm.weight": (width,)}


def save_text(folder: Path) -> Path:
    """Write config and tokenizer."""
    folder.mkdir()
    change(folder / "config.json", CONFIG)
    change(folder / "generation_config.json", {"eos_token_id": 1})
    change(folder / "tokenizer_config.json", TOKENIZER)
    vocabulary = {f"token{number}": number for number in range(96)}
    change(
        folder / "tokenizer.json",
        {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocabulary, "merges": []}},
    )
    return folder


def save_one(folder: Path) -> Path:
    write_safetensors(save_text(folder) / "model.safetensors", tensors())
    return folder


def save_shards(folder: Path) -> Path:
    save_text(folder)
    names = list(tensors())
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        write_safetensors(folder / file, {name: tensors()[name] for name in held})
    where = {name: file for file, held in parts.items() for name in held}
    change(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return folder


def save_bin(folder: Path, *, old: bool = False) -> Path:
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in tensors().items()}
    torch.save(state, save_text(folder) / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    return folder


def save_gguf(folder: Path) -> Path:
    small_gguf(save_text(folder) / "model.gguf")
    return folder


# Mutations


def bytewise(chance: random.Random, data: bytes) -> bytes:
    """Flip, insert, delete, repeat or cut, mostly near the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(min(len(changed), chance.choice((16, 256, 4096, 1 << 30)))) if changed else 0
        piece = chance.choice((chance.randbytes(chance.randrange(1, 9)), *(struct.pack("<Q", number) for number in NUMBERS)))
        how = chance.randrange(6)
        if how == 0 and changed:
            changed[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            changed[at:at] = piece
        elif how == 2:
            del changed[at : at + chance.choice((1, 8, 100))]
        elif how == 3:
            changed[at : at + len(piece)] = piece
        elif how == 4:
            changed[at:at] = changed[at : at + 64] * chance.choice((1, 100))
        elif chance.random() < 0.3:
            del changed[at:]
    return bytes(changed)


NUMBERS = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
SECRET = "secret-of-the-machine"
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 1 << 31, 1 << 62, 1 << 200, 1.5, float("nan"), float("inf"), "", "x" * 100_000,
    "\x1b]0;owned\x07\x1b[2J\u202e",
    "\0", "\ud800", [], {}, [[[]]] * 1000, {"a": {"b": {}}}, {str(number): number for number in range(5000)}, f"../{SECRET}",
    f"/tmp/../{SECRET}", "/etc/passwd", "/dev/zero", "/proc/self/mem", ".", "..", "os.system", "who/what--modeling.Model", 10**400,
)  # fmt: skip
KEYS = (
    "auto_map", "attn_implementation", "quantization_config", "text_config", "model_type", "vocab_size", "head_dim", "weight_map",
    "vocab_file", "tokenizer_file", "num_key_value_heads", "num_experts", "architectures", "custom_generate", "tie_word_embeddings",
)  # fmt: skip


def jsonwise(chance: random.Random, data: bytes) -> bytes:
    """Put a value where it does not belong, a hundred levels deep now and then, or write what is not quite JSON."""
    document = json.loads(data)
    for _ in range(chance.choice((1, 1, 1, 3))):
        place = document
        while (inner := [value for value in place.values() if isinstance(value, dict) and value]) and chance.random() < 0.6:
            place = chance.choice(inner)
        key = chance.choice((*place, *KEYS))
        value = chance.choice(VALUES)
        place[key] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), value) if key == "auto_map" else value
    text = json.dumps(document)
    if chance.random() < 0.1:
        depth = chance.choice((100, 10_000, 1_000_000))
        text = text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
    return bytewise(chance, text.encode()) if chance.random() < 0.1 else text.encode()


def headerwise(chance: random.Random, data: bytes) -> bytes:
    """Mutate the JSON in a safetensors header, and say its new length."""
    length = int.from_bytes(data[:8], "little")
    header = jsonwise(chance, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


class Kind(NamedTuple):
    """Models of one kind: how one is saved, and which file is mutated how."""

    name: str
    save: Callable[[Path], Path]
    file: str
    mutate: Mapping[str, Mutate]


KINDS = (
    Kind("safetensors", save_one, "model.safetensors", {"bytes": bytewise, "header": headerwise}),
    Kind("a shard", save_shards, "b.safetensors", {"bytes": bytewise, "header": headerwise}),
    Kind("index", save_shards, "model.safetensors.index.json", {"bytes": bytewise, "json": jsonwise}),
    Kind("config.json", save_one, "config.json", {"bytes": bytewise, "json": jsonwise, "more json": jsonwise}),
    Kind("tokenizer_config.json", save_one, "tokenizer_config.json", {"bytes": bytewise, "json": jsonwise}),
    Kind("tokenizer.json", save_one, "tokenizer.json", {"bytes": bytewise, "json": jsonwise}),
    Kind("generation_config.json", save_one, "generation_config.json", {"json": jsonwise}),
    Kind("GGUF", save_gguf, "model.gguf", {"bytes": bytewise, "more bytes": bytewise}),
    Kind(".bin", save_bin, "pytorch_model.bin", {"bytes": bytewise}),
    Kind("old .bin", lambda folder: save_bin(folder, old=True), "pytorch_model.bin", {"bytes": bytewise}),
)
WAYS = [(kind, mutate) for kind in KINDS for mutate in kind.mutate.values()]


def mutated(folder: Path) -> list[Path]:
    """Make the models: each kind and way in turn, the seed being the number."""
    originals = {kind.name: kind.save(folder / f"original-{number}") for number, kind in enumerate(KINDS)}
    made = []
    for number in range(CASES):
        kind, mutate = WAYS[number % len(WAYS)]
        place = folder / f"{number:04}"
        shutil.copytree(originals[kind.name], place)
        file = place / kind.file
        data = mutate(random.Random(number), file.read_bytes())
        file.write_bytes(data)
        made.append(place)
    return made


def pickled(folder: Path) -> list[Path]:
    """Make models whose pickles would touch a file, whole and mutated."""
    made = []
    for number in range(50):
        place = add_pickle(save_text(folder / f"pickle-{number}"), folder / "canary")
        if number:
            file = place / "pytorch_model.bin"
            file.write_bytes(bytewise(random.Random(number), file.read_bytes()))
        made.append(place)
    return made


def readings(folders: list[Path], warm: Path, *, with_torch: bool = False) -> list[dict[str, Any]]:
    """Read models in processes of their own, a batch each."""
    found = []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FITMATRIX_CACHE": str(warm.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    for start in range(0, len(folders), BATCH):
        batch = [str(folder) for folder in folders[start : start + BATCH]]
        request = json.dumps({"folders": batch, "warm": str(warm), "secret": SECRET, "with_torch": with_torch})
        command = [sys.executable, "-m", "tests.faults.reading"]
        done = subprocess.run(command, input=request, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found += json.loads(done.stdout)
    return found


def test_mutated_models(tmp_path: Path, figures: list[Figure]) -> None:
    (tmp_path / SECRET).write_text("nobody reads this")
    begun = time.monotonic()
    warm = save_one(tmp_path / "warm")
    whole = [kind.save(tmp_path / f"whole-{number}") for number, kind in enumerate(KINDS)]
    plain = readings(whole, warm)
    good = {"inspect": [0] * len(KINDS), "plan": [2 if kind.name == "GGUF" else 0 for kind in KINDS]}
    assert {name: [one["status"] for one in plain if one["command"] == name] for name in good} == good
    found = readings([*mutated(tmp_path), *pickled(tmp_path)], warm)
    failures = [one for one in found if one["failure"]]
    ran = [one for one in found if one["ran"]]
    for one in (*failures, *ran)[:20]:
        print(one)
    refused = sum(one["status"] == 2 for one in found)
    slowest, largest = max(one["seconds"] for one in found), max(one["bytes"] for one in found)
    rows = len(found)
    executed = len(ran) + (tmp_path / "canary").exists()
    figures += [
        Figure(what=f"tracebacks and worse, {refused:,} refused in one sentence", rows=rows, found=str(len(failures)), wanted="0"),
        Figure(what="code executed, or a file outside the directory opened", rows=rows, found=str(executed), wanted="0"),
        Figure(what="slowest `inspect` or `plan` of one", rows=rows, found=f"{slowest:.2f} s", wanted=f"{WANTED_S:.0f} s"),
        Figure(what="most memory for one", rows=rows, found=format_size(largest), wanted=format_size(WANTED_BYTES)),
    ]
    print(f"{time.monotonic() - begun:.0f} s, {figures}")
    worst = sorted(found, key=lambda one: -one["seconds"])[:3] + sorted(found, key=lambda one: -one["bytes"])[:3]
    assert not failures
    assert not executed
    assert slowest <= WANTED_S, worst
    assert largest <= WANTED_BYTES, worst


HOSTILE: Mapping[str, Mapping[str, Any]] = {
    "code of its own": {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
    "a kernel": {"attn_implementation": "who/evil"},
    "code one level down": {"text_config": {"auto_map": {"AutoConfig": "evil.C"}, "attn_implementation": "who/evil"}},
    "4,095 layers": {"num_hidden_layers": 4095},
    "a huge vocabulary": {"vocab_size": (1 << 32) - 1},
    "a deep loop": {"layer_types": ["full_attention"] * 100_000},
}


def test_configs_that_a_worker_builds(tmp_path: Path, figures: list[Figure]) -> None:
    """With transformers here, an unknown config is built by a worker: bounded in time and memory, and without running code."""
    warm = save_one(tmp_path / "warm")
    canary = tmp_path / "canary"
    folders = []
    for number, changes in enumerate(HOSTILE.values()):
        folder = save_one(tmp_path / f"hostile-{number}")
        change(folder / "config.json", changes)
        (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\nC = M = None\n")
        folders.append(folder)
    found = readings(folders, warm, with_torch=True)
    failures = [one for one in found if one["failure"]]
    slowest = max(one["seconds"] for one in found)
    bad = len(failures) + canary.exists()
    figures.append(
        Figure(
            what=f"hostile configs built by transformers in a worker: tracebacks or code run; slowest {slowest:.0f} s",
            rows=len(found),
            found=str(bad),
            wanted="0",
        )
    )
    assert not bad, failures
    assert slowest < 150


@pytest.fixture(autouse=True, scope="module")
def _pickles_are_real(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The pickles do run where a reader is careless, else the tests above prove nothing."""
    folder = tmp_path_factory.mktemp("real")
    add_pickle(folder, folder / "canary")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (folder / "canary").exists()
