"""What torch can do with the GPUs of this machine, held against what NVML knows of them.

NVML asks the driver. Whether torch can use a card depends on what torch was built for, on the driver, and on the environment: so
torch is asked, in a process of its own (`harness.worker.accelerators`), before a case is believed to run on a card. What torch was
built for stands in its version.py and is read without importing it, which `fitmatrix plan` can afford.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from harness.core.records import Machine, Record, Tier
from harness.machine import bandwidth
from harness.machine.gpus import machine_name

LOOK_S = 60.0
_ORDER = "PCI_BUS_ID"
# A context outside of this was measured while others took or gave back memory of the card.
_PLAUSIBLE = (50_000_000, 4_000_000_000)
_START = "https://pytorch.org/get-started/locally/"
_FOR_CPU = "built for the CPU only"
_ENTRY = re.compile(r"^(__version__|cuda|hip|xpu)\b[^=\n]*= *'([^'\n]+)'", re.MULTILINE)
# Least drivers for the CUDA that torch was built for, Linux: CUDA Toolkit release notes, table "minor version compatibility".
_LEAST_DRIVER = {"11": 450, "12": 525, "13": 580}

# torch's allocator reads it when it is first used (c10/core/AllocatorConfig.h); PYTORCH_CUDA_ALLOC_CONF is its older name.
ALLOCATOR_OPTIONS = "PYTORCH_ALLOC_CONF"
EXPANDABLE_SEGMENTS = "expandable_segments:True"


class TorchBuild(Record, frozen=True, kw_only=True):
    """What torch was built for, as its version.py says; all None but the version: for processors only."""

    version: str
    cuda: str | None = None  #: the CUDA toolkit, such as "13.0"
    hip: str | None = None  #: the HIP of ROCm
    xpu: str | None = None  #: the SYCL compiler of Intel GPUs

    @property
    def title(self) -> str:
        """In words: "built for CUDA 13.0"."""
        named = (("CUDA", self.cuda), ("ROCm's HIP", self.hip), ("Intel GPUs, SYCL", self.xpu))
        return next((f"built for {name} {version}" for name, version in named if version), _FOR_CPU)


class TorchDevice(Record, frozen=True, kw_only=True):
    """One device as torch sees it."""

    name: str
    total_bytes: int | None = None
    uuid: str | None = None  #: without NVML's "GPU-" before it
    architecture: str | None = None  #: "sm_86", "gfx942"; None if torch does not say
    context_bytes: int | None = None  #: what a CUDA context took of it, if it was measured and NVML reports it


class Seen(Record, frozen=True, kw_only=True):
    """What torch found when it was asked to use its accelerator."""

    kind: str | None = None  #: "cuda", "hip", "mps", "xpu"; None: no accelerator
    cards: tuple[TorchDevice, ...] = ()
    architectures: tuple[str, ...] = ()  #: what this torch has kernels for: "sm_80", "compute_90"
    error: str | None = None  #: what torch said when it could not


class TorchReport(Record, frozen=True, kw_only=True):
    """What the installed torch was built for, what it saw, None if it was not asked, and why it cannot use the cards."""

    build: TorchBuild
    seen: Seen | None = None
    problem: str | None = None


def torch_build() -> TorchBuild | None:
    """Return what the installed torch was built for, None without torch. Imports nothing of it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        entries = dict(_ENTRY.findall((Path(found.origin).parent / "version.py").read_text(encoding="utf-8")))
    except OSError:
        return None
    version = entries.pop("__version__", "")
    return TorchBuild(version=version, **entries)


def ask_torch(package_root: Path = Path(__file__).parents[2], *, measure: bool = False) -> Seen:
    """Ask torch in a process of its own what it can use; takes the seconds of its import. What goes wrong is in `error`.

    `measure` lets it begin on every card, to see what a CUDA context takes.
    """
    import subprocess  # which plans for a machine that is described do without

    command = [sys.executable, "-m", "harness.worker.accelerators", *(["--measure"] if measure else [])]
    try:
        done = subprocess.run(command, capture_output=True, timeout=LOOK_S, check=False, cwd=package_root)
    except subprocess.TimeoutExpired:
        return Seen(error=f"torch did not answer within {LOOK_S:.0f} s")
    try:
        return msgspec.json.decode(done.stdout, type=Seen)
    except msgspec.DecodeError:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Seen(error=last[:300])


def problem(machine: Machine, build: TorchBuild | None, seen: Seen | None) -> str | None:
    """Say in one sentence why torch cannot use the NVIDIA GPUs that NVML knows, and the cure; None if it can or there are none.

    Without `seen`, torch has not been asked: only what it was built for is judged. The first row of PROBLEMS that applies decides.
    """
    if not machine.gpus or build is None:
        return None
    contact = _Contact(machine=machine, build=build, seen=seen)
    return next((sentence(contact) for applies, sentence in PROBLEMS if applies(contact)), None)


def hidden(machine: Machine, seen: Seen | None) -> str | None:
    """Say that torch sees an accelerator which this version does not measure; None if there is none."""
    maker = {"hip": "AMD", "mps": "Apple", "xpu": "Intel"}.get(seen.kind or "") if seen else None
    if maker is None and not (seen and seen.kind == "cuda" and not machine.gpus):
        return None
    if maker is None:
        return (
            "torch sees an NVIDIA GPU and NVML does not (libnvidia-ml is missing): only the CPU is measured, and the GPU is hidden"
        )
    named = f" ({seen.cards[0].name})" if seen and seen.cards else ""
    return f"an {maker} GPU is here{named}; this version measures the CPU only, and the GPU is hidden from all cases"


def ram_fallback(machine: Machine) -> str | None:
    """Say where the driver may use RAM for VRAM, so that what is too big runs slowly and does not fail: on Windows, and within it.

    Source: NVIDIA's "System Memory Fallback" of drivers from 536.40 on, which the control panel turns off.
    """
    system = machine.system or ""
    if not machine.gpus or not (system.startswith("Windows") or system.endswith("(WSL)")):
        return None
    return (
        "this driver may use RAM for VRAM (CUDA sysmem fallback): what is too big for the card may run slowly here and not fail;"
        ' set the fallback policy to "prefer no sysmem fallback" in NVIDIA\'s control panel to measure the card alone'
    )


def overruled_order(machine: Machine) -> str | None:
    """Say that the order of the GPUs which the user asked CUDA for is not the one they are numbered in here; None if it is."""
    asked = os.environ.get("CUDA_DEVICE_ORDER")
    if asked in (None, _ORDER) or len(machine.gpus) < 2:
        return None
    return (
        f"CUDA_DEVICE_ORDER={asked} is overruled: the GPUs are numbered by {_ORDER}, as by NVML; to choose another order, list"
        " their UUIDs (nvidia-smi -L) in CUDA_VISIBLE_DEVICES"
    )


def usable(probed: Machine, *, ask: bool = True) -> Machine:
    """Return the machine as torch can use it: without its GPUs, and with the sentence that says why, where torch cannot use them.

    So no result of the CPU stands under a card's name. `ask` lets torch be asked, in a process of its own, if what it was built for
    leaves the question open; without it only what stands in its files decides, which takes no time.
    """
    build = torch_build()
    why = problem(probed, build, None)
    if why is None and ask and _is_open(probed, build):
        seen = _look_once(probed, build)
        why = problem(probed, build, seen) or hidden(probed, seen)
    if why is None:
        return _with_contexts(probed, build)
    tiers = tuple(tier for tier in probed.tiers if tier.kind != "gpu")
    return replace(probed, name=machine_name(tiers, probed.cores), tiers=tiers, gpu_problem=why)


def report(probed: Machine) -> TorchReport | None:
    """Say what torch was built for, what it sees of the cards, and what is wrong; it is asked only where there is a card.

    None without torch.
    """
    build = torch_build()
    if build is None:
        return None
    seen = _look_once(probed, build) if probed.gpus and build.title != _FOR_CPU else None
    return TorchReport(build=build, seen=seen, problem=problem(probed, build, seen))


def _look_once(probed: Machine, build: TorchBuild | None) -> Seen:
    """Ask torch, and measure the contexts of cards that are not in the cache yet."""
    unknown = any(bandwidth.gpu_context(_identity(gpu, probed, build)) is None for gpu in probed.gpus)
    seen = ask_torch(measure=True) if unknown else ask_torch()
    if len(seen.cards) == len(probed.gpus):
        for gpu, card in zip(probed.gpus, seen.cards, strict=True):
            if card.context_bytes and _PLAUSIBLE[0] < card.context_bytes < _PLAUSIBLE[1]:
                bandwidth.gpu_context(_identity(gpu, probed, build), card.context_bytes)
    return seen


def _with_contexts(probed: Machine, build: TorchBuild | None) -> Machine:
    """Return the machine with what is known of the contexts on its cards."""
    known = {gpu.name: bandwidth.gpu_context(_identity(gpu, probed, build)) for gpu in probed.gpus}
    if not any(known.values()):
        return probed
    return replace(probed, tiers=tuple(replace(tier, context_bytes=known.get(tier.name)) for tier in probed.tiers))


def _identity(gpu: Tier, machine: Machine, build: TorchBuild | None) -> str:
    """Name what a context depends on: card, driver, and the libraries of CUDA that come with torch."""
    return f"{gpu.model}, driver {machine.driver}, torch {build.version if build else None}"


def _is_open(probed: Machine, build: TorchBuild | None) -> bool:
    """Say whether only torch can tell what it can use: there is a card, or it was built for more than processors.

    A torch of macOS is always built for Apple's GPU too, and its version.py does not say so.
    """
    if build is None:
        return False
    return bool(probed.gpus or build.cuda or build.hip or build.xpu) or sys.platform == "darwin"


class _Contact(Record, frozen=True, kw_only=True):
    """A machine as NVML knows it, the torch that is to use it, and what that saw, None if it was not asked."""

    machine: Machine
    build: TorchBuild
    seen: Seen | None

    @property
    def cards(self) -> str:
        """The cards by name, two at most."""
        return " and ".join(list(dict.fromkeys(gpu.model or gpu.name for gpu in self.machine.gpus))[:2])

    @property
    def least_driver(self) -> int | None:
        """The first driver that runs the CUDA that torch was built for."""
        return _LEAST_DRIVER.get((self.build.cuda or "").partition(".")[0])

    @property
    def driver_is_too_old(self) -> bool:
        major = (self.machine.driver or "").partition(".")[0]
        return self.least_driver is not None and major.isdecimal() and int(major) < self.least_driver

    @property
    def without_kernels(self) -> str | None:
        """The compute capability of the first card that this torch has neither kernels for nor a form the driver can compile.

        Kernels of a lower minor version of the same major one run; PTX runs on everything newer (CUDA C++ Programming Guide,
        "binary compatibility" and "PTX compatibility").
        """
        names = self.seen.architectures if self.seen else ()
        built = [_number(name) for name in names if name.startswith("sm_")]
        compiled = [_number(name) for name in names if name.startswith("compute_")]
        for gpu in self.machine.gpus if names else ():
            major, minor = map(int, (gpu.compute_capability or "0.0").split("."))
            runs = any(one // 10 == major and one % 10 <= minor for one in built)
            if major and not runs and not any(one <= 10 * major + minor for one in compiled):
                return gpu.compute_capability
        return None


def _number(name: str) -> int:
    digits = re.sub(r"\D", "", name)
    return int(digits) if digits else 10**6


ProblemRow = tuple[Callable[[_Contact], object], Callable[[_Contact], str]]

PROBLEMS: tuple[ProblemRow, ...] = (
    (
        lambda at: at.build.cuda is None,
        lambda at: (
            f"torch {at.build.version} is {at.build.title} and cannot use the {at.cards}: install torch for CUDA as {_START} says"
        ),
    ),
    (
        lambda at: at.driver_is_too_old,
        lambda at: (
            f"driver {at.machine.driver} is too old for torch {at.build.version}, which is {at.build.title} and needs"
            f" {at.least_driver} for the {at.cards}: update the driver, or install torch for an older CUDA ({_START})"
        ),
    ),
    (
        lambda at: at.seen is not None and (at.seen.error or not at.seen.cards),
        lambda at: (
            f"torch {at.build.version} cannot use the {at.cards}: {(at.seen and at.seen.error) or 'it sees no GPU'}; check the"
            " driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
        ),
    ),
    (
        lambda at: at.seen is not None and len(at.seen.cards) != len(at.machine.gpus),
        lambda at: (
            f"torch sees {len(at.seen.cards) if at.seen else 0} GPUs and NVML {len(at.machine.gpus)} ({at.cards}): set"
            " CUDA_VISIBLE_DEVICES so that both see the same"
        ),
    ),
    (
        lambda at: at.without_kernels,
        lambda at: (
            f"torch {at.build.version} has no kernels for compute capability {at.without_kernels} ({at.cards}): install a torch"
            f" that has ({_START}), or leave that card out by CUDA_VISIBLE_DEVICES"
        ),
    ),
)
