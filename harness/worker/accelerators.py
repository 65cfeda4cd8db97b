"""What torch has on this machine's accelerators; as JSON what it can use of them: `python -m harness.worker.accelerators`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from msgspec.structs import replace

from harness.core.records import encode_record
from harness.machine import nvml
from harness.machine.accelerators import Seen, TorchDevice


def describe_accelerators(*, measure: bool = False) -> Seen:
    """Initialize torch's accelerator and return what it is; a failure of torch or of its driver is returned, not raised.

    `measure` begins on every NVIDIA GPU, to see by NVML what a context takes.
    """
    try:
        seen = _described()
        return replace(seen, cards=_measured(seen.cards)) if measure and seen.kind == "cuda" else seen
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


def _measured(cards: tuple[TorchDevice, ...]) -> tuple[TorchDevice, ...]:
    with nvml.lent() as library:
        handles = nvml.visible_gpus(library)
        return tuple(replace(card, context_bytes=begin(library, handles, index)) for index, card in enumerate(cards))


def begin(library: Any, handles: Sequence[Any], index: int) -> int | None:
    """Have torch begin on a GPU; return the bytes of its context, which is what the card has less then, None if NVML does not tell.

    Kernels that CUDA loads later come on top.
    """
    free = _free(library, handles, index)
    torch.zeros(1, device=index)  # makes the context
    torch.cuda.synchronize(index)
    left, reserved = _free(library, handles, index), torch.cuda.memory_reserved(index)
    torch.cuda.empty_cache()
    return None if free is None or left is None else max(free - left - reserved, 0)


def reset_vram_peaks() -> None:
    """Begin torch's peaks of allocated and reserved memory anew on every GPU; they are torch's own counts, and touch no card."""
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def vram_peaks() -> tuple[dict[str, int], dict[str, int]]:
    """Return torch's peaks of allocated and of reserved bytes by tier; empty without a GPU in use.

    A library may initialize CUDA and leave the cards alone, as bitsandbytes does when it is imported: nothing held is no peak of 0.
    """
    if not torch.cuda.is_initialized():
        return {}, {}
    indices = [index for index in range(torch.cuda.device_count()) if torch.cuda.max_memory_reserved(index)]
    return (
        {f"gpu:{index}": torch.cuda.max_memory_allocated(index) for index in indices},
        {f"gpu:{index}": torch.cuda.max_memory_reserved(index) for index in indices},
    )


def torch_memory() -> dict[str, tuple[int, int]]:
    """Return by tier what torch has allocated and what it has reserved on each GPU that it holds anything of, in bytes."""
    if not torch.cuda.is_initialized():
        return {}
    held = (index for index in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(index))
    return {f"gpu:{index}": (torch.cuda.memory_allocated(index), torch.cuda.memory_reserved(index)) for index in held}


def _free(library: Any, handles: Sequence[Any], index: int) -> int | None:
    memory = nvml.ask(library, "nvmlDeviceGetMemoryInfo", handles[index]) if index < len(handles) else None
    return int(memory.free) if memory is not None else None


def _card(properties: object) -> TorchDevice:
    """Turn what torch says of a device into a TorchDevice; what this torch does not say is None."""
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
    sys.stdout.buffer.write(encode_record(describe_accelerators(measure="--measure" in sys.argv)) + b"\n")
