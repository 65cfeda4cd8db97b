"""The machine as it is: its tiers with total, free and limit, and the versions that decide how models load.

A figure that cannot be had is None, never an error. Nothing names host or user, because the record is published with results.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from msgspec.structs import replace

from harness.core.records import Case, Machine, Record, Tier
from harness.machine import bandwidth, cgroup, nvml
from harness.machine.gpus import LANE_BYTES_PER_S, card_of, is_integrated, machine_name, profile

__all__ = ["Link", "limited", "links", "probe", "profile", "versions"]

PACKAGES = (
    "fitmatrix",
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "torchao",
    "optimum-quanto",
    "gptqmodel",
    "optimum",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "gguf",
    "sentencepiece",
)

_SHARE = 8  # measuring takes an eighth of what is free at most


class Link(Record, frozen=True, kw_only=True):
    """The way between the RAM and a card: PCI Express of a `generation` with this many `lanes`, one way. None is unknown."""

    tier: str
    generation: int | None = None
    lanes: int | None = None
    bytes_per_s: float | None = None


def probe(
    *,
    ram_bytes: int | None = None,
    vram_bytes: int | None = None,
    scratch: Path | None = None,
    measure: bool = False,
    root: Path = cgroup.ROOT,
) -> Machine:
    """Describe this machine: tiers "gpu:0" and on, "cpu", and "disk", the one that holds `scratch` or the current directory.

    `ram_bytes` and `vram_bytes` are limits to emulate, the latter on each card. A limit is what may be used in all; what others
    in the same container hold is taken from `free_bytes`. Bandwidths of RAM and disk are those measured before, None if none
    were; `measure` takes some seconds to measure them anew. `root` is where /proc and /sys are.
    """
    with nvml.lent() as library:
        gpus = tuple(_gpu_tiers(library, vram_bytes))
        driver = nvml.ask(library, "nvmlSystemGetDriverVersion")
    cores = cgroup.cores(root)
    cpu, disk = _cpu_tier(ram_bytes, root, cores, measure), _disk_tier((scratch or Path.cwd()).absolute(), measure)
    tiers = (*gpus, cpu, disk)
    return Machine(
        name=machine_name(tiers, cores),
        tiers=tiers,
        cpu=_cpu_model(root),
        cores=cores,
        system=_system(),
        driver=driver,
        mapping_bytes=_mapping_bytes(root),
        avx512_bf16=_has_flag(root, "avx512_bf16"),
    )


def limited(probed: Machine, case: Case) -> Machine:
    """Return the machine as a case sees it that may use less than all: with the limits on its tiers, by the same name."""
    most = {"gpu": case.vram_bytes, "cpu": case.ram_bytes}
    tiers = tuple(_limited(tier, size) if (size := most.get(tier.kind)) is not None else tier for tier in probed.tiers)
    return replace(probed, tiers=tiers)


def _limited(tier: Tier, most: int) -> Tier:
    return replace(tier, limit_bytes=min(most, tier.limit_bytes or most))


def links() -> tuple[Link, ...]:
    """Return the links of the cards of this machine, by the name of their tier.

    The generation is the most that card and slot can do together, as a card at rest runs slower; the lanes are those in use.
    """
    with nvml.lent() as library:
        return tuple(_link(library, f"gpu:{index}", card) for index, card in enumerate(nvml.visible_gpus(library)))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide how models load and run; absent ones are left out."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _cpu_tier(ram_bytes: int | None, root: Path, threads: int, measure: bool) -> Tier:
    memory, identity = psutil.virtual_memory(), f"{_cpu_model(root)}, {threads} threads"
    limit, left = cgroup.memory(root)
    free = memory.available if left is None else min(memory.available, left)
    if limit is not None and limit >= memory.total:  # a container may be allowed more than there is, which limits nothing
        limit = None
    return Tier(
        name="cpu",
        kind="cpu",
        total_bytes=memory.total,
        free_bytes=free,
        limit_bytes=min((size for size in (limit, ram_bytes) if size is not None), default=None),
        bytes_per_s=bandwidth.ram(identity, threads, free // _SHARE, measure),
        is_under_load=bandwidth.is_under_load("ram", identity),
    )


def _mapping_bytes(root: Path) -> int | None:
    """Return the largest private mapping that Linux grants, and so the largest file: torch and safetensors map files writable.

    Source: the kernel's vm/overcommit-accounting. Mode 0 refuses what exceeds all RAM and swap together, whatever of it is free
    and whatever a container may use; mode 2 what exceeds the rest of CommitLimit; mode 1 nothing.
    """
    try:
        mode = (root / "proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip()
        told = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    sizes = {name: int(size) << 10 for name, size in re.findall(r"^(\w+): *(\d+) kB$", told, re.MULTILINE)}
    try:
        if mode == "0":
            return sizes["MemTotal"] + sizes["SwapTotal"]
        return max(0, sizes["CommitLimit"] - sizes["Committed_AS"]) if mode == "2" else None
    except KeyError:  # a sandbox that plays Linux does not report everything
        return None


def _disk_tier(scratch: Path, measure: bool) -> Tier:
    """Describe the file system that holds `scratch`, or will once the folder is made."""
    there = next((folder for folder in (scratch, *scratch.parents) if folder.exists()), scratch)
    try:
        usage, device = shutil.disk_usage(there), there.stat().st_dev
    except OSError:
        return Tier(name="disk", kind="disk")
    identity = f"device {device} of {usage.total} bytes"
    speed = bandwidth.disk(identity, there, usage.free // _SHARE, measure)
    marked = bandwidth.is_under_load("disk", identity)
    return Tier(name="disk", kind="disk", total_bytes=usage.total, free_bytes=usage.free, bytes_per_s=speed, is_under_load=marked)


class _Ram(NamedTuple):
    """The RAM as NVML tells of a card's memory."""

    total: int
    free: int


def _gpu_tiers(library: Any, vram_bytes: int | None) -> Iterator[Tier]:
    for index, card in enumerate(nvml.visible_gpus(library)):
        model = nvml.ask(library, "nvmlDeviceGetName", card)
        found = nvml.ask(library, "nvmlDeviceGetCudaComputeCapability", card)
        capability = "{}.{}".format(*found) if found else None
        memory, shared = nvml.ask(library, "nvmlDeviceGetMemoryInfo", card), is_integrated(model, capability)
        if shared:  # NVML tells no size, or one without the pages that the RAM can give up
            memory = _Ram(total=psutil.virtual_memory().total, free=psutil.virtual_memory().available)
        tier = Tier(
            name=f"gpu:{index}",
            kind="gpu",
            total_bytes=int(memory.total) if memory else None,
            free_bytes=int(memory.free) if memory else None,
            limit_bytes=vram_bytes,
            link_bytes_per_s=_link(library, f"gpu:{index}", card).bytes_per_s,
            model=model,
            compute_capability=capability,
            shared=shared,
        )
        known = card_of(tier)
        yield replace(tier, bytes_per_s=known.bytes_per_s if known else None)


def _link(library: Any, tier: str, card: Any) -> Link:
    generation = nvml.ask(library, "nvmlDeviceGetMaxPcieLinkGeneration", card)
    lanes = nvml.ask(library, "nvmlDeviceGetCurrPcieLinkWidth", card)
    speed = LANE_BYTES_PER_S[generation] * lanes if lanes and generation in LANE_BYTES_PER_S else None
    return Link(tier=tier, generation=generation, lanes=lanes, bytes_per_s=speed)


def _cpu_model(root: Path) -> str | None:
    """Return the processor's name, as the kernel tells it on x86 and `platform` elsewhere."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", (root / "proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
        if found:
            return " ".join(found[1].split())
    return platform.processor() or None


def _has_flag(root: Path, flag: str) -> bool | None:
    """Say whether the kernel lists a feature of the processor; None if it lists none, as on other processors than x86."""
    with suppress(OSError):
        found = re.search(r"^flags\s*:(.*)$", (root / "proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
        return flag in found[1].split() if found else None
    return None


def _system() -> str:
    """Name the system and its release to the second figure, "Linux 6.18"; longer ones may carry a builder's name.

    Linux within Windows says so: there the driver is that of Windows.
    """
    release = re.match(r"\d+(?:\.\d+)?", platform.release())
    within = ["(WSL)"] if "microsoft" in platform.release().lower() else []
    return " ".join([platform.system() or sys.platform, *([release[0]] if release else []), *within])
