"""What is told of the models that this project began with: figures follow from skeletons, and what is to work is planned so."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from harness.architecture import model_spec
from harness.architecture.skeleton import Skeleton
from harness.catalog import resolve
from harness.catalog.resolve import CATALOG, history
from harness.cli.entry import main
from harness.core.records import Case, Verdict
from harness.core.units import GIB, parse_size
from harness.machine.gpus import profile
from harness.planning.planner import Planner
from harness.report.page import render
from tests.support import builders

TOLD = [name for name, entry in CATALOG.items() if entry.history]


def test_the_five_of_the_notes_have_one_and_others_none() -> None:
    assert TOLD == ["chatglm-6b", "stablelm-tuned-alpha-7b", "codegen-6b-mono", "codegen-16b-mono", "moss-moon-003-sft-plugin"]
    assert history("Salesforce/codegen-16B-mono") == history("codegen-16b-mono") != ""
    assert history("codegen-350m-mono") == history("no such model") == history("") == ""


@pytest.mark.parametrize("name", TOLD)
def test_it_says_in_a_line_or_two_what_was_and_what_is(name: str) -> None:
    told = history(name)
    assert "in 2023" in told
    assert "Now " in told
    assert "\n" not in told
    assert len(told) < 450
    assert ("probably" in told) == ("failed" in told)  # why it failed is inference


def spec(name: str) -> model_spec.ModelSpec:
    return model_spec.read_spec(resolve.resolve(name))


@pytest.mark.parametrize(
    ("name", "file", "together"),
    [("codegen-16b-mono", "one 32 GB file", "96 GB"), ("codegen-6b-mono", "one file of 14 GB", "43 GB")],
)
def test_the_memory_of_2023_follows_from_the_files(name: str, file: str, together: str) -> None:
    """A model of float32 beside the file of float16; tests/planning/test_load_peak.py measures that on a small one."""
    one = spec(name)
    assert f"{one.checkpoint_bytes / 1e9:.0f} GB" in file
    assert f"{(4 * one.skeleton.parameters + one.checkpoint_bytes) / 1e9:.0f} GB" == together
    assert file in history(name)
    assert together in history(name)


def test_stablelm_is_twice_as_large_in_its_files() -> None:
    one = spec("stablelm-tuned-alpha-7b")
    assert f"{one.checkpoint_bytes / 1e9:.1f} GB" == "31.7 GB"
    assert "31.7 GB" in history("stablelm-tuned-alpha-7b")
    cpu = planned("stablelm-tuned-alpha-7b", "fp16/cpu", ram="20GiB").tiers["cpu"]
    assert 2 * one.skeleton.parameters < cpu.load_anon_bytes < 16.5e9


def test_what_moss_sends_over_pcie_with_every_token() -> None:
    """Of 34 blocks 11 lie on the card; the rest, the last norm and the head do not. 16 GB/s is what PCIe 3.0 x16 has at most."""
    name = "moss-moon-003-sft-plugin"
    whole, away = fp16_bytes(spec(name).skeleton, ""), fp16_bytes(spec(name).skeleton, "lm_head", "transformer.ln_f")
    away += sum(fp16_bytes(spec(name).skeleton, f"transformer.h.{block}.") for block in range(11, 34))
    said = (f"{whole / GIB:.0f} GiB", f"{away / GIB:.1f} GiB", f"{away / 16e9:.1f} s")
    assert said == ("31 GiB", "20.6 GiB", "1.4 s")
    assert all(text in history(name) for text in said)


def fp16_bytes(skeleton: Skeleton, *prefixes: str) -> int:
    counted = (weight for weight in skeleton.weights if weight.tensor.kind == "parameter" and weight.path.startswith(prefixes))
    return sum(2 * weight.elements for weight in counted)


@pytest.mark.parametrize(
    ("name", "case", "machine", "said"),
    [
        ("chatglm-6b", "int8/direct", {"gpu": "RTX 3060 12GB"}, "int8 fits a 12 GB card"),
        ("chatglm-6b", "fp16/direct", {"gpu": "RTX 4060 Ti 16GB"}, "fp16 one of 16 GB"),
        ("stablelm-tuned-alpha-7b", "int8/direct", {"gpu": "RTX 3060 12GB"}, "int8 fits a 12 GB card"),
        ("codegen-6b-mono", "int8/direct", {"gpu": "RTX 3060 12GB"}, "int8 fits a 12 GB card"),
        ("codegen-6b-mono", "int4/cpu", {"ram": "16GiB"}, "int4 16 GiB of RAM"),
        ("codegen-16b-mono", "int4/direct", {"gpu": "RTX 3060 12GB"}, "int4 then fits a 12 GB card"),
        ("codegen-16b-mono", "fp16/auto", {"ram": "16GiB"}, "fp16 16 GiB of RAM with the rest on the disk"),
        ("moss-moon-003-sft-plugin", "int8/direct", {"gpu": "RTX 3090"}, "int8 fits a 24 GB card"),
        ("moss-moon-003-sft-plugin", "int4/direct", {"gpu": "T4"}, "int4 one of 16 GB"),
    ],
)
def test_what_works_now_is_planned_to_fit(name: str, case: str, machine: dict[str, str], said: str) -> None:
    planned(name, case, **machine)
    assert said in history(name)


@pytest.mark.parametrize(
    ("name", "gib", "verdict"),
    [("codegen-16b-mono", 24, "too_big"), ("codegen-16b-mono", 31, "fits"), ("codegen-6b-mono", 16, "fits")],
)
def test_linux_maps_their_one_file_where_ram_and_swap_exceed_it(name: str, gib: int, verdict: str) -> None:
    machine = replace(profile(["RTX 3060 12GB"], ram=16 * GIB, disk=200 * GIB), mapping_bytes=gib * GIB)
    assert Planner(spec(name), machine, here=False).plan(Case(model=name, precision="int4", placement="direct")).verdict == verdict


def test_a_plan_tells_it_in_words_and_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    told = history("codegen-16b-mono")
    for model in ("codegen-16b-mono", "Salesforce/codegen-16B-mono"):
        main(["plan", model, "--ram", "64GiB", "--precision", "fp16", "--placement", "cpu"])
        assert told in " ".join(capsys.readouterr().out.split())
    main(["plan", "codegen-16b-mono", "--ram", "16GiB", "--json"])
    assert json.loads(capsys.readouterr().out)["model"]["history"] == told
    main(["plan", "codegen-2b-mono", "--ram", "16GiB", "--json"])
    assert json.loads(capsys.readouterr().out)["model"]["history"] == ""


def test_the_page_tells_it_beside_the_model() -> None:
    told = history("codegen-16b-mono")
    both = [builders.result(builders.case(model=model)) for model in ("codegen-16b-mono", "tiny")]
    _, body = render.render(both).split("<body>", 1)  # its translation stands in the head
    assert body.count(told) == body.count('class="note history"') == 1
    assert body.index(told) < body.index("<h2", body.index(told))


def planned(name: str, case: str, *, gpu: str | None = None, ram: str = "32GiB") -> Any:
    precision, placement = case.split("/")
    machine = profile([gpu] if gpu else [], ram=parse_size(ram), disk=parse_size("200GiB"))
    plan = Planner(spec(name), machine, here=False).plan(Case(model=name, precision=precision, placement=placement))
    assert plan.verdict is Verdict.FITS, plan.why
    return plan.estimate
