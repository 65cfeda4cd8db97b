"""One image through transformers' own image processor and the model's own tower, on a fake card: tokens, bytes, operations."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers.models.auto.processing_auto  # noqa: F401 completes the table of processors
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from transformers.models.auto.auto_mappings import IMAGE_PROCESSOR_MAPPING_NAMES, PROCESSOR_MAPPING_NAMES

from harness.architecture.card_kernels import WITH_FLASH, kernels_of
from harness.architecture.vision.image_trace import ImageTrace
from harness.worker.build_skeleton import construct, read_model_config
from harness.worker.trace import kernels
from harness.worker.trace.fake_model import place_on_card
from harness.worker.trace.ledger import CARD, Ledger, Rules, fake_card, swapped
from harness.worker.trace.record import source

# More than processors let through: square, and as cameras make them. What is left of it is the most that an image can be.
SIDES = ((4096, 4096), (4096, 3072))
MOST_POOLED = 1 << 25  # of patches by the tokens that they are pooled to, of two images: what is padding follows from them


class _Seen(NamedTuple):
    """What the tower made of some images: tokens, bytes alive at its peak and after it, and of the input; operations."""

    tokens: int
    peak: int
    left: int
    pixels: int
    flops: float


def trace_image(config: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> ImageTrace:
    """Trace what one image takes in a model of a config as published; `settings` are those of its image processor.

    Raises:
        ValueError: transformers has no image processor for it that is installed, or the model sees no images.
    """
    read = read_model_config(config)
    if type(read) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(f"transformers has no class for model_type {read.model_type!r} that reads images and writes text")
    processor, model = processor_of(read, settings), construct(AutoModelForImageTextToText, read)
    if not hasattr(model, "get_image_features"):
        raise ValueError(f"{type(model).__name__} takes no images as tokens of a prompt: it has no get_image_features")
    model.tie_weights()
    return trace_inputs(model, [processed(processor, *side) for side in SIDES], getattr(processor, "patch_size", None))


def trace_inputs(model: Any, shapes: Sequence[Mapping[str, torch.Tensor]], patch: int | None = None) -> ImageTrace:
    """Trace the one of these inputs of an image that makes the most tokens; where they have a grid, it is of patches so wide."""
    card = kernels_of(WITH_FLASH)
    with fake_card({}, card.capability) as ledger, kernels.chosen_as_on(card, ledger, whole=False):
        ledger.rules, ledger.most_shadowed = _rules(ledger), MOST_POOLED
        place_on_card(model)
        model.requires_grad_(True)  # as loaded: for such weights a product copies what is not contiguous (should_fold in ATen)
        firsts = [_see(ledger, model, inputs, 1) for inputs in shapes]
        one = max(firsts, key=lambda seen: seen.tokens)
        inputs = shapes[firsts.index(one)]
        two = _see(ledger, model, inputs, 2)
    width, height = _size(inputs, patch) if patch and "image_grid_thw" in inputs else (None, None)
    return ImageTrace(
        tokens=one.tokens,
        pixels_bytes=one.pixels,
        features_bytes=one.left - one.pixels,
        beside_bytes=max(0, 2 * one.peak - two.peak),
        each_bytes=two.peak - one.peak,
        flops=float(one.flops),
        source=source(),
        width=width,
        height=height,
    )


def processor_of(config: Any, settings: Mapping[str, Any] | None = None) -> Any:
    """Return the image processor that transformers has for a config of its own, with these settings or those that follow from it.

    Raises:
        ValueError: there is none, or what it needs is not installed.
    """
    named = _class_for(str(config.model_type))
    said = {"image_processor_type": named} | (dict(settings) if settings else _settings_by(config))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        said = {name: value for name, value in said.items() if name != "auto_map"}
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(said))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except (ImportError, ValueError) as error:
            needed = re.search(r"dependencies: ([\w, ]+)", str(error))
            why = f"needs {needed[1]}: pip install {needed[1].replace(',', '')}" if needed else " ".join(str(error).split())
            raise ValueError(f"the image processor of {config.model_type}: {why}") from error


def _class_for(kind: str) -> str:
    """Name the image processor of a model type; of one that has none of its own, that of a type with the same processor."""
    siblings = [other for other, processor in PROCESSOR_MAPPING_NAMES.items() if processor == PROCESSOR_MAPPING_NAMES.get(kind)]
    for one in (kind, *siblings):
        backends = IMAGE_PROCESSOR_MAPPING_NAMES.get(one)
        if backends:
            return str(backends.get("torchvision") or backends["pil"])
    raise ValueError(f"transformers has no image processor for model_type {kind!r}")


def _settings_by(config: Any) -> dict[str, Any]:
    """Return what a config says of the images that its tower takes, by the names that image processors have for it."""
    tower = getattr(config, "vision_config", config)
    side, patch = getattr(tower, "image_size", None) or _side_of_timm(tower), getattr(tower, "patch_size", None)
    said = {
        "patch_size": patch,
        "encoder_patch_size": patch,
        "downsample_factor": getattr(config, "downsample_factor", None),
        "temporal_patch_size": getattr(tower, "temporal_patch_size", None),
        "merge_size": getattr(tower, "spatial_merge_size", None),
        "pooling_kernel_size": getattr(tower, "pooling_kernel_size", None),
    }
    return {name: value for name, value in said.items() if value is not None} | _sides(config, side)


def _side_of_timm(tower: Any) -> tuple[int, int] | None:
    """Return the height and width of the images that a tower of timm was trained on, which timm knows by its name."""
    name = getattr(tower, "architecture", None)
    if name is None:
        return None
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ValueError(f"its vision tower {name} is one of timm: pip install timm") from error
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return tuple(known.input_size[1:]) if known is not None else None


def _sides(config: Any, side: Any) -> dict[str, Any]:
    """Return the settings that let through as large an image as the tower has positions for; by the class's own form of a size."""
    if side is None:
        return {}
    height, width = (side, side) if isinstance(side, int) else side
    usual = _usual(config)
    size = usual.get("size") or {}
    if "max_image_size" in usual:  # cut into tiles as large as the tower's images
        return {"max_image_size": {"longest_edge": height}, "size": {"longest_edge": 4 * height}}
    both = {"height": height, "width": width}
    if "height" in size:
        return {"size": both}
    if "shortest_edge" in size and "longest_edge" not in size:
        return {"size": {"shortest_edge": height}} | ({"crop_size": both} if usual.get("crop_size") else {})
    return {"size": {"longest_edge": height}} if "longest_edge" in size and "shortest_edge" not in size else {}


def _usual(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = processor_of(config, {"image_processor_type": _class_for(str(config.model_type))}).to_dict()
    return {name: value for name, value in found.items() if value is not None}


def processed(processor: Any, width: int, height: int) -> dict[str, torch.Tensor]:
    """Return the tensors that a processor makes of a black image."""
    made = processor(images=[np.zeros((height, width, 3), dtype=np.uint8)], return_tensors="pt")
    return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def _see(ledger: Ledger, model: Any, inputs: Mapping[str, torch.Tensor], images: int) -> _Seen:
    """Have the tower look at so many copies of an image, all at once as in a prompt, and count."""
    taken = inspect.signature(model.get_image_features).parameters
    gc.collect()
    ledger.reset()
    before = ledger.live[CARD]
    given = {name: _on_card(torch.cat([value] * images)) for name, value in inputs.items() if name in taken}
    pixels, counter = ledger.live[CARD] - before, FlopCounterMode(display=False)
    with counter, torch.no_grad():
        out = model.get_image_features(**given)
    gc.collect()
    left, peak = ledger.live[CARD] - before, ledger.peak[CARD] - before
    return _Seen(rows(out), peak, left, pixels, counter.get_total_flops() / images)


def _on_card(tensor: torch.Tensor) -> torch.Tensor:
    """Return a fake of a tensor; whole numbers, such as grids, with their values, and pixels in 16 bits."""
    if tensor.is_floating_point():
        return torch.empty(tensor.shape, dtype=torch.bfloat16, device=CARD)
    return torch.tensor(tensor.tolist(), dtype=tensor.dtype, device=CARD)


def _rules(ledger: Ledger) -> Rules:
    """Return the rules for pixels: they are a picture, other than any number of padding, and a card unfolds them into one piece."""

    def differs(tensor: torch.Tensor, other: float) -> torch.Tensor:
        if ledger.real(tensor) is None:
            return torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
        with swapped(ledger, "rules", {}):
            return tensor != other

    def unfolded(tensor: torch.Tensor, *how: Sequence[int]) -> torch.Tensor:
        return tensor.new_empty(torch.ops.aten.im2col.default(tensor.to("meta"), *how).shape)

    return {torch.ops.aten.ne.Scalar: differs, torch.ops.aten.im2col.default: unfolded}


def rows(out: Any) -> int:
    """Count the tokens among what `get_image_features` returns: features, or what a tower puts out, pooled where it pools."""
    if isinstance(out, (list, tuple)):
        return sum(map(rows, out))
    if isinstance(out, torch.Tensor):
        return out.numel() // out.shape[-1]
    pooled = getattr(out, "pooler_output", None)
    return rows(out.last_hidden_state if pooled is None else pooled)


def _size(inputs: Mapping[str, torch.Tensor], patch: int) -> tuple[int, int]:
    """Return width and height of an image that its processor has shrunk to a grid of patches."""
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    return columns * patch, rows * patch
