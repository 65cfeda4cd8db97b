"""NVML of cards that are not there: FAKE_CARDS="2x8" is two cards of 8 GiB. It is found before the real one by PYTHONPATH."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

_COUNT, _, _GIB = os.environ.get("FAKE_CARDS", "0x0").partition("x")
_TOLD: dict[str, Any] = {
    "nvmlDeviceGetName": lambda _: "NVIDIA A100-SXM4-80GB",
    "nvmlDeviceGetUUID": lambda card: f"GPU-fake-{card}",
    "nvmlDeviceGetCudaComputeCapability": lambda _: (8, 0),
    "nvmlDeviceGetComputeRunningProcesses": lambda _: [],
    "nvmlDeviceGetGraphicsRunningProcesses": lambda _: [],
    "nvmlDeviceGetHandleByIndex": lambda index: index,
    "nvmlDeviceGetCount": lambda: int(_COUNT),
    "nvmlSystemGetDriverVersion": lambda: "580.95.05",
    "nvmlInit": lambda: None,
    "nvmlShutdown": lambda: None,
}


class NVMLError(Exception):
    """What every call says that these cards do not support."""


def nvmlDeviceGetMemoryInfo(_card: int, *_version: object) -> SimpleNamespace:  # noqa: N802 # NVML's name
    """Tell the size of a card, all of it free."""
    total = int(float(_GIB) * (1 << 30))
    return SimpleNamespace(total=total, free=total, used=0)


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
