"""Kernels of quantized weights that only a card can load: what they allocate, each by the file that says so.

fp8 in blocks: `matmul_2d`, `matmul_batched` and `matmul_grouped` of kernels-community/finegrained-fp8, which quantize their input
as they go and give a product in its dtype (transformers 5.24, integrations/finegrained_fp8.py, `finegrained_fp8_linear`). A Linear
whose sides the blocks do not divide keeps its dtype (`Fp8Quantize`) and torch multiplies it. DeepGEMM, which transformers prefers
from compute capability 9.0 on where it can be loaded, is not traced.
GPTQ and AWQ: the kernels of `harness.core.methods.kernels`, in layers that hold what gptqmodel leaves after `post_init`.
MXFP4: transformers' own modules, on `routing` and `matmul_ogs` of kernels-community/gpt-oss-triton-kernels version 1
(torch-ext/gpt_oss_triton_kernels: topk.py, routing.py, matmul_ogs.py, `init_allocation`). What Machete takes to sum up in, at
most a tile a multiprocessor, and what `split_k` takes with few rows, is not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from transformers import FineGrainedFP8Config
from transformers.integrations import finegrained_fp8, hub_kernels, mxfp4
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import Mxfp4Config

from harness.architecture.card_kernels import CardKernels
from harness.core.methods.config import settings_of
from harness.core.methods.kernels import TILE_STEP, PackedKernel, kernel_for, scheme_of
from harness.core.methods.layouts import LAYOUTS
from harness.core.methods.scheme import PackedScheme
from harness.core.methods.table import METHODS
from harness.worker.trace.ledger import Ledger, swapped

REDUCTION = "rows beyond one step of a tile"  # the condition of what Marlin takes for more rows than TILE_STEP
_MANY_ROWS = 1 << 20


def quantized_to_fp8(model: Any, config: FineGrainedFP8Config, dtype: torch.dtype) -> Any:
    """Replace what transformers quantizes to fp8 in a model on meta by its modules, as they are after loading."""
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


class PackedLinear(nn.Module):
    """A Linear of GPTQ or AWQ as gptqmodel leaves it on a card, which `product` multiplies (`_Products`)."""

    product: Any = None  # while a card is there

    def __init__(self, sides: tuple[int, int], bias: bool, scheme: PackedScheme, kernel: PackedKernel, processors: int) -> None:
        super().__init__()
        self.out_features, self.in_features = outputs, inputs = sides
        self.scheme, self.kernel = scheme, kernel
        groups = -(-inputs // (scheme.group or inputs))
        held: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"scales": ((groups, outputs), torch.float16)}
        held["qweight"] = ((inputs * scheme.bits // 32, outputs), torch.int32)
        if scheme.method in kernel.keeps_zeros:
            held["qzeros"] = ((groups, outputs * scheme.bits // 32), torch.int32)
        elif not scheme.symmetric:
            held["qzeros"] = ((groups, outputs), torch.float16)  # multiplied with their scales
        if scheme.reorders or (scheme.method in kernel.keeps_zeros and ".g_idx" in LAYOUTS[scheme.method].parts):
            held["g_idx"] = ((inputs,), torch.int32)
        if kernel.reduces:
            held["workspace"] = ((max(processors, 128),), torch.int32)  # gptqmodel/utils/marlin.py, marlin_make_workspace_new
        if bias:
            held["bias"] = ((outputs,), torch.float16)
        for name, (shape, dtype) in held.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Multiply [..., inputs] to [..., outputs]."""
        out: torch.Tensor = self.product(self, given)
        return out


def packed_for(model: Any, config: Mapping[str, Any], precision: str, card: CardKernels, layers: str | None) -> Any:
    """Replace the Linears of a model on meta by those that gptqmodel takes for a checkpoint with this config; `layers` holds all.

    Raises:
        ValueError: no rule is known for the kernels of weights that are packed so.
    """
    scheme = scheme_of(config)
    kernel = kernel_for(scheme, card.capability[0] + card.capability[1] / 10) if scheme else None
    if scheme is None or kernel is None:
        raise ValueError(f"no trace in {precision}: no kernel is known that takes weights stored so on a {card.name}")
    room = 0
    for path in _packed_paths(model, scheme, settings_of(config) or {}, layers):
        plain = model.get_submodule(path)
        outputs, inputs = plain.weight.shape if isinstance(plain, nn.Linear) else reversed(plain.weight.shape)
        if not kernel.fits(outputs, inputs):
            raise ValueError(f"no trace in {precision}: {kernel.name} takes no weight of {outputs} x {inputs}, as {path} is")
        made = PackedLinear((outputs, inputs), plain.bias is not None, scheme, kernel, card.processors)
        model.set_submodule(path, made)
        room = max(room, kernel.kept_bytes(scheme.method, outputs, inputs))
    if room:
        model.register_buffer("room_of_kernels", torch.empty(room, dtype=torch.uint8, device="meta"))
    return model.eval()


def _packed_paths(model: Any, scheme: PackedScheme, settings: Mapping[str, Any], layers: str | None) -> list[str]:
    """Return the paths of what is packed: AWQ leaves out what its config names and the head, GPTQ all outside of the layers."""
    if any(parameter.dim() == 3 and "experts" in name for name, parameter in model.named_parameters()):
        raise ValueError(f"no trace of stacked experts in {scheme.method}: what multiplies them packed is not known")
    kept = [*get_keys_to_not_convert(model), *(settings.get("modules_to_not_convert") or ())]
    inside = [name for group in settings.get("modules_in_block_to_quantize") or () for name in group]
    found, by_blocks = [], METHODS[scheme.method].by_blocks
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D) if by_blocks else nn.Linear):
            continue
        in_block = path.startswith(f"{layers}.") and (not inside or path.endswith(tuple(inside)))
        if in_block if by_blocks else should_convert_module(path, kept):
            found.append(path)
    return found


class _Products:
    """What gptqmodel's kernels allocate; `whole`: all that they take under some condition."""

    def __init__(self, ledger: Ledger, card: CardKernels, whole: bool) -> None:
        self._ledger, self._processors, self._whole = ledger, card.processors, whole

    def __call__(self, layer: PackedLinear, given: torch.Tensor) -> torch.Tensor:
        """Make what a kernel makes, in its order; what it takes for itself is gone when it is done."""
        rows = given.numel() // layer.in_features
        out = torch.empty((*given.shape[:-1], layer.out_features), dtype=given.dtype, device=given.device)
        taken = [*self._sums(layer.kernel, rows, given.device), *self._copy(layer, rows, given)]
        if layer.scheme.reorders and layer.kernel.sorts:
            taken.append(torch.empty_like(given))
        del taken
        return out

    def _sums(self, kernel: PackedKernel, rows: int, device: torch.device) -> Iterator[torch.Tensor]:
        """Yield what Marlin sums up in, in two parts of which the second is for many rows."""
        least = kernel.reduction_bytes(TILE_STEP, self._processors)
        yield torch.empty(least, dtype=torch.uint8, device=device)
        with self._ledger.only_if(REDUCTION):
            most = kernel.reduction_bytes(_MANY_ROWS if self._whole else rows, self._processors)
            yield torch.empty(most - least, dtype=torch.uint8, device=device)

    def _copy(self, layer: PackedLinear, rows: int, given: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the 16-bit copy of a weight, for which there may have to be many rows."""
        sides = layer.out_features, layer.in_features
        if layer.kernel.unpacks(layer.scheme.bits, _MANY_ROWS if self._whole else rows):
            always = layer.kernel.unpacks(layer.scheme.bits, 1)
            with contextlib.nullcontext() if always else self._ledger.only_if("unpack {} {}".format(*sides)):
                yield torch.empty(sides, dtype=given.dtype, device=given.device)


class Ranges(NamedTuple):
    """A condition by its name, and the ranges of rows (first, last) in which it does not hold."""

    name: str
    rows: tuple[tuple[int, int], ...]


def conditions_of(model: Any) -> Iterator[Ranges]:
    """Yield what the kernels of packed Linears take under a condition."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if any(module.kernel.reduces for module in packed):
        yield Ranges(REDUCTION, ((1, TILE_STEP),))
    for outputs, inputs, first in sorted(
        {(one.out_features, one.in_features, one.kernel.unpacks_from.get(one.scheme.bits, 1)) for one in packed}
    ):
        if first > 1:
            yield Ranges(f"unpack {outputs} {inputs}", ((1, first - 1),))


def packed_to_mxfp4(model: Any) -> Any:
    """Replace the experts of a model on meta by transformers' modules that keep them in MXFP4, as they are after loading.

    Raises:
        ValueError: transformers keeps no experts of this model so.
    """
    with in_place_of_hub_kernels():
        made = mxfp4.replace_with_mxfp4_linear(model, Mxfp4Config(), get_keys_to_not_convert(model))
    experts = [module for module in made.modules() if isinstance(module, mxfp4.Mxfp4GptOssExperts)]
    if not experts:
        raise ValueError(f"no trace in mxfp4: transformers keeps no experts of {type(model).__name__} packed")
    for module in experts:
        for name in ("gate_up_proj", "down_proj"):
            halves = getattr(module, name)
            scales = torch.empty((*halves.shape[:-1], halves.shape[-1] // _MX_BYTES), dtype=torch.uint8, device="meta")
            module.register_buffer(f"{name}_scales", scales)
    return made.eval()


_MX_BYTES = 16  # of packed weights that share a scale
_ROUTING_TILES = 5  # block_m of 16 to 256


def _route(logits: torch.Tensor, chosen: int) -> tuple[Any, Any, Any]:
    """Do `routing`: weights and numbers of the experts chosen, a bit for each expert, and two orders of all pairs."""
    tokens, experts = logits.shape
    made = logits.new_empty
    weights, numbers = made((tokens, chosen)), made((tokens, chosen), dtype=torch.int16)
    words = -(-experts // 32)
    bits = made((words, -(-tokens // 32) * 32), dtype=torch.int32)
    counts, parts = made(-(-experts // 128) * 128, dtype=torch.int32), made((words * 32, -(-tokens // 128) * 4), dtype=torch.int32)
    pairs = tokens * chosen
    orders, scales = made(2 * pairs, dtype=torch.int32), made(pairs)
    tiles = pairs if pairs <= experts else experts - 1 - (experts - pairs - 1) // 16
    blocks = made((_ROUTING_TILES, -(-tiles // 512) * 512), dtype=torch.int32)
    del weights, numbers, bits, parts
    data = SimpleNamespace(gate_scal=scales, n_expts_act=chosen, kept=(counts, orders, blocks))
    return data, SimpleNamespace(rows=pairs), SimpleNamespace(rows=pairs)


def _multiply_experts(given: torch.Tensor, weight: torch.Tensor, bias: Any, routing: Any, **named: Any) -> torch.Tensor:  # noqa: ARG001
    """Do `matmul_ogs` without split-k: an activation halves the product, and a scatter sums up the experts of each token."""
    gather, scatter = named.get("gather_indx"), named.get("scatter_indx")
    rows = gather.rows if gather is not None else given.shape[-2]
    if scatter is None:
        return given.new_empty((1, rows, weight.shape[1] // 2))
    tokens = scatter.rows // routing.n_expts_act
    with_parts = given.new_empty((1, rows + tokens, weight.shape[1]))  # the sum goes to the first rows, of one storage
    order = [given.new_empty(rows, dtype=torch.int32), given.new_empty(tokens + rows + 1, dtype=torch.int32)]
    del order
    return with_parts[:, :tokens]


_GPT_OSS = SimpleNamespace(
    routing=SimpleNamespace(routing=_route),
    matmul_ogs=SimpleNamespace(
        FnSpecs=lambda *_: None, FusedActivation=lambda *_: None, matmul_ogs=_multiply_experts, PrecisionConfig=SimpleNamespace
    ),
    swiglu=SimpleNamespace(swiglu_fn=None),
)


@contextlib.contextmanager
def in_place_of_hub_kernels() -> Iterator[None]:
    """Have kernels that are downloaded from the hub do nothing but allocate their products."""
    kernels = finegrained_fp8.FineGrainedFP8(matmul=_product, batched_matmul=_of_expert, grouped_matmul=_of_expert)
    with (
        swapped(finegrained_fp8, "load_finegrained_fp8_kernel", lambda: kernels),
        swapped(hub_kernels, "get_kernel", lambda *_, **__: _GPT_OSS),
        swapped(mxfp4, "on_device", lambda _: contextlib.nullcontext()),
        mock.patch.object(mxfp4, "triton_kernels_hub", _GPT_OSS, create=True),
    ):
        yield


@contextlib.contextmanager
def in_place_of_packages(ledger: Ledger, card: CardKernels, whole: bool) -> Iterator[None]:
    """Have packed Linears multiplied as gptqmodel's kernels do on a card."""
    with swapped(PackedLinear, "product", staticmethod(_Products(ledger, card, whole))):
        yield


def _product(given: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return given.new_empty((*given.shape[:-1], weight.shape[0]))


def _of_expert(given: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return given.new_empty((given.shape[0], weight.shape[1]))
