"""From what is known of the end of a case to its outcome: one table, read from the top."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable

from harness.core.metrics import phase_title
from harness.core.records import Outcome, Record
from harness.core.units import exact_size, format_seconds, format_size
from harness.measure.limits import OVER_AT_START, Breach
from harness.measure.protocol import Failed


class Evidence(Record, frozen=True, kw_only=True):
    """What is known of how a case ended."""

    phase: str
    failed: Failed | None = None  #: the worker's own report
    exit_code: int | None = None  #: of its process; negative for a signal
    ended_by: str | None = None  #: why we ended it ("timeout", "phase timeout", "protocol", a rule of the guard); "fork server"
    oom_kills: int = 0  #: processes that the kernel killed meanwhile because memory ran out
    breach: Breach | None = None  #: what the guard saw
    group_kills: int = 0  #: kills in the case's own control group
    ram_bytes: int | None = None  #: the limit of that group
    limit_s: float | None = None  #: the time limit that was reached
    log_tail: str = ""  #: the last of the output
    rank: int | None = None  #: the process that ended first, of several that share a model

    @property
    def where(self) -> str:
        """The phase, and in which of several processes."""
        doing = phase_title(self.phase)
        return doing if self.rank is None else f"{doing} on rank {self.rank}"


_OOM_TYPES = {"OutOfMemoryError", "MemoryError"}
# Words for memory that is not there, of errors whose type says nothing.
_OOM_WORDS = re.compile(
    "|".join(
        (
            r"(?:CUDA|HIP|XPU|MPS backend) out of memory",  # torch's allocators before they had a type
            r"(?:CUDA|CUDA driver|HIP) error: out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY",
            r"Triton Error \[(?:CUDA|HIP)\]: out of memory",
            r"CU(?:BLAS|DNN|SPARSE|SOLVER)_STATUS_ALLOC_FAILED",
            r"CUDNN_STATUS_INTERNAL_ERROR_(?:DEVICE|HOST)_ALLOCATION_FAILED",  # cuDNN 9
            r"CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # its workspace found no room
            r"NVML_SUCCESS == .* INTERNAL ASSERT FAILED at .*CUDACachingAllocator",  # out of memory, and the report of it failed
            r"DefaultCPUAllocator: (?:can't allocate|not enough) memory",
            r"std::bad_alloc",  # libstdc++
            r"memory allocation of \d+ bytes failed",  # Rust: safetensors, tokenizers
            r"Cannot allocate memory",  # the kernel's ENOMEM
            r"Cuda failure (?:\d+ )?'out of memory'",  # NCCL, inside ncclUnhandledCudaError
        )
    )
)
# bitsandbytes prints what CUDA says and calls exit(1).
_OOM_LAST_WORDS = re.compile(r"Error out of memory at line \d+ in file \S+\.cu")
_DISK_WORDS = re.compile(r"No space left on device|Disk quota exceeded")
_UNSUPPORTED_TYPES = {"ImportError", "NotImplementedError"}
_UNSUPPORTED_WORDS = re.compile(
    "|".join(
        (
            r"not supported|does not support|unsupported",
            r"does not recognize this architecture|pass the argument `trust_remote_code=True`",
            r"Torch not compiled with (?:CUDA|XPU)",  # a torch for processors beside a card that NVML knows
            r"no kernel image is available for execution on the device",  # a torch without code for this card
            r"Cannot access accelerator device",  # torch.device(0) where there is none, before anything is moved
            r"NVIDIA driver on your system is too old|Found no NVIDIA driver|No CUDA GPUs are available",
            r"CUDA driver initialization failed|CUDA unknown error - this may be due to an incorrectly set up environment",
            r"libcudart functions unavailable",
            # What the CUDA runtime says of a card that this process cannot have (cudaGetErrorString).
            r"no CUDA-capable device|busy or unavailable|system not yet initialized",
            r"driver version is insufficient for CUDA runtime|forward compatibility was attempted on non supported HW",
            r"No HIP GPUs are available|No XPU are available|MPS is not available",
        )
    ),
    re.IGNORECASE,
)
_SIGNALS = {
    "SIGILL": "illegal instruction: a library was built for another processor",
    "SIGSEGV": "segmentation fault",
    "SIGBUS": "bus error: a mapped file was cut short, or its disk is full",
    "SIGFPE": "arithmetic fault",
}


def _signal(evidence: Evidence) -> str | None:
    if evidence.exit_code is None or evidence.exit_code >= 0:
        return None
    try:
        return signal.Signals(-evidence.exit_code).name
    except ValueError:
        return f"signal {-evidence.exit_code}"


def _describe_failure(evidence: Evidence) -> str:
    failed = evidence.failed
    if failed is None:
        return ""
    lines = [line.strip() for line in failed.message.splitlines() if line.strip()]
    return f"{failed.types[0] if failed.types else 'error'}: {' '.join(lines)[:600] or 'no message'}"


def _raised(evidence: Evidence, types: set[str], words: re.Pattern[str]) -> bool:
    failed = evidence.failed
    return failed is not None and (not types.isdisjoint(failed.types) or bool(words.search(failed.message)))


def _aborted_for_memory(evidence: Evidence) -> bool:
    if _signal(evidence) == "SIGABRT":
        return bool(_OOM_WORDS.search(evidence.log_tail))
    return (evidence.exit_code or 0) > 0 and bool(_OOM_LAST_WORDS.search(evidence.log_tail))


def _disk_is_full(evidence: Evidence) -> bool:
    return evidence.failed is not None and bool(_DISK_WORDS.search(evidence.failed.message))


def _last_words(evidence: Evidence) -> str:
    """Return the last line of the output, before the stack that faulthandler adds."""
    lines = evidence.log_tail.partition("Fatal Python error:")[0].split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f", and said last: {said[:300]}" if said else ""


# What the guard says of a case that it ended: the value, its limit, and what the case used that cannot be dropped.
_BREACHES = {
    "ram-limit": "it needed {0} that cannot be dropped, and --ram allows {1}",
    OVER_AT_START: "it needed {0} even before it loaded, and --ram allows {1}",
    "vram-limit": "the process used {0} on one GPU, and --vram allows {1}",
    "machine-memory": "it was ended when the machine had only {0} left, less than the {1} that are kept free; the case used {2}",
}


def _breached(evidence: Evidence) -> str:
    breach = evidence.breach
    assert breach is not None
    why = _BREACHES[breach.rule].format(*map(format_size, (breach.value_bytes, breach.limit_bytes, breach.held_bytes)))
    return f"out of memory during {evidence.where}: {why}"


OutcomeRow = tuple[Callable[[Evidence], bool], Outcome, Callable[[Evidence], str]]

TABLE: tuple[OutcomeRow, ...] = (
    (
        lambda e: e.ended_by == "timeout",
        Outcome.TIMEOUT,
        lambda e: f"{e.where} was not done when the case had taken {format_seconds(e.limit_s or 0)} (--case-timeout)",
    ),
    (
        lambda e: e.ended_by == "phase timeout",
        Outcome.TIMEOUT,
        lambda e: f"{e.where} was not done after {format_seconds(e.limit_s or 0)} (--phase-timeout)",
    ),
    (lambda e: e.ended_by == "protocol", Outcome.CRASH, lambda e: f"worker protocol error during {e.where}"),
    (lambda e: e.breach is not None and e.ended_by == e.breach.rule, Outcome.OOM, _breached),
    (
        lambda e: _signal(e) == "SIGKILL" and e.group_kills > 0,
        Outcome.OOM,
        lambda e: f"out of memory during {e.where}: it needed more than --ram {exact_size(e.ram_bytes or 0)} allows",
    ),
    (
        lambda e: _raised(e, _OOM_TYPES, _OOM_WORDS),
        Outcome.OOM,
        lambda e: f"out of memory during {e.where}: {_describe_failure(e)}",
    ),
    (
        lambda e: (_signal(e) == "SIGKILL" or e.ended_by == "fork server") and e.oom_kills > 0,
        Outcome.OOM,
        lambda e: f"out of memory during {e.where}: the kernel killed the process",
    ),
    (
        _aborted_for_memory,
        Outcome.OOM,
        lambda e: f"out of memory during {e.where}: a library aborted because it could not allocate",
    ),
    (
        lambda e: e.failed is not None and "ModelFault" in e.failed.types,
        Outcome.UNSUPPORTED,
        lambda e: f"the model's files contradict each other: {_describe_failure(e).removeprefix('ModelFault: ')}",
    ),
    (
        lambda e: _raised(e, _UNSUPPORTED_TYPES, _UNSUPPORTED_WORDS),
        Outcome.UNSUPPORTED,
        lambda e: f"not supported, says the library during {e.where}: {_describe_failure(e)}",
    ),
    (
        _disk_is_full,
        Outcome.CRASH,
        lambda e: f"the disk is full, {e.where} failed: {_describe_failure(e)}; set TMPDIR to a directory on a larger disk",
    ),
    (lambda e: e.failed is not None, Outcome.CRASH, lambda e: f"{e.where} failed: {_describe_failure(e)}"),
    (
        lambda e: e.ended_by == "fork server",
        Outcome.CRASH,
        lambda e: f"the process died during {e.where}: its fork server was killed from outside",
    ),
    (
        lambda e: _signal(e) == "SIGABRT",
        Outcome.CRASH,
        lambda e: f"the process died during {e.where}: aborted (SIGABRT){_last_words(e)}",
    ),
    (
        lambda e: _signal(e) is not None,
        Outcome.CRASH,
        lambda e: f"the process died during {e.where}: {_SIGNALS.get(_signal(e) or '', 'killed from outside')} ({_signal(e)})",
    ),
    (
        lambda _: True,
        Outcome.CRASH,
        lambda e: f"the process ended during {e.where} with exit code {e.exit_code}{_last_words(e)}",
    ),
)


def classify(evidence: Evidence) -> tuple[Outcome, str]:
    """Return the outcome and one sentence that says why; the first row that applies decides."""
    for applies, outcome, why in TABLE:
        if applies(evidence):
            return outcome, why(evidence)
    raise AssertionError("the last row applies to everything")
