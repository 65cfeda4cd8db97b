"""LoRA adapters written by hand, as peft 0.21 writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES: Mapping[str, tuple[int, int]] = {"self_attn.q_proj": (256, 256), "self_attn.v_proj": (64, 256), "mlp.down_proj": (256, 704)}


def write_adapter(folder: Path, base: str, *, rank: int = 8, layers: int = 2, dtype: str = "float32", **settings: Any) -> Path:
    """Write a LoRA on some modules of the small Llama; a setting of None is left out."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for module, (outputs, inputs) in SHAPES.items():
            for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                name = f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"
                tensors[name] = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [module.rpartition(".")[2] for module in SHAPES]
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": 16}
    config = {**said, "target_modules": targets, "inference_mode": True, **settings}
    (folder / "adapter_config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder
