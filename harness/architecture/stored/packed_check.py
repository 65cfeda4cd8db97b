"""Rules of single methods for the tensors of packed weights, where a shape alone does not tell what is wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Any

from msgspec.structs import replace

from harness.architecture.key_mapping import Shape
from harness.architecture.skeleton import Weight
from harness.checkpoint.formats.safetensors_header import StoredTensor
from harness.checkpoint.quantization import Packed
from harness.checkpoint.shard_check import shown
from harness.core.methods.compressed import scheme_number
from harness.core.methods.config import is_converted, settings_of
from harness.core.methods.layouts import FP8_SCALES, Layout

_NAMED, _KEPT = "modules_in_block_to_quantize", "modules_to_not_convert"


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


def left_in_16_bits(packed: Packed | None, config: Mapping[str, Any], tensor: StoredTensor, weight: Weight) -> str | None:
    """Say that a Linear is in 16 bits where the method's library makes a packed layer of it, and why; None if it does not."""
    why = packed.method.whole_blocks if packed is not None and packed.method is not None else None
    if packed is None or why is None or not weight.quantizes:
        return None
    module, settings = weight.path.removesuffix(".weight"), settings_of(config) or {}
    is_packed = _is_in_a_block if packed.method is not None and packed.method.by_blocks else _is_converted
    return f"{shown(tensor.name)} is {tensor.dtype}, and {why}" if is_packed(module, settings) else None


def _is_in_a_block(module: str, settings: Mapping[str, Any]) -> bool:
    """Say whether optimum packs a Linear: one of the blocks that the config names, or all of them."""
    named = [name for group in settings.get(_NAMED) or () for name in group]
    return any(part.isdecimal() for part in module.split(".")) and (not named or module.endswith(tuple(named)))


def _is_converted(module: str, settings: Mapping[str, Any]) -> bool:
    """Say whether transformers packs a Linear (its `should_convert_module`): by the begin of its name, or by its end."""
    kept = [name for name in settings.get(_KEPT) or () if isinstance(name, str)]
    return is_converted(module, kept)


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


def leaves_rest(shape: Shape, block: Shape) -> bool:
    """Say whether blocks leave a rest of a weight that has several: transformers takes all that it unpacks for equal."""
    return any(side > by and side % by for side, by in zip(shape, block, strict=True))


def sides(shape: Shape) -> str:
    """Write a shape: 4096 x 128."""
    return " x ".join(str(side) for side in shape) or "a single number"
