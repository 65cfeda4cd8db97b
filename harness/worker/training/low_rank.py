"""Adapters of low rank as peft puts them beside Linears, without peft: a plan comes before it is installed.

`forward` of peft 0.21's lora.Linear (tuners/lora/layer.py) and lora.Linear4bit (tuners/lora/bnb.py) without dropout, with one
adapter and a scaling of lora_alpha / r = 2; `tests/worker/test_training.py` holds it against peft where that is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_SCALING = 2.0


class LowRank(nn.Module):
    """A Linear that stays as it is and a product of two small ones in float32 beside it."""

    def __init__(self, base: Any, rank: int, device: torch.device) -> None:
        super().__init__()
        inputs, outputs = base.weight.shape if isinstance(base, Conv1D) else (base.in_features, base.out_features)
        self.base_layer, self.packed = base, type(base).__name__ == "Linear4bit"
        self.lora_A = nn.Linear(inputs, rank, bias=False, device=device, dtype=torch.float32)  # the names are peft's
        self.lora_B = nn.Linear(rank, outputs, bias=False, device=device, dtype=torch.float32)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Multiply [..., inputs] to [..., outputs]."""
        plain = self.base_layer(given)
        if self.packed:
            plain = plain.clone()
        else:
            given = given.to(torch.float32)
        out: torch.Tensor = plain + self.lora_B(self.lora_A(given)) * _SCALING
        return out if self.packed else out.to(plain.dtype)

    def __getattr__(self, name: str) -> Any:
        """Look in the Linear for what is not here: some models ask for its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


def add_adapters(model: Any, rank: int, targets: Sequence[str], device: torch.device) -> None:
    """Freeze a model and put adapters beside its Linears of these names.

    Raises:
        ValueError: a module that has one of the names is no Linear.
    """
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] not in targets:
            continue
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise ValueError(f"{path} is no Linear but {type(module).__name__}, beside which peft puts no adapter")
        model.set_submodule(path, LowRank(module, rank, device))
