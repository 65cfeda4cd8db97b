"""Print as JSON what torch can use of this machine's accelerators: `python -m harness.worker.accelerators`."""

from __future__ import annotations

import os
import sys

import torch

from harness.core.records import encode_record
from harness.machine.accelerators import Seen, TorchDevice


def describe_accelerators() -> Seen:
    """Initialize torch's accelerator and return what it is; a failure of torch or of its driver is returned, not raised."""
    try:
        return _described()
    except (RuntimeError, AssertionError, OSError, ValueError) as error:  # what torch raises if it cannot begin
        return Seen(error=" ".join(str(error).split())[:300] or type(error).__name__)


def _described() -> Seen:
    if torch.version.hip is not None or torch.version.cuda is not None:
        kind = "hip" if torch.version.hip is not None else "cuda"
        torch.cuda.init()
        cards = tuple(_card(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count()))
        return Seen(kind=kind if cards else None, cards=cards, architectures=tuple(torch.cuda.get_arch_list()))
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type not in ("mps", "xpu"):
        return Seen()
    if found.type == "mps":
        return Seen(kind="mps", cards=(TorchDevice(name="Apple GPU", total_bytes=torch.mps.recommended_max_memory()),))
    cards = tuple(_card(torch.xpu.get_device_properties(index)) for index in range(torch.xpu.device_count()))
    return Seen(kind="xpu", cards=cards)


def _card(properties: object) -> TorchDevice:
    """Turn what torch says of a device into a Card; what this torch does not say is None."""
    uuid, major = getattr(properties, "uuid", None), getattr(properties, "major", None)
    architecture = getattr(properties, "gcnArchName", None) or (f"sm_{major}{getattr(properties, 'minor', 0)}" if major else None)
    return TorchDevice(
        name=str(getattr(properties, "name", "")),
        total_bytes=getattr(properties, "total_memory", None),
        uuid=str(uuid) if uuid is not None else None,
        architecture=architecture,
    )


if __name__ == "__main__":
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # NVML's order, as the cases have it
    sys.stdout.buffer.write(encode_record(describe_accelerators()) + b"\n")
