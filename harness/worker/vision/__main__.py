"""Say what one image takes in a model that sees.

    python -m harness.worker.vision < {"config": {...}, "settings": {...}} > image.json
    python -m harness.worker.vision --catalog    # rebuilds harness/data/images.json

`settings` are those of the image processor beside the weights, null for its own.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec
import torch
import transformers

from harness.architecture import skeleton_source
from harness.architecture.vision.image_trace import SHIPPED_IMAGES, ImageTrace, is_seeing
from harness.catalog import shipped
from harness.core.records import Record
from harness.worker.build_skeleton import limit_memory
from harness.worker.vision.trace import trace_image


class ImageRequest(Record, frozen=True, kw_only=True):
    """What an image is asked for."""

    config: dict[str, Any]
    settings: dict[str, Any] | None = None


def write_images() -> None:
    """Trace an image in every model of the catalog that sees, and write what is shipped."""
    found: dict[str, ImageTrace] = {}
    for name, entry in shipped.catalog().items():
        key, shape = skeleton_source.fingerprint(entry.config), skeleton_source.shipped(entry.config)
        if shape is not None and is_seeing(shape) and key not in found:
            found[key] = trace_image(entry.config)
            print(name, found[key].tokens, file=sys.stderr)
    SHIPPED_IMAGES.write_text(json.dumps(msgspec.to_builtins(found), indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Answer one request from the standard input, or rebuild what is shipped."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if sys.argv[1:] == ["--catalog"]:
        write_images()
        return
    limit_memory()
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=ImageRequest)
    sys.stdout.buffer.write(msgspec.json.encode(trace_image(asked.config, asked.settings)))


if __name__ == "__main__":
    main()
