"""The Python that trains a plan: peft's adapters and transformers' Trainer, on a text file."""

from __future__ import annotations

from collections.abc import Iterator

from harness.core.training.setup import TrainingSetup

_QUANTIZED = (
    '    quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
    'bnb_4bit_compute_dtype="{dtype}"),'
)


def training_program(head: str, setup: TrainingSetup, dtype: str, auto_class: str, card: int) -> str:
    """Write a program that trains the model named by MODEL in `head`, with its targets settled, on a card of this number."""
    packed, adapted = setup.method == "qlora", setup.method != "full"
    names = sorted([auto_class, "AutoTokenizer", "Trainer", "TrainingArguments", *(["BitsAndBytesConfig"] if packed else [])])
    lines = [
        'DATA = "train.txt"  # the text to train on',
        "",
        "from pathlib import Path",
        "",
        *(["from peft import LoraConfig, get_peft_model"] if adapted else []),
        f"from transformers import {', '.join(names)}",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(MODEL)",
        f"model = {auto_class}.from_pretrained(",
        "    MODEL,",
        f'    dtype="{dtype}",',
        *([_QUANTIZED.format(dtype=dtype)] if packed else []),
        f'    device_map={{"": {card}}},',
        ")",
        *(_adapters(setup) if adapted else ()),
        'ids = tokenizer(Path(DATA).read_text(encoding="utf-8"))["input_ids"]',
        f"length = {setup.sequence_length}",
        "rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]",
        "trainer = Trainer(",
        "    model=model,",
        "    args=TrainingArguments(",
        *(f"        {argument}," for argument in _arguments(setup, dtype)),
        "    ),",
        '    train_dataset=[{"input_ids": row, "labels": row} for row in rows],',
        ")",
        "trainer.train()",
        'model.save_pretrained("trained")',
    ]
    return head.rstrip("\n") + "\n" + "\n".join(lines) + "\n"


def _adapters(setup: TrainingSetup) -> Iterator[str]:
    targets = ", ".join(f'"{name}"' for name in setup.targets)
    yield "adapters = LoraConfig("
    yield f"    r={setup.rank},"
    yield f"    lora_alpha={2 * setup.rank},"
    yield f"    target_modules=[{targets}],"
    yield '    task_type="CAUSAL_LM",'
    yield ")"
    yield "model = get_peft_model(model, adapters)"


def _arguments(setup: TrainingSetup, dtype: str) -> Iterator[str]:
    yield 'output_dir="trained"'
    yield f"per_device_train_batch_size={setup.batch}"
    yield f"optim={setup.optimizer!r}".replace("'", '"')
    yield "bf16=True" if dtype == "bfloat16" else "fp16=True"
    if setup.checkpointing:
        yield "gradient_checkpointing=True"
        yield 'gradient_checkpointing_kwargs={"use_reentrant": False}'
