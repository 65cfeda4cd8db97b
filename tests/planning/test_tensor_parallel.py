"""Tensor parallelism: who can be shared, what each GPU holds, and the printed program, run by torchrun in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from msgspec.structs import replace
from transformers import AutoModelForCausalLM

from harness.architecture import model_spec, skeleton_source
from harness.checkpoint import reader
from harness.core.records import Machine, Plan, Verdict
from harness.machine.process_tree import kill_below
from harness.planning import calibration
from harness.planning.code import script
from harness.planning.cost import tensor_parallel
from harness.planning.planner import Planner
from tests.support import small_models
from tests.support.builders import case, gpu, machine

ROOT = Path(__file__).parents[2]
TWO = machine(gpu(), gpu(1))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Counts the bytes that a process of the printed program holds; appended to it. All write to one pipe, each in one piece.
HELD = """
held = [getattr(one, "to_local", lambda one=one: one)() for one in model.parameters()]
print(f"\\nheld {sum(one.numel() * one.element_size() for one in held)}\\n", end="")
"""
# Gloo's threads let go of their last tensors some time after the collective that used them. One that does so while Python ends
# aborts its process, destroy_process_group or not (pytorch#190489): the programs here leave before Python ends, as our ranks do.
LEAVE = """
import os, sys
sys.stdout.flush()
os._exit(0)
"""


def planned(directory: Path, precision: str = "fp32", on: Machine = TWO) -> Plan:
    spec = model_spec.of_checkpoint("tiny", str(directory), reader.read(directory), directory)
    return Planner(spec, on).plan(case(precision, "tp", new_tokens=8))


def in_ram(directory: Path) -> Plan:
    spec = model_spec.of_checkpoint("tiny", str(directory), reader.read(directory), directory)
    return Planner(spec, machine()).plan(case("fp32", "cpu", new_tokens=8))


def gpu_weights(one: Plan) -> int:
    assert one.estimate is not None
    sizes = {name: tier.weights_bytes for name, tier in one.estimate.tiers.items() if name.startswith("gpu")}
    assert list(sizes) == ["gpu:0", "gpu:1"]
    assert sizes["gpu:0"] == sizes["gpu:1"]
    return sizes["gpu:0"]


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save_talking(tmp_path_factory.mktemp("models") / "llama")


def run(program: str, place: Path, *command: str) -> list[str]:
    (place / "program.py").write_text(program, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = str(place / "program.py")
    with subprocess.Popen(
        [sys.executable, *command, script], cwd=place, env=environment, stdout=PIPE, stderr=PIPE, text=True
    ) as started:
        try:
            said, complaints = started.communicate(timeout=100)
        finally:
            kill_below(started.pid)  # torchrun gives its processes sessions of their own, where they would outlive it
            started.kill()
    assert started.returncode == 0, complaints
    return [line for line in said.splitlines() if line]


def test_the_printed_program_shares_the_model_and_says_what_one_process_says(talking: Path, tmp_path: Path) -> None:
    """Where there is no GPU transformers shares among processes by gloo; the program is the same."""
    shared = planned(talking)
    assert shared.verdict is Verdict.FITS
    head = f"MODEL = {str(talking)!r}\n\n"
    program = script(head, shared)
    assert program.startswith("# Start it by: torchrun --nproc-per-node 2 THIS_FILE\n")
    before_the_end = program.replace(
        "torch.distributed.destroy_process_group()", HELD + "torch.distributed.destroy_process_group()"
    )
    together = run(before_the_end + LEAVE, tmp_path, *TORCHRUN)
    (said,) = run(script(head, in_ram(talking)), tmp_path)
    assert said in together
    held = [int(line.removeprefix("held ")) for line in together if line.startswith("held ")]
    assert held == pytest.approx([gpu_weights(shared)] * 2, rel=0.01)
    assert len(together) == 3


# Loads each of the models and says what this process holds of it; models that differ in what stays whole.
EACH = """
import gc, torch.distributed
from transformers import AutoModelForCausalLM

for name in NAMES:
    model = AutoModelForCausalLM.from_pretrained(f"{FOLDER}/{name}", dtype="bfloat16", distributed_config={"tp_plan": "auto"})
    held = [getattr(one, "to_local", lambda one=one: one)() for one in model.parameters()]
    print(f"\\n{name} {sum(one.numel() * one.element_size() for one in held)}\\n", end="")
torch.distributed.destroy_process_group()
"""


def test_what_stays_whole_is_counted(tmp_path: Path) -> None:
    names = ("qwen2", "phi3", "mixtral", "gpt_neox", "qwen2_moe", "deepseek_v2", "deepseek_v3")
    expected = {}
    for name in names:
        small_models.save(name, tmp_path / name)
        expected[name] = gpu_weights(planned(tmp_path / name, "bf16"))
    said = run(f"NAMES, FOLDER = {names!r}, {str(tmp_path)!r}\n{EACH}{LEAVE}", tmp_path, *TORCHRUN)
    held = [(name, int(size)) for name, size in map(str.split, said)]
    assert len(held) == 2 * len(names)
    for name, size in held:
        assert size == pytest.approx(expected[name], rel=0.04), name


def test_each_gpu_has_half_and_each_process_its_own_libraries(talking: Path) -> None:
    spec = model_spec.of_checkpoint("tiny", str(talking), reader.read(talking), talking)
    alone, shared = Planner(spec, machine(gpu())).plan(case("fp32", "direct", new_tokens=8)), planned(talking)
    assert alone.estimate is not None
    assert shared.estimate is not None
    assert gpu_weights(shared) == pytest.approx(alone.estimate.tiers["gpu:0"].weights_bytes / 2, rel=0.01)
    assert shared.estimate.tiers["gpu:1"].kv_bytes == alone.estimate.tiers["gpu:0"].kv_bytes // 2
    assert shared.estimate.tiers["cpu"].overhead_bytes > 1.3 * alone.estimate.tiers["cpu"].overhead_bytes
    assert shared.device_map is None


def test_without_a_gpu_two_processes_share_it_in_ram(talking: Path) -> None:
    """Each has libraries of its own; of the weights only what is cut along its rows is copied from the file."""
    shared, alone = planned(talking, on=machine()), in_ram(talking)
    assert shared.verdict is Verdict.FITS
    assert shared.why == (
        "2 processes, as by torchrun: one thread in each unless OMP_NUM_THREADS says more, "
        "and communication between processes is not counted in the speed"
    )
    assert script("", shared).startswith("# Start it by: torchrun --nproc-per-node 2 THIS_FILE\n")
    assert shared.estimate is not None
    assert alone.estimate is not None
    two, one = shared.estimate.tiers["cpu"], alone.estimate.tiers["cpu"]
    assert list(shared.estimate.tiers) == ["cpu"]
    assert two.weights_bytes == pytest.approx(one.weights_bytes, rel=0.01)
    assert two.kv_bytes == one.kv_bytes
    copied = 4 * 2 * (256 * 256 + 256 * 704)
    sharing_bytes = 2 * calibration.default()["ram_ranks_bytes"].best
    assert two.anon_bytes == 2 * one.anon_bytes - one.kv_bytes + copied + sharing_bytes


@pytest.mark.parametrize(
    ("name", "gpus", "said"),
    [
        ("qwen2.5-7b-instruct", 2, None),
        ("qwen2.5-7b-instruct", 3, "3 GPUs cannot share 4 attention heads evenly"),
        ("smollm2-135m-instruct", 2, "2 GPUs cannot share 3 attention heads evenly"),
        ("moss-moon-003-sft", 2, "transformers has no plan to share MossForCausalLM among GPUs"),
    ],
)
def test_who_can_be_shared(name: str, gpus: int, said: str | None) -> None:
    why = tensor_parallel.refusal(skeleton_source.named(name), gpus)
    assert why is None if said is None else str(why).startswith(said)


def test_what_cannot_be_shared_is_said_before_it_is_tried(talking: Path) -> None:
    assert planned(talking, on=machine(gpu())).verdict is Verdict.UNAVAILABLE
    refused = planned(talking, "int8")
    assert refused.verdict is Verdict.INVALID
    assert str(refused.why).startswith("transformers 5.23 cannot split bitsandbytes weights over processes")
    small = replace(TWO, tiers=tuple(replace(tier, free_bytes=1 << 20) if tier.kind == "gpu" else tier for tier in TWO.tiers))
    assert planned(talking, on=small).verdict is Verdict.TOO_BIG


def plans_of_transformers() -> dict[str, dict[str, str]]:
    known: Any = AutoModelForCausalLM._model_mapping.keys()
    theirs = [config for config in known if config.__module__.startswith("transformers.")]  # other tests register our own
    return {config.model_type: shares for config in theirs if (shares := getattr(config, "base_model_tp_plan", None))}


def test_the_table_of_architectures_is_transformers_own() -> None:
    assert plans_of_transformers().keys() == tensor_parallel.SHARED


def test_the_table_of_what_is_cut_along_its_rows_is_transformers_own() -> None:
    rules = [rule for shares in plans_of_transformers().values() for rule in shares.items()]
    assert {path.split(".")[-1] for path, style in rules if style == "rowwise"} == tensor_parallel.ROWWISE
