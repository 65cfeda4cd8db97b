"""`fitmatrix plan MODEL --training WAY`: its table, its JSON, its exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.core.units import GIB
from harness.planning.training import zero
from harness.planning.training.zero import Trained
from tests.support import small_models
from tests.support.spoken import Said, saying

TWO = ("--gpu", "24GiB", "--gpu", "24GiB")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    """Run the command in an empty directory; return exit status, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return saying(capsys, "plan")


def found(say: Said, *arguments: str) -> tuple[int, dict[str, Any]]:
    status, out, err = say(*arguments, "--json")
    assert err == ""
    return status, json.loads(out)


def test_the_json_holds_every_way_with_its_verdict(say: Said) -> None:
    status, said = found(say, "chatglm-6b", "--training", "zero3", *TWO, "--ram", "144GiB")
    assert status == 0
    assert said["model"] == {
        "name": "chatglm-6b",
        "source": "THUDM/chatglm-6b",
        "parameters": 6_173_286_400,
        "largest_layer_parameters": 130_528 * 4096,
    }
    assert said["training"]["gpus"] == 2
    assert [tier["name"] for tier in said["machine"]["tiers"]] == ["gpu:0", "gpu:1", "cpu", "disk"]
    expected = zero.estimate_states("zero3", Trained(parameters=6_173_286_400, largest_layer=130_528 * 4096, gpus=2))
    assert [(way["gpu_bytes"], way["cpu_bytes"]) for way in said["ways"]] == [(way.gpu_bytes, way.cpu_bytes) for way in expected]
    for way in said["ways"]:
        fits = way["gpu_bytes"] <= 24 * GIB and way["cpu_bytes"] <= 144 * GIB
        assert way["verdict"] == ("fits" if fits else "too_big")
    assert {way["verdict"] for way in said["ways"]} == {"fits", "too_big"}


def test_nodes_share_what_one_does_not_hold(say: Said) -> None:
    one, alone = found(say, "chatglm-6b", "--training", "zero3", *TWO, "--ram", "64GiB")
    three, together = found(say, "chatglm-6b", "--training", "zero3", *TWO, "--ram", "64GiB", "--nodes", "3")
    assert (one, three) == (1, 0)
    assert together["training"]["nodes"] == 3
    assert together["ways"][0]["cpu_bytes"] < alone["ways"][0]["cpu_bytes"]


def test_the_smallest_card_decides(say: Said) -> None:
    _, said = found(say, "smollm2-135m-instruct", "--training", "zero2", "--gpu", "80GiB", "--gpu", "1GiB", "--ram", "64GiB")
    verdicts = {way["optimizer"]: way["verdict"] for way in said["ways"]}
    assert verdicts == {"cpu": "fits", "gpu": "too_big"}


def test_the_table_says_what_it_follows_and_leaves_out(say: Said) -> None:
    status, out, _ = say("chatglm-6b", "smollm2-135m-instruct", "--training", "zero2", "--gpu", "24GiB", "--ram", "64GiB")
    assert status == 1  # nothing fits the first
    assert "chatglm-6b: training 6.17 B parameters with ZeRO-2 on 1 GPU" in out
    said = " ".join(out.split())
    assert "Follows the code of DeepSpeed at commit edaa722. Without offloading its document (memory.rst) says otherwise" in said
    assert "Not counted: activations" in said
    assert "Nothing fits: add GPUs or RAM" in said
    assert max(map(len, out.splitlines())) <= 80


def test_ram_that_nobody_told_is_unknown_and_does_not_fit(say: Said) -> None:
    status, out, _ = say("chatglm-6b", "--training", "zero2", "--gpu", "24GiB")
    assert status == 1
    assert "unknown: pass --ram SIZE" in out
    assert "too big" in out  # what the card cannot hold is known all the same


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--training", "zero1", *TWO], "--training: unknown way of training 'zero1': did you mean"),
        (["--training", "zero2", "--ram", "8GiB"], "--training needs GPUs, and this machine has none: describe them"),
        (["--training", "zero2", *TWO, "--nodes", "0"], "--nodes: 0 is too small: at least 1"),
        (["--nodes", "2"], "--nodes applies to training only: add --training zero2 or zero3"),
        (["--training", "zero2", *TWO, "--rank", "8"], "--rank does not apply to --training zero2: drop one of them"),
        (["--training", "zero2", *TWO, "--batch", "2"], "--batch does not apply to --training zero2"),
        (["--training", "full", *TWO, "--target-modules", "q_proj"], "--target-modules does not apply to --training full"),
        (["--training", "lora", *TWO, "--nodes", "2"], "--nodes does not apply to --training lora"),
        (["--training", "lora", *TWO, "--optimizer", "adam"], "--optimizer: unknown optimizer 'adam': "),
        (["--training", "lora", *TWO, "--kv", "fp8"], "--kv does not apply to --training"),
        (["--training", "lora", *TWO], "--training lora: chatglm-6b has no class in transformers, and training starts from"),
        (["--rank", "8"], "--rank applies to training only: add --training lora or qlora"),
        (["--gradient-checkpointing"], "--gradient-checkpointing applies to training only: add --training full or lora or qlora"),
        (["--training", "zero2", *TWO, "--precision", "int8"], "--precision does not apply to --training"),
        (["--training", "zero2", *TWO, "--code", "int8/cpu"], "--code does not apply to --training"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_status_2(say: Said, arguments: list[str], said: str) -> None:
    status, out, err = say("chatglm-6b", *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_plan_says_that_routed_experts_get_no_adapters(say: Said, tmp_path: Path) -> None:
    small_models.save("qwen3_moe", tmp_path / "small")
    asked = (str(tmp_path / "small"), "--training", "qlora", "--sequence-length", "64", "--gpu", "24GiB")
    _, out, _ = say(*asked)
    assert "Routed experts get no adapters and stay in 16 bits: they are stacked" in " ".join(out.split())
    assert found(say, *asked)[1]["notes"][0].startswith("Routed experts get no adapters")


def test_one_card_has_a_table_a_sentence_and_a_program(say: Said, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small_models.save("llama", small)
    asked = (str(small), "--training", "lora", "--rank", "4", "--sequence-length", "64", "--gradient-checkpointing")
    status, out, _ = say(*asked, "--gpu", "24GiB")
    assert status == 0
    assert "small: training" in out
    assert "parameters by LoRA on gpu:0" in " ".join(out.split())
    assert "1 x 64 tokens a step, adamw_torch_fused, with gradient checkpointing: fits" in " ".join(out.split())
    assert "    r=4,\n    lora_alpha=8," in out
    status, said = found(say, *asked, "--gpu", "64MiB")
    assert (status, said["verdict"]) == (1, "too_big")
    assert said["peak_bytes"] == sum(said["parts_bytes"].values())
    assert said["training"]["targets"][:2] == ["q_proj", "k_proj"]
    compile(said["code"], "program", "exec")
    _, out, _ = say(*asked, "--gpu", "64MiB")
    assert "Try --training qlora or a shorter --sequence-length." in " ".join(out.split())
