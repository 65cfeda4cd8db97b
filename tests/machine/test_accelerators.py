"""What torch can do with the cards that NVML knows: one sentence with the cure where it cannot."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from harness.core.records import Machine, Tier
from harness.core.units import GIB, MIB
from harness.machine import accelerators
from harness.machine.accelerators import (
    Seen,
    TorchBuild,
    TorchDevice,
    ask_torch,
    hidden,
    problem,
    ram_fallback,
    torch_build,
    usable,
)
from tests.machine.test_probe import Nvml

FOR_CUDA = TorchBuild(version="2.13.0+cu130", cuda="13.0")
FOR_CPU = TorchBuild(version="2.13.0+cpu")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))


def machine(*cards: tuple[str, str], driver: str | None = "580.82") -> Machine:
    tiers = tuple(
        Tier(name=f"gpu:{number}", kind="gpu", total_bytes=24 << 30, model=name, compute_capability=capability)
        for number, (name, capability) in enumerate(cards)
    )
    return Machine(name="test", tiers=(*tiers, Tier(name="cpu", kind="cpu", total_bytes=32 << 30)), driver=driver)


RTX = machine(("NVIDIA GeForce RTX 4090", "8.9"))
SEES_IT = Seen(kind="cuda", cards=(TorchDevice(name="NVIDIA GeForce RTX 4090"),), architectures=ARCHITECTURES)


def test_torch_that_sees_the_card_has_no_problem() -> None:
    assert problem(RTX, FOR_CUDA, SEES_IT) is None
    assert problem(RTX, FOR_CUDA, None) is None  # not asked yet
    assert problem(machine(), FOR_CPU, Seen()) is None
    assert problem(RTX, None, None) is None


@pytest.mark.parametrize(
    ("where", "build", "seen", "said"),
    [
        (RTX, FOR_CPU, None, r"torch 2\.13\.0\+cpu is built for the CPU only and cannot use the NVIDIA GeForce RTX 4090: install"),
        (RTX, TorchBuild(version="2.9.0+rocm6.4", hip="6.4"), None, r"is built for ROCm's HIP 6\.4 and cannot use"),
        (
            machine(("Tesla T4", "7.5"), driver="535.104"),
            FOR_CUDA,
            None,
            r"driver 535\.104 is too old .* needs 580 for the Tesla T4",
        ),
        (
            RTX,
            FOR_CUDA,
            Seen(error="CUDA driver initialization failed"),
            r"cannot use .*: CUDA driver initialization failed; check",
        ),
        (RTX, FOR_CUDA, Seen(), r"it sees no GPU"),
        (machine(("A", "8.0"), ("B", "8.0")), FOR_CUDA, SEES_IT, r"torch sees 1 GPUs and NVML 2 \(A and B\)"),
        (
            machine(("Tesla P100", "6.0")),
            FOR_CUDA,
            Seen(kind="cuda", cards=(TorchDevice(name="Tesla P100"),), architectures=ARCHITECTURES),
            r"no kernels for compute capability 6\.0",
        ),
    ],
)
def test_what_torch_cannot_use_is_said_with_its_cure(where: Machine, build: TorchBuild, seen: Seen | None, said: str) -> None:
    sentence = problem(where, build, seen)
    assert sentence is not None
    assert re.search(said, sentence), sentence


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ("8.9", ("sm_80", "sm_86"), True),  # kernels of a lower minor version run
        ("8.6", ("sm_89",), False),
        ("12.1", ("sm_90", "compute_90"), True),  # the driver compiles what is newer
        ("7.0", ("sm_75", "compute_120"), False),
        ("9.0", ("sm_90a",), True),
    ],
)
def test_which_cards_have_kernels(capability: str, architectures: tuple[str, ...], runs: bool) -> None:
    seen = Seen(kind="cuda", cards=(TorchDevice(name="X"),), architectures=architectures)
    assert (problem(machine(("X", capability)), FOR_CUDA, seen) is None) == runs


def test_accelerators_that_are_not_measured_are_said_to_be_hidden() -> None:
    assert hidden(machine(), Seen()) is None
    assert hidden(RTX, SEES_IT) is None
    assert "an AMD GPU is here (MI300X)" in str(hidden(machine(), Seen(kind="hip", cards=(TorchDevice(name="MI300X"),))))
    assert "an Apple GPU is here" in str(hidden(machine(), Seen(kind="mps", cards=(TorchDevice(name="M4"),))))
    assert "NVML does not" in str(hidden(machine(), SEES_IT))


def can_do(monkeypatch: pytest.MonkeyPatch, build: TorchBuild | None, seen: Seen | None) -> None:
    """Let torch be built so, and see that; None: it must not be asked."""
    monkeypatch.setattr(accelerators, "torch_build", lambda: build)
    monkeypatch.setattr(accelerators, "ask_torch", lambda **_: seen or pytest.fail("torch was asked"))


def test_a_machine_whose_cards_work_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    can_do(monkeypatch, FOR_CUDA, SEES_IT)
    assert usable(RTX) is RTX
    can_do(monkeypatch, FOR_CUDA, None)
    assert usable(RTX, ask=False) is RTX
    can_do(monkeypatch, FOR_CPU, None)
    assert usable(machine()).gpu_problem is None  # nobody has a card


@pytest.mark.parametrize(
    ("build", "seen"),
    [(FOR_CPU, None), (FOR_CUDA, Seen(error="CUDA unknown error")), (FOR_CUDA, Seen())],
    ids=["known without asking", "an error", "no card"],
)
def test_cards_that_torch_cannot_use_are_no_part_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, build: TorchBuild, seen: Seen | None
) -> None:
    can_do(monkeypatch, build, seen)
    found = usable(RTX)
    assert [tier.name for tier in found.tiers] == ["cpu"]
    assert found.name == "32.0 GiB RAM"
    assert "cannot use the NVIDIA GeForce RTX 4090" in str(found.gpu_problem)


def test_a_gpu_that_is_not_measured_is_said_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    can_do(monkeypatch, TorchBuild(version="2.13.0+rocm7", hip="7.0"), Seen(kind="hip", cards=(TorchDevice(name="MI300X"),)))
    assert "an AMD GPU is here (MI300X)" in str(usable(machine()).gpu_problem)
    can_do(monkeypatch, FOR_CPU, Seen(kind="mps", cards=(TorchDevice(name="Apple GPU"),)))
    monkeypatch.setattr("sys.platform", "darwin")  # its torch does not say what it was built for
    assert "an Apple GPU is here" in str(usable(machine()).gpu_problem)


def test_what_a_context_takes_is_measured_once_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def ask_torch(*, measure: bool = False) -> Seen:
        asked.append(measure)
        card = TorchDevice(name="NVIDIA GeForce RTX 4090", context_bytes=520_000_000 if measure else None)
        return Seen(kind="cuda", cards=(card,), architectures=ARCHITECTURES)

    monkeypatch.setattr(accelerators, "torch_build", lambda: FOR_CUDA)
    monkeypatch.setattr(accelerators, "ask_torch", ask_torch)
    assert usable(RTX, ask=False).gpus[0].context_bytes is None
    assert [usable(RTX).gpus[0].context_bytes for _ in range(2)] == [520_000_000] * 2
    assert asked == [True, False]
    assert usable(RTX, ask=False).gpus[0].context_bytes == 520_000_000  # what plan does
    assert usable(replace(RTX, driver="590.1"), ask=False).gpus[0].context_bytes is None


@pytest.mark.parametrize("odd", [0, 1000, 30 << 30, None])
def test_a_context_that_others_disturbed_is_not_kept(monkeypatch: pytest.MonkeyPatch, odd: int | None) -> None:
    seen = Seen(kind="cuda", cards=(TorchDevice(name="RTX 4090", context_bytes=odd),), architectures=ARCHITECTURES)
    can_do(monkeypatch, FOR_CUDA, seen)
    assert usable(RTX).gpus[0].context_bytes is None


def test_a_context_is_what_the_card_has_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less what torch's allocator took for the tensor that makes it; made up, as there is no card here."""
    torch, worker = pytest.importorskip("torch"), pytest.importorskip("harness.worker.accelerators")
    free = {"bytes": 23 * GIB}
    library = Nvml({"nvmlDeviceGetMemoryInfo": SimpleNamespace(free=0)})

    def ask(*_: object) -> SimpleNamespace:
        return SimpleNamespace(free=free["bytes"])

    monkeypatch.setattr(worker.nvml, "ask", ask)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: free.update(bytes=free["bytes"] - 500_000_000 - 2 * MIB))
    for name, answer in (("synchronize", None), ("memory_reserved", 2 * MIB), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    assert worker.begin(library, [object()], 0) == 500_000_000
    assert worker.begin(library, [], 0) is None  # NVML has no such card


@pytest.mark.parametrize(
    ("system", "said"),
    [("Linux 6.18", False), ("Linux 6.6 (WSL)", True), ("Windows 11", True), ("Darwin 24.5", False), (None, False)],
)
def test_a_driver_that_may_use_ram_for_vram_is_said(system: str | None, said: bool) -> None:
    assert bool(ram_fallback(replace(RTX, system=system))) == said
    assert ram_fallback(replace(machine(), system=system)) is None


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    """And without importing it what it was built for agrees with what it says of itself."""
    torch = pytest.importorskip("torch")
    build = torch_build()
    assert build is not None
    assert (build.version, build.cuda, build.hip) == (torch.__version__, torch.version.cuda, torch.version.hip)
    seen = ask_torch()
    assert len(seen.cards) == (torch.cuda.device_count() if torch.cuda.is_available() else len(seen.cards))
    assert seen.kind is not None or not seen.cards
