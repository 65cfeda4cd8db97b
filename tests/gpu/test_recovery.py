"""After a case that ended badly the card is as it was, within ten seconds, and the next case runs.

Not run on a card yet.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from harness.core.records import Outcome
from harness.core.units import MIB
from harness.machine import nvml
from tests.gpu.contact import ROOT, Contact, ended_well, explain
from tests.gpu.test_estimates import HOLD

pytestmark = pytest.mark.gpu

WITHIN_S = 10.0


def free_bytes() -> int:
    """Return what NVML says is free of the first card."""
    with nvml.lent() as library:
        memory = nvml.ask(library, "nvmlDeviceGetMemoryInfo", nvml.visible_gpus(library)[0])
    if memory is None:
        pytest.skip("NVML does not tell what is free of this card")
    return int(memory.free)


def wait_for(free: int) -> float:
    """Return the seconds until so much is free again, but for 64 MiB; WITHIN_S if it never is."""
    begun = time.monotonic()
    while free_bytes() < free - 64 * MIB and time.monotonic() - begun < WITHIN_S:
        time.sleep(0.1)
    return min(time.monotonic() - begun, WITHIN_S)


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (Outcome.OOM, ("--prompt-tokens", "1024", "--batch", "4096", "--run-all")),
        (Outcome.TIMEOUT, ("--new-tokens", "1000", "--case-timeout", "6", "--run-all")),
    ],
    ids=["out of memory", "timeout"],
)
def test_memory_is_free_again_after_a_case_that_ended_badly(contact: Contact, outcome: Outcome, words: tuple[str, ...]) -> None:
    before = free_bytes()
    result = contact.case("bf16", "direct", *words)
    assert result.outcome is outcome, explain(result)
    assert wait_for(before) < WITHIN_S, f"{before - free_bytes()} bytes are still held"


def test_the_next_case_runs_beside_a_process_that_was_killed(contact: Contact) -> None:
    """A process that held the whole card is killed, and a case is started at once, as after a worker that was ended."""
    before = free_bytes()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(512 * MIB)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    result = ended_well(contact.case("bf16", "direct", "--new-tokens", "7"))
    holder.wait(30)
    assert result.outcome is Outcome.OK
    assert wait_for(before) < WITHIN_S


# An index outside of its tensor: the kernel stops at an assertion, and every later call of the process fails.
STUCK = "import torch; a = torch.zeros(4, device=0); a[torch.tensor([99], device=0)]; torch.cuda.synchronize()"


def test_a_kernel_that_fails_takes_its_process_and_no_other(contact: Contact) -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr, done.stderr[-500:]
    ended_well(contact.case("bf16", "direct", "--new-tokens", "6"))
