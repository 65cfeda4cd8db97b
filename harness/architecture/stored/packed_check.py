"""Rules of single methods for the tensors of packed weights, where a shape alone does not tell what is wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple

from msgspec.structs import replace

from harness.architecture.key_mapping import Shape
from harness.architecture.skeleton import Module, Skeleton, Weight, is_stacked
from harness.checkpoint.formats.safetensors_header import StoredTensor
from harness.checkpoint.quantization import Packed
from harness.checkpoint.shard_check import shown
from harness.core.methods.compressed import scheme_number
from harness.core.methods.config import is_converted, settings_of
from harness.core.methods.layouts import FP8_SCALES, Layout

_NAMED, _KEPT = "modules_in_block_to_quantize", "modules_to_not_convert"
# Where optimum looks for the blocks of a model, in this order (its BLOCK_PATTERNS).
OPTIMUM_BLOCKS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
    "h",
    "decoder.layers",
    "layers",
)


def lacking_part(packed: Packed, layout: Layout, parts: Set[str]) -> str | None:
    """Return a part without which nothing unpacks a weight, None if all are there: libraries leave it as memory happens to be."""
    if layout.scales and not parts & set(layout.scales):
        return layout.scales[0]
    spared = packed.method.spares if packed.method is not None else ()
    return next((part for part in layout.parts if part not in parts and part not in spared), None)


def uneven_part(parts: Mapping[str, Set[str]], settings: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return a weight that lacks a part which most others of its scheme have, and which: libraries write more than LAYOUTS asks."""
    alike: dict[int | None, list[str]] = defaultdict(list)
    for name in parts:
        alike[scheme_number(settings, name.removesuffix(".weight"))].append(name)
    for names in alike.values():
        usual = Counter(frozenset(parts[name]) for name in names).most_common(1)[0][0]
        found = next(((name, part) for name in names for part in sorted(usual - parts[name])), None)
        if found is not None:
            return found
    return None


class PackedLayers(NamedTuple):
    """The weights, by their paths, that a method's library makes packed layers for: all of these, and at most those."""

    all_of: Set[str]
    at_most: Set[str]


def of_other_form(
    packed: Packed | None, config: Mapping[str, Any], found: Skeleton, stored: Iterable[tuple[str, StoredTensor, bool]]
) -> list[tuple[StoredTensor, str]]:
    """Return what is stored otherwise than the library makes its layer, and why; of path, tensor, and whether it is packed.

    Of methods whose library leaves no Linear but those that the config keeps.
    """
    method = packed.method if packed is not None and not packed.plain else None
    if method is None or method.whole_blocks is None or found.naming is None:
        return []
    linears = [(module, weight) for module in found.root.walk() for weight in module.weights if weight.tensor.name == "weight"]
    layers, wrong = (_in_blocks if method.by_blocks else _converted)(settings_of(config) or {}, linears), []
    for path, tensor, is_packed in stored:
        if is_packed and path not in layers.at_most:
            wrong.append((tensor, f"{shown(tensor.name)} is packed, and {method.not_packed}"))
        elif not is_packed and path in layers.all_of:
            wrong.append((tensor, f"{shown(tensor.name)} is {tensor.dtype}, and {method.whole_blocks}"))
    return wrong


_Linears = list[tuple[Module, Weight]]


def _in_blocks(settings: Mapping[str, Any], linears: _Linears) -> PackedLayers:
    """Return what optimum packs: Linear and Conv1D in the blocks that the config names, or that it finds by their names."""
    named = [name for group in settings.get(_NAMED) or () for name in group]
    found = next((name for name in OPTIMUM_BLOCKS if any(module.path.startswith(name) for module, _ in linears)), None)
    block = settings.get("block_name_to_quantize") or found
    inside = [(module, weight) for module, weight in linears if isinstance(block, str) and module.path.startswith(block)]
    taken = {
        weight.path
        for module, weight in inside
        if module.block.linear is not None and (not named or module.path.endswith(tuple(named)))
    }
    return PackedLayers(taken, taken)


def _converted(settings: Mapping[str, Any], linears: _Linears) -> PackedLayers:
    """Return what transformers packs (its `should_convert_module`): not what is named by the begin of its name, or by its end."""
    kept = [name for name in settings.get(_KEPT) or () if isinstance(name, str)]
    left = [(module, weight) for module, weight in linears if is_converted(module.path, kept)]
    # What is derived from torch's Linear is one for it, and only the name of its class is known here.
    derived = {weight.path for module, weight in left if "Linear" in module.block.class_name and not module.block.exempt}
    return PackedLayers({weight.path for _, weight in left if weight.quantizes}, derived)


def scale_of(name: str, names: Set[str]) -> str | None:
    """Return which of the tensors scales a weight of 8 bits, None if none does."""
    return next((scale for part in FP8_SCALES if (scale := f"{name.removesuffix('.weight')}{part}") in names), None)


def block_fault(parts: Mapping[str, StoredTensor], shape: Shape, block: Shape) -> str | None:
    """Say that a weight has not one scale for each block that its config speaks of."""
    scale = next((tensor for part, tensor in parts.items() if part in FP8_SCALES), None)
    asked = tuple(-(-side // by) for side, by in zip(shape, block, strict=True))
    if scale is None or scale.shape == asked:
        return None
    what = f"{shown(scale.name)} is {sides(scale.shape)}"
    return f"{what}, and blocks of {sides(block)}, as the config says, have {sides(asked)} scales"


def with_blocks(packed: Packed, weights: Iterable[tuple[str, Shape]]) -> Packed:
    """Return what is packed with the reason why some of its weights, by name and shape, are not unpacked."""
    method, block = packed.method, packed.block
    cut = next(((name, shape) for name, shape in weights if leaves_rest(shape[-2:], block)), None) if block else None
    if method is None or block is None or cut is None:
        return packed
    rest = f"{shown(cut[0])} of {sides(cut[1])} in blocks of {sides(block)}"
    what = f"transformers unpacks blocks wrongly, or not at all, where they do not divide a weight, as {rest}"
    keeps = f"--precision {method.name} on a GPU of compute capability {method.packs_from:g} on"
    return replace(packed, undivided=f"{what}: keep them as they are, with {keeps}")


def with_experts(packed: Packed, found: Skeleton, names: Iterable[str] | None = None) -> Packed:
    """Return what is packed with the reason why its experts reach none of the stacks that transformers joins them to.

    It joins what it unpacks while it loads, and what a stack has room for as it is. `names` are those of the packed weights in the
    files; None: there are no files, and a method that packs whole blocks packs experts as well.
    """
    method = packed.method
    if method is None or packed.own or packed.fault is not None or not method.packs_linears or found.naming is None:
        return packed
    if method.unpacked is not None or method.packs_experts or method.takes_experts_apart:
        return packed
    stacks = {weight.path: None for weight in found.weights if is_stacked(weight)}
    taken = (found.naming.place(name, stacks).name for name in names) if names is not None else stacks
    stack = next((path for path in taken if path in stacks), None)
    if stack is None or (names is None and method.whole_blocks is None):
        return packed
    what = (
        f"transformers 5 joins the experts of a layer to one tensor, as {shown(stack)}, and joins none that {method.title} packed"
    )
    return replace(packed, fault=f"{what}: it fills it with random numbers, or stops; take an FP8 checkpoint, or the 16-bit one")


def leaves_rest(shape: Shape, block: Shape) -> bool:
    """Say whether blocks leave a rest of a weight that has several: transformers takes all that it unpacks for equal."""
    return any(side > by and side % by for side, by in zip(shape, block, strict=True))


def sides(shape: Shape) -> str:
    """Write a shape: 4096 x 128."""
    return " x ".join(str(side) for side in shape) or "a single number"
