"""NVML of cards that are not there: FAKE_CARDS="8,12" are two, of 8 and of 12 GiB. PYTHONPATH puts it before the real one."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

SIZES = [int(float(gib) * (1 << 30)) for gib in os.environ.get("FAKE_CARDS", "").split(",") if gib]
_NAMES = ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB")  # a kind for each size
_TOLD: dict[str, Any] = {
    "nvmlDeviceGetName": lambda card: name(card),
    "nvmlDeviceGetUUID": lambda card: f"GPU-fake-{card}",
    "nvmlDeviceGetCudaComputeCapability": lambda _: (8, 0),
    "nvmlDeviceGetComputeRunningProcesses": lambda _: [],
    "nvmlDeviceGetGraphicsRunningProcesses": lambda _: [],
    "nvmlDeviceGetHandleByIndex": lambda index: index,
    "nvmlDeviceGetCount": lambda: len(SIZES),
    "nvmlSystemGetDriverVersion": lambda: "580.95.05",
    "nvmlInit": lambda: None,
    "nvmlShutdown": lambda: None,
}


class NVMLError(Exception):
    """What every call says that these cards do not support."""


def name(card: int) -> str:
    """Return the name of a card: those of another size than the first are of another kind."""
    return _NAMES[SIZES[card] != SIZES[0]]


def nvmlDeviceGetMemoryInfo(card: int, *_version: object) -> SimpleNamespace:  # noqa: N802 # NVML's name
    """Tell the size of a card, all of it free."""
    return SimpleNamespace(total=SIZES[card], free=SIZES[card], used=0)


def _refuse(*_: object) -> None:
    raise NVMLError("not supported")


def __getattr__(name: str) -> Any:
    if name in _TOLD:
        return _TOLD[name]
    if name.startswith("nvml"):
        return _refuse
    if name.startswith("NVML_"):
        return 0
    raise AttributeError(name)
