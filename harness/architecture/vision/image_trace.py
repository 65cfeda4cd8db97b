"""What one image takes: tokens of the prompt, bytes and operations of the vision tower; shipped for the catalog, else traced once.

`python -m harness.worker.vision` runs transformers' own image processor and the model's own `get_image_features` on fake tensors;
`--catalog` rebuilds what is shipped. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from harness.architecture.ask_worker import ask_worker
from harness.architecture.skeleton import Skeleton, reads_text
from harness.architecture.skeleton_source import fingerprint
from harness.core.records import Record
from harness.core.text import as_written
from harness.data import DATA
from harness.machine.cache import cache_dir, keep, kept

SHIPPED_IMAGES = DATA / "images.json"
_LIMIT_S = 300.0
_KEPT = "image1"


class ImageTrace(Record, frozen=True, kw_only=True):
    """What one image takes at the model's own resolution: the size of which its processor makes the most tokens.

    `width` and `height` are the pixels of such an image, None where the processor makes one size of all, or tiles. Bytes are those
    in 16 bits on a GPU, beside the weights: `pixels_bytes` of the input, `features_bytes` of what the tower hands to the language
    model, and at the tower's peak `beside_bytes` once and `each_bytes` more for every image, its pixels and features among them.
    `flops` are operations.
    """

    tokens: int
    pixels_bytes: int
    features_bytes: int
    beside_bytes: int
    each_bytes: int
    flops: float
    source: str
    width: int | None = None
    height: int | None = None

    def peak_bytes(self, images: int, element_bytes: int) -> int:
        """Return what the tower takes at its peak for so many images at once."""
        return (self.beside_bytes + images * self.each_bytes) * element_bytes // 2

    def kept_bytes(self, images: int, element_bytes: int) -> int:
        """Return what stays of them while the prompt is read."""
        return images * (self.pixels_bytes + self.features_bytes) * element_bytes // 2


def is_seeing(skeleton: Skeleton) -> bool:
    """Say whether a model has modules beside those that read text."""
    return any(not reads_text(child.name) for block in skeleton.blocks for child in block.children)


def image_trace(config: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> ImageTrace:
    """Return what one image takes in a model of this config, shipped or kept, else traced by a worker (seconds) and kept.

    `settings` are those of the image processor beside the weights; without them they are its class's own.

    Raises:
        UsageError: transformers has no processor for it that is installed, or the model cannot be traced.
    """
    shipped: dict[str, ImageTrace] = msgspec.json.decode(SHIPPED_IMAGES.read_bytes(), type=dict[str, ImageTrace])
    if settings is None and fingerprint(config) in shipped:
        return shipped[fingerprint(config)]
    place = cache_dir() / _name(config, settings)
    found = kept(place, ImageTrace)
    if found is not None:
        return found
    what = f"no image was traced for model_type {as_written(config.get('model_type'))}"
    text = ask_worker("vision", {"config": config, "settings": settings}, what, _LIMIT_S)
    keep(place, text)
    return msgspec.json.decode(text, type=ImageTrace)


def processor_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of the image processor in the directory of a model, None if there are none."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        try:
            read = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found = read.get("image_processor", read if name.startswith("pre") else None) if isinstance(read, dict) else None
        if isinstance(found, dict):
            return found
    return None


def _name(config: Mapping[str, Any], settings: Mapping[str, Any] | None) -> str:
    from importlib.metadata import version  # slow to import

    asked = hashlib.sha256(json.dumps([fingerprint(config), settings], sort_keys=True).encode()).hexdigest()[:16]
    return f"{_KEPT}-{version('transformers')}-{asked}.json"
