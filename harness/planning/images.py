"""Prompts with images: how many tokens they are, and the code that puts them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

from harness.architecture import model_spec
from harness.architecture.vision.image_trace import ImageTrace, image_trace, is_seeing, processor_settings
from harness.core.errors import UsageError
from harness.core.records import Workload
from harness.core.units import format_size

if TYPE_CHECKING:
    from harness.architecture.model_spec import ModelSpec
    from harness.catalog.resolve import Source


def with_images(spec: ModelSpec, source: Source, workload: Workload, *, in_context: bool) -> tuple[ModelSpec, Workload]:
    """Return a model with what an image takes in it, and a workload whose prompts have the tokens of its images.

    They come on top of the prompt's tokens, or are `in_context` among them.

    Raises:
        UsageError: the model reads no images, they cannot be traced, or leave no room for text.
    """
    many = f"{workload.images} image{'s' * (workload.images > 1)}"
    if spec.gguf is not None or not is_seeing(spec.skeleton):
        raise UsageError(f"{spec.name} reads no images: drop --images {workload.images}")
    here = model_spec.local(source.base or source)
    image = image_trace(spec.config, processor_settings(here) if here is not None else None)
    taken = workload.images * image.tokens
    if not in_context:
        return replace(spec, image=image), replace(workload, prompt_tokens=workload.prompt_tokens + taken)
    if taken >= workload.prompt_tokens:
        context = workload.prompt_tokens + workload.new_tokens
        raise UsageError(f"--context {context} leaves no room for text beside {many} of {image.tokens} tokens: raise it")
    return replace(spec, image=image), workload


def of_images(image: ImageTrace, workload: Workload) -> str:
    """Say how many of a prompt's tokens are of images, and of what size these are."""
    size = f" of {image.width} x {image.height} pixels" if image.width else ""
    many = f"{workload.images} images{size}" if workload.images > 1 else f"one image{size}"
    return f"{workload.images * image.tokens:,} of them of {many}"


def explained(image: ImageTrace, workload: Workload, element_bytes: int) -> str:
    """Say what the images of a workload take in the vision tower, and where that is from."""
    count = workload.images * workload.batch
    peak, kept = (format_size(size(count, element_bytes)) for size in (image.peak_bytes, image.kept_bytes))
    return (
        f"Each image is {image.tokens:,} tokens. The vision tower takes {peak} at its peak, {kept} of it while the prompt is read, "
        f"and {count * image.flops / 1e12:.3g} trillion operations: traced with {image.source}."
    )


def lines_with_images(image: ImageTrace, workload: Workload, device: str, trust: str) -> list[str]:
    """Write the lines between loading a model and `generate`: processor, images, prompt, and the inputs of both."""
    names = ", ".join(f'"image{number}.jpg"' for number in range(1, workload.images + 1))
    return [
        "from PIL import Image",
        "from transformers import AutoProcessor, GenerationConfig",
        "",
        f"IMAGES = [{names}]  # the files of the images of a prompt",
        "",
        f"processor = AutoProcessor.from_pretrained(MODEL{trust})",
        'images = [Image.open(name).convert("RGB") for name in IMAGES]',
        *_no_larger(image),
        'content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What is to be seen?"}]',
        'prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)',
        f"inputs = processor(text=[prompt] * {workload.batch}, images=[images] * {workload.batch}, "
        f'padding=True, return_tensors="pt").to({device}, model.dtype)',
    ]


def _no_larger(image: ImageTrace) -> Sequence[str]:
    """Write lines that shrink an image to the size that was planned, of models that take any size."""
    if image.width is None or image.height is None:
        return ()
    wide, narrow = max(image.width, image.height), min(image.width, image.height)
    return (
        "for image in images:  # no larger than planned",
        f"    image.thumbnail(({wide}, {narrow}) if image.width > image.height else ({narrow}, {wide}))",
    )
