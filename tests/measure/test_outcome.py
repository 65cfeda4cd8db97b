"""From the end of a case to its outcome: every row of the table, by an end that really happens."""

from __future__ import annotations

import signal

import pytest

from harness.core.metrics import phase_title
from harness.core.records import Outcome
from harness.core.units import GIB
from harness.measure import limits
from harness.measure.limits import Breach
from harness.measure.outcome import TABLE, Evidence, classify
from harness.measure.protocol import Failed


def failed(*types: str, message: str = "", phase: str = "load") -> Failed:
    return Failed(phase=phase, types=types, message=message, traceback="Traceback ...")


def raised(*types: str, message: str = "", phase: str = "load") -> Evidence:
    return Evidence(phase=phase, failed=failed(*types, message=message, phase=phase))


def died(signal_number: int, *, phase: str = "load", oom_kills: int = 0, log_tail: str = "") -> Evidence:
    return Evidence(phase=phase, exit_code=-signal_number, oom_kills=oom_kills, log_tail=log_tail)


CUDA_OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 11.76 GiB"
CPU_OOM = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4294967296 bytes. Error code 12 (Cannot allocate memory)"
)

# The row of the table, the end, the outcome, and the whole sentence.
ENDS = [
    pytest.param(
        0,
        Evidence(phase="load", ended_by="timeout", limit_s=1800, exit_code=-9),
        Outcome.TIMEOUT,
        "loading was not done when the case had taken 30 min 00 s (--case-timeout)",
        id="timeout",
    ),
    pytest.param(
        0,
        Evidence(phase="warm", ended_by="timeout", limit_s=60, exit_code=-9, oom_kills=1),
        Outcome.TIMEOUT,
        "warm round was not done when the case had taken 60.0 s (--case-timeout)",
        id="timeout, though the kernel killed something meanwhile",
    ),
    pytest.param(
        1,
        Evidence(phase="cold", ended_by="phase timeout", limit_s=900, exit_code=-9),
        Outcome.TIMEOUT,
        "cold round was not done after 15 min 00 s (--phase-timeout)",
        id="timeout of a phase",
    ),
    pytest.param(
        2,
        Evidence(phase="cold", ended_by="protocol", exit_code=-9),
        Outcome.CRASH,
        "worker protocol error during cold round",
        id="nonsense on the pipe",
    ),
    *(
        pytest.param(
            3,
            Evidence(
                phase="load",
                ended_by=rule,
                exit_code=-9,
                oom_kills=1,
                breach=Breach(rule=rule, limit_bytes=2 * GIB, value_bytes=GIB, held_bytes=3 * GIB),
            ),
            Outcome.OOM,
            f"out of memory during loading: {said}",
            id=rule,
        )
        for rule, said in (
            ("ram-limit", "it needed 1.00 GiB that cannot be dropped, and --ram allows 2.00 GiB"),
            ("vram-limit", "the process used 1.00 GiB on one GPU, and --vram allows 2.00 GiB"),
            (limits.OVER_AT_START, "it needed 1.00 GiB even before it loaded, and --ram allows 2.00 GiB"),
            (
                "machine-memory",
                "it was ended when the machine had only 1.00 GiB left, less than the 2.00 GiB that are kept free; "
                "the case used 3.00 GiB",
            ),
        )
    ),
    pytest.param(
        4,
        Evidence(phase="cold", exit_code=-9, oom_kills=1, group_kills=1, ram_bytes=512 << 20),
        Outcome.OOM,
        "out of memory during cold round: it needed more than --ram 512MiB allows",
        id="the kernel, at the limit of the case",
    ),
    pytest.param(
        5,
        raised("OutOfMemoryError", "RuntimeError", message=CUDA_OOM),
        Outcome.OOM,
        f"out of memory during loading: OutOfMemoryError: {CUDA_OOM}",
        id="torch, CUDA",
    ),
    pytest.param(5, raised("MemoryError"), Outcome.OOM, "out of memory during loading: MemoryError: no message", id="Python"),
    pytest.param(
        5,
        raised("RuntimeError", message=CPU_OOM, phase="cold"),
        Outcome.OOM,
        f"out of memory during cold round: RuntimeError: {CPU_OOM}",
        id="torch, CPU",
    ),
    pytest.param(
        5,
        raised("AcceleratorError", "RuntimeError", message="CUDA error: out of memory\nCUDA kernel errors might be ..."),
        Outcome.OOM,
        "out of memory during loading: AcceleratorError: CUDA error: out of memory CUDA kernel errors might be ...",
        id="CUDA's own error",
    ),
    pytest.param(
        5,
        raised("RuntimeError", message="CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", phase="warm"),
        Outcome.OOM,
        "out of memory during warm round: RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        id="cuBLAS",
    ),
    pytest.param(
        5,
        raised("OSError", message="[Errno 12] Cannot allocate memory"),
        Outcome.OOM,
        "out of memory during loading: OSError: [Errno 12] Cannot allocate memory",
        id="mmap",
    ),
    pytest.param(
        6,
        died(signal.SIGKILL, oom_kills=1, phase="cold"),
        Outcome.OOM,
        "out of memory during cold round: the kernel killed the process",
        id="the kernel's OOM killer",
    ),
    pytest.param(
        7,
        died(signal.SIGABRT, log_tail="terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc"),
        Outcome.OOM,
        "out of memory during loading: a library aborted because it could not allocate",
        id="C++ bad_alloc",
    ),
    pytest.param(
        8,
        raised("ModelFault", message="the tokenizer makes token 299 of a text, and the model knows 200 tokens"),
        Outcome.UNSUPPORTED,
        "the model's files contradict each other: the tokenizer makes token 299 of a text, and the model knows 200 tokens",
        id="files that contradict each other",
    ),
    pytest.param(
        9,
        raised("ImportError", message="Using `bitsandbytes` 4-bit quantization requires bitsandbytes", phase="import"),
        Outcome.UNSUPPORTED,
        "not supported, says the library during importing libraries: ImportError: "
        "Using `bitsandbytes` 4-bit quantization requires bitsandbytes",
        id="a package is missing",
    ),
    pytest.param(
        9,
        raised("ModuleNotFoundError", "ImportError", message="No module named 'einops'"),
        Outcome.UNSUPPORTED,
        "not supported, says the library during loading: ModuleNotFoundError: No module named 'einops'",
        id="a module is missing",
    ),
    pytest.param(
        9,
        raised("NotImplementedError", "RuntimeError", message="Could not run 'aten::foo' with arguments from the 'CUDA' backend"),
        Outcome.UNSUPPORTED,
        "not supported, says the library during loading: NotImplementedError: "
        "Could not run 'aten::foo' with arguments from the 'CUDA' backend",
        id="not implemented",
    ),
    pytest.param(
        9,
        raised("ValueError", message="`.to` is not supported for `8-bit` bitsandbytes models."),
        Outcome.UNSUPPORTED,
        "not supported, says the library during loading: ValueError: `.to` is not supported for `8-bit` bitsandbytes models.",
        id="in words",
    ),
    pytest.param(
        9,
        raised("ValueError", message="The checkpoint has model type `x` but Transformers does not recognize this architecture."),
        Outcome.UNSUPPORTED,
        "not supported, says the library during loading: ValueError: "
        "The checkpoint has model type `x` but Transformers does not recognize this architecture.",
        id="unknown architecture",
    ),
    pytest.param(
        11,
        raised("KeyError", "LookupError", message="'lm_head'", phase="score"),
        Outcome.CRASH,
        "quality probe failed: KeyError: 'lm_head'",
        id="any other exception",
    ),
    pytest.param(
        14,
        died(signal.SIGSEGV, phase="warm"),
        Outcome.CRASH,
        "the process died during warm round: segmentation fault (SIGSEGV)",
        id="segmentation fault",
    ),
    pytest.param(
        14,
        died(signal.SIGILL),
        Outcome.CRASH,
        "the process died during loading: illegal instruction: a library was built for another processor (SIGILL)",
        id="illegal instruction",
    ),
    pytest.param(
        13,
        died(signal.SIGABRT, log_tail="double free or corruption\nFatal Python error: Aborted\n\nCurrent thread"),
        Outcome.CRASH,
        "the process died during loading: aborted (SIGABRT), and said last: double free or corruption",
        id="abort without a word of memory",
    ),
    pytest.param(
        14,
        died(signal.SIGKILL, log_tail=CUDA_OOM),
        Outcome.CRASH,
        "the process died during loading: killed from outside (SIGKILL)",
        id="killed, and not by the kernel",
    ),
    pytest.param(
        14, died(signal.SIGTERM), Outcome.CRASH, "the process died during loading: killed from outside (SIGTERM)", id="terminated"
    ),
    pytest.param(
        14,
        died(200),
        Outcome.CRASH,
        "the process died during loading: killed from outside (signal 200)",
        id="a signal without a name",
    ),
    pytest.param(
        15,
        Evidence(phase="load", exit_code=1),
        Outcome.CRASH,
        "the process ended during loading with exit code 1",
        id="exit status",
    ),
    pytest.param(
        15,
        Evidence(phase="start", exit_code=0),
        Outcome.CRASH,
        "the process ended during starting with exit code 0",
        id="quiet exit",
    ),
    pytest.param(
        6,
        Evidence(phase="warm", exit_code=255, ended_by="fork server", oom_kills=1),
        Outcome.OOM,
        "out of memory during warm round: the kernel killed the process",
        id="the kernel's OOM killer took the fork server",
    ),
    pytest.param(
        7,
        Evidence(phase="load", exit_code=1, log_tail="Error out of memory at line 380 in file /src/csrc/ops.cu"),
        Outcome.OOM,
        "out of memory during loading: a library aborted because it could not allocate",
        id="bitsandbytes",
    ),
    pytest.param(
        7,
        died(signal.SIGABRT, log_tail="memory allocation of 8589934592 bytes failed"),
        Outcome.OOM,
        "out of memory during loading: a library aborted because it could not allocate",
        id="Rust",
    ),
    pytest.param(
        10,
        raised("OSError", message="[Errno 28] No space left on device"),
        Outcome.CRASH,
        "the disk is full, loading failed: OSError: [Errno 28] No space left on device; set TMPDIR to a directory on a larger disk",
        id="disk full",
    ),
    pytest.param(
        12,
        Evidence(phase="warm", exit_code=255, ended_by="fork server"),
        Outcome.CRASH,
        "the process died during warm round: its fork server was killed from outside",
        id="fork server killed",
    ),
    pytest.param(
        15,
        Evidence(phase="load", exit_code=1, log_tail="OMP: Error #15: Initializing libiomp5.so\n"),
        Outcome.CRASH,
        "the process ended during loading with exit code 1, and said last: OMP: Error #15: Initializing libiomp5.so",
        id="exit with last words",
    ),
]


def row_of(evidence: Evidence) -> int:
    return next(number for number, (applies, _, _) in enumerate(TABLE) if applies(evidence))


@pytest.mark.parametrize(("row", "evidence", "outcome", "why"), ENDS)
def test_every_end_has_its_outcome_and_a_sentence(row: int, evidence: Evidence, outcome: Outcome, why: str) -> None:
    assert classify(evidence) == (outcome, why)
    assert row_of(evidence) == row


def test_every_row_of_the_table_is_reached_here() -> None:
    assert {row_of(end.values[1]) for end in ENDS if isinstance(end.values[1], Evidence)} == set(range(len(TABLE)))


def test_a_case_ends_in_no_other_way() -> None:
    """Ok and skipped are no ends: the one was measured, the other never began."""
    assert {outcome for _, outcome, _ in TABLE} == set(Outcome) - {Outcome.OK, Outcome.SKIPPED}


def test_memory_words_in_the_log_count_only_for_an_abort() -> None:
    """A library may have caught an out-of-memory and gone on."""
    assert classify(Evidence(phase="warm", exit_code=1, log_tail=CPU_OOM))[0] is Outcome.CRASH


@pytest.mark.parametrize(
    "message",
    [
        "HIP out of memory. Tried to allocate 2.00 GiB",
        "XPU out of memory. Tried to allocate 2.00 GiB",
        "MPS backend out of memory (MPS allocated: 17.96 GB, other allocations: 384.00 KB, max allowed: 18.13 GB)",
        "CUDA driver error: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":1103, please report a bug',
        "unable to mmap 13476835328 bytes from file <model.safetensors>: Cannot allocate memory (12)",
        "[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: not enough memory: you tried to allocate 4294967296 bytes.",
        "std::bad_alloc",
        "Triton Error [CUDA]: out of memory",
        "cuModuleLoadData failed: CUDA_ERROR_OUT_OF_MEMORY",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 'out of memory'",
    ],
)
def test_memory_that_is_not_there_has_many_words(message: str) -> None:
    assert classify(raised("RuntimeError", message=message))[0] is Outcome.OOM


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("AssertionError", "Torch not compiled with CUDA enabled"),
        (
            "AcceleratorError",
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be ...",
        ),
        ("RuntimeError", "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver ..."),
        ("RuntimeError", "CUDA error: no CUDA-capable device is detected"),
        ("RuntimeError", "Cannot access accelerator device when none is available."),
        ("RuntimeError", "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"),
        ("RuntimeError", "CUDA driver initialization failed, you might not have a CUDA gpu."),
        ("RuntimeError", "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variable"),
        ("AcceleratorError", "CUDA error: system not yet initialized\nCUDA kernel errors might be ..."),
        ("AcceleratorError", "CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        ("AcceleratorError", "CUDA error: CUDA driver version is insufficient for CUDA runtime version"),
        ("RuntimeError", "Error 804: forward compatibility was attempted on non supported HW"),
        ("AssertionError", "libcudart functions unavailable. It looks like you have a broken build?"),
        ("RuntimeError", "No CUDA GPUs are available"),
        ("RuntimeError", "No HIP GPUs are available"),
        ("RuntimeError", "No XPU are available"),
        ("RuntimeError", "MPS is not available"),
        ("AssertionError", "Torch not compiled with XPU enabled"),
    ],
)
def test_a_torch_that_cannot_use_the_card_is_no_crash(kind: str, message: str) -> None:
    assert classify(raised(kind, message=message))[0] is Outcome.UNSUPPORTED


@pytest.mark.parametrize(
    "message",
    ["CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", "CUDA error: device-side assert triggered"],
)
def test_other_errors_of_a_card_are_not_out_of_memory(message: str) -> None:
    assert classify(raised("RuntimeError", message=message))[0] is Outcome.CRASH


def test_a_long_message_is_cut() -> None:
    _, why = classify(raised("ValueError", message="x" * 10_000))
    assert len(why) < 700


def test_an_exception_without_a_name_is_still_told() -> None:
    assert classify(raised(message="boom")) == (Outcome.CRASH, "loading failed: error: boom")


def test_the_phase_is_the_one_that_failed() -> None:
    """Not one that an earlier row would name."""
    for phase in ("start", "import", "load", "cold", "warm", "score"):
        for evidence in (raised("ValueError", phase=phase), died(signal.SIGBUS, phase=phase), raised("MemoryError", phase=phase)):
            assert phase_title(phase) in classify(evidence)[1]
