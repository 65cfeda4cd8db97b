"""Kernels of quantized weights that only a card can load: what they allocate, each by the file that says so.

fp8 in blocks: `matmul_2d`, `matmul_batched` and `matmul_grouped` of kernels-community/finegrained-fp8, which quantize their input
as they go and give a product in its dtype (transformers 5.24, integrations/finegrained_fp8.py, `finegrained_fp8_linear`). A Linear
whose sides the blocks do not divide keeps its dtype (`Fp8Quantize`) and torch multiplies it. DeepGEMM, which transformers prefers
from compute capability 9.0 on where it can be loaded, is not traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import FineGrainedFP8Config
from transformers.integrations import finegrained_fp8
from transformers.quantizers.base import get_keys_to_not_convert

from harness.worker.trace.ledger import swapped


def quantized_to_fp8(model: Any, dtype: torch.dtype) -> Any:
    """Replace what transformers quantizes to fp8 in a model on meta by its modules, as they are after loading."""
    config = FineGrainedFP8Config()
    made = finegrained_fp8.replace_with_fp8_linear(model, get_keys_to_not_convert(model), config)
    rows, columns = config.weight_block_size
    for module in made.modules():
        if not isinstance(module, finegrained_fp8.FP8Linear):
            continue
        if module.out_features % rows or module.in_features % columns:
            module.weight.data = module.weight.data.to(dtype)
        if module.bias is not None:
            module.bias.data = module.bias.data.to(dtype)
    return made.eval()


@contextlib.contextmanager
def in_place_of_hub_kernels() -> Iterator[None]:
    """Have kernels that are downloaded from the hub do nothing but allocate their products."""
    kernels = finegrained_fp8.FineGrainedFP8(matmul=_product, batched_matmul=_of_expert, grouped_matmul=_of_expert)
    with swapped(finegrained_fp8, "load_finegrained_fp8_kernel", lambda: kernels):
        yield


def _product(given: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return given.new_empty((*given.shape[:-1], weight.shape[0]))


def _of_expert(given: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return given.new_empty((given.shape[0], weight.shape[1]))
