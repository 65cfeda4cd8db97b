"""What a trace says of one image against the libraries' own code on the processor: tokens, what the tower makes, its peak."""

from __future__ import annotations

import gc
import inspect
import json
from importlib.util import find_spec
from typing import Any

import msgspec
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from harness.architecture import skeleton_source
from harness.architecture.skeleton import reads_text
from harness.architecture.vision.image_trace import SHIPPED_IMAGES, ImageTrace
from harness.catalog import shipped
from harness.worker.build_skeleton import read_model_config
from harness.worker.trace.ledger import Ledger
from harness.worker.vision.trace import SIDES, processed, processor_of, rows, trace_image, trace_inputs
from tests.support.seeing_models import SEEING, built, config_of

CPU = torch.device("cpu")
# Of a grid of any size, a small one: files say so beside the weights. Of pooled ones, as many patches as a card's attention takes
# without a copy of the mask, which no attention of a processor makes: a multiple of 16.
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"size": {"shortest_edge": 3136, "longest_edge": 50176}, "patch_size": 14},
    "qwen3_vl": {"size": {"shortest_edge": 4096, "longest_edge": 65536}, "patch_size": 16},
    "gemma4": {"max_soft_tokens": 70, "pooling_kernel_size": 4},
}
# What image processors make that need torchvision, which the tests do without: tiles, and patches padded to as many.
INPUTS: dict[str, list[dict[str, torch.Tensor]]] = {
    "llama4": [{"pixel_values": torch.zeros(count, 3, 56, 56)} for count in (5, 17)],
    "lfm2_vl": [
        {
            "pixel_values": torch.zeros(count, 1024, 768),
            "pixel_attention_mask": torch.ones(count, 1024, dtype=torch.int32),
            "spatial_shapes": torch.full((count, 2), 32),
        }
        for count in (3, 2)
    ],
}
TRACED = ("llava", "llava_next", "qwen2_5_vl", "gemma4", *INPUTS)  # one size, tiles, a grid of any size, pooled
# torch counts the operations of attention on cards alone.
_OF_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}
PEAK_AGREES = 0.05  # a card's attention keeps a number for each row that a processor's does not keep so


@pytest.mark.parametrize("kind", TRACED)
def test_a_trace_says_what_the_model_makes_of_real_images(kind: str) -> None:
    """The tower is run on real tensors, for one image and for two; the larger of the shapes is what was traced."""
    config, model = config_of(kind), built(config_of(kind))
    shapes = INPUTS.get(kind) or _processed(config, SETTINGS.get(kind))
    traced = trace_inputs(built(config), shapes) if kind in INPUTS else trace_image(config, SETTINGS.get(kind))
    found = [_looked_at(model, inputs, 1) for inputs in shapes]
    tokens, features, peak, flops = max(found)
    assert (traced.tokens, traced.flops) == (tokens, flops)
    assert traced.features_bytes == pytest.approx(features, abs=max(1024, 0.01 * peak))
    assert traced.peak_bytes(1, 2) == pytest.approx(peak, rel=PEAK_AGREES)
    again = _looked_at(model, shapes[found.index(max(found))], 2)
    assert again[0] == 2 * tokens
    assert traced.peak_bytes(2, 2) == pytest.approx(again[2], rel=PEAK_AGREES)


def _processed(config: dict[str, Any], settings: dict[str, Any] | None) -> list[dict[str, torch.Tensor]]:
    return [processed(processor_of(read_model_config(config), settings), *side) for side in SIDES]


def _looked_at(model: Any, inputs: dict[str, torch.Tensor], images: int) -> tuple[int, int, int, float]:
    """Return tokens, bytes of features, bytes at the peak and operations of an image."""
    taken = inspect.signature(model.get_image_features).parameters
    many = {name: torch.cat([value] * images) for name, value in inputs.items() if name in taken}
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), Ledger() as ledger, FlopCounterMode(display=False, custom_mapping=_OF_CPU) as counter:
            held = [tensor.view_as(tensor) for tensor in (*model.parameters(), *model.buffers())]  # or views of them would count
            ledger.reset()
            before = ledger.live[CPU]
            given = {name: value.to(torch.bfloat16) if value.is_floating_point() else +value for name, value in many.items()}
            pixels = ledger.live[CPU]
            out = model.get_image_features(**given)
            gc.collect()
            left = ledger.live[CPU] - pixels
    finally:
        gc.enable()
    del held
    return rows(out), left, ledger.peak[CPU] - before, counter.get_total_flops() / images


# transformers 5.24's Llama4ForConditionalGeneration asks the output of its language model for images, which it does not have.
@pytest.mark.parametrize("kind", sorted(SEEING.keys() - {"llama4"}))
def test_what_reads_text_is_what_runs_where_there_is_no_image(kind: str) -> None:
    model, ran = built(config_of(kind)), set[str]()
    names = {id(module): name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    hooks = [
        module.register_forward_pre_hook(lambda one, _: ran.add(names[id(one)]))
        for module in model.modules()
        if id(module) in names
    ]
    with torch.no_grad():
        model(input_ids=torch.full((1, 4), 7))
    for hook in hooks:
        hook.remove()
    assert ran == {name for name in names.values() if reads_text(name)}


def test_shipped_images_are_as_traced_now() -> None:
    config = shipped.catalog()["Qwen/Qwen3-VL-2B-Instruct"].config
    kept = msgspec.json.decode(SHIPPED_IMAGES.read_bytes(), type=dict[str, ImageTrace])[skeleton_source.fingerprint(config)]
    assert kept == msgspec.structs.replace(trace_image(config), source=kept.source)


def test_what_cannot_be_traced_says_why() -> None:
    with pytest.raises(ValueError, match="no class for model_type 'llama' that reads images"):
        trace_image({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})


def test_a_model_without_images_as_tokens_says_so() -> None:
    """Mllama hands them to cross-attention."""
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    with pytest.raises(ValueError, match="MllamaForConditionalGeneration takes no images as tokens of a prompt"):
        trace_image({"model_type": "mllama", "text_config": {**text, "cross_attention_layers": [1]}})


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_a_tower_that_needs_a_package_says_which() -> None:
    with pytest.raises(ValueError, match="its vision tower mobilenetv5_300m_enc is one of timm: pip install timm"):
        trace_image({"model_type": "gemma3n"})


def test_every_model_of_the_catalog_that_sees_is_shipped() -> None:
    seeing = {skeleton_source.fingerprint(entry.config) for entry in shipped.catalog().values() if "vision_config" in entry.config}
    assert seeing == set(json.loads(SHIPPED_IMAGES.read_bytes()))
