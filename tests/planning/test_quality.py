"""Quality in plans: measured on the model itself, else on similar ones, else by rule; and that the answer goes by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.architecture.model_spec import read_spec
from harness.catalog import resolve
from harness.core.precisions import PRECISIONS
from harness.core.records import Case, Loaded, Outcome, Result, Span, TierEstimate, encode_record
from harness.core.records import Estimate as Expected
from harness.machine.gpus import profile
from harness.planning.planner import Planner
from harness.planning.quality import AS_STORED, ON_MODEL, ON_SIMILAR, known_quality
from tests.support.builders import case, result
from tests.support.spoken import Said, saying

MODEL = "qwen2.5-7b-instruct"
SPAN = Span(low=1.0, best=1.0, high=1.0)
GIVEN = dict.fromkeys(TierEstimate.__struct_fields__, 0)


def scored(of: Case, share: float, *, kind: str = "Qwen2ForCausalLM", weights_bytes: int = 5 << 30, **changes: object) -> Result:
    """The result of a case whose next tokens agreed so often with those of its reference."""
    tiers = {"cpu": TierEstimate(**{**GIVEN, "weights_bytes": weights_bytes})}
    expected = Expected(tiers=tiers, load_s=SPAN, first_token_s=SPAN, decode_tok_s=SPAN)
    held = Loaded(model_class=kind, dtype_bytes={}, linear_dtype_bytes={}, tier_bytes={}, device_map={})
    return result(of, metrics={"top1_agreement": share}, estimate=expected, loaded=held, **changes)


def test_what_was_measured_on_the_model_comes_before_others_and_the_rule() -> None:
    spec = read_spec(resolve.resolve(MODEL))
    others = [scored(case("int4", model="qwen2.5-14b-instruct"), 0.8), scored(case("nf4-dq", model="qwen2.5-14b-instruct"), 0.7)]
    own = [scored(case("int4", model=MODEL), share) for share in (0.91, 0.95, 0.93)]
    found = known_quality(spec, [*others, *own])
    assert found.of(case("int4", model=MODEL)) == (0.93, ON_MODEL)
    assert found.of(case("nf4-dq", model=MODEL)) == (0.7, ON_SIMILAR)
    assert found.of(case("int8", model=MODEL)) is None
    assert found.of(Case(model=MODEL, precision="int4", placement="cpu", kv="fp8")) == (0.93 * 0.995, ON_MODEL)


@pytest.mark.parametrize(
    "of_another",
    [
        scored(case("int4", model="other"), 0.5, kind="LlamaForCausalLM"),
        scored(case("int4", model="other"), 0.5, weights_bytes=60 << 30),  # far larger
        scored(case("int4", model=MODEL), 0.5, weights="synthetic"),
        scored(case("int4", model=MODEL), 0.5, outcome=Outcome.CRASH),
        scored(case("fp16", model=MODEL), 0.5),  # rounding alone
    ],
)
def test_what_says_nothing_of_a_model_is_left_out(of_another: Result) -> None:
    found = known_quality(read_spec(resolve.resolve(MODEL)), [of_another])
    assert (found.own, found.others) == ({}, {})


def test_what_stays_as_it_is_stored_loses_nothing_to_what_is_unpacked_from_it(capsys: pytest.CaptureFixture[str]) -> None:
    spec = read_spec(resolve.resolve("openai/gpt-oss-20b"))
    known = known_quality(spec)
    assert known.of(case("mxfp4", model=spec.name)) == (1.0, AS_STORED)
    assert known.of(Case(model=spec.name, precision="mxfp4", placement="cpu", kv="fp8")) == (0.995, AS_STORED)
    assert known.of(case("bf16", model=spec.name)) is None
    _, out, _ = saying(capsys, "plan", spec.name, "--gpu", "RTX 3060 12GB", "--ram", "32GiB")()
    assert out.startswith(f"Best for {spec.name}: mxfp4/recommended, highest quality that fits")


def test_a_form_that_a_model_is_not_stored_in_keeps_what_the_rule_says() -> None:
    planner = Planner(read_spec(resolve.resolve(MODEL)), profile(["RTX 4090"], ram=64 << 30), here=False)
    assert planner.plan(Case(model=MODEL, precision="gptq-int4", placement="direct")).kept_share is None


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return saying(capsys, "plan", MODEL, "--gpu", "RTX 3060 12GB", "--ram", "32GiB")


def test_an_answer_goes_by_results_and_says_so(say: Said, tmp_path: Path) -> None:
    """Where 4 bits of this model answer as poorly as they were measured to, something else is best."""
    _, by_rule, _ = say("--best")
    best = json.loads(say("--json")[1])["recommended"]
    assert "by rule of thumb. Context" in " ".join(by_rule.split())
    precision = best.split("/")[1]
    there = tmp_path / "fitmatrix-results"
    there.mkdir()
    assert PRECISIONS[precision].bits < 16
    (there / "results.jsonl").write_bytes(encode_record(scored(case(precision, model=MODEL), 0.1)) + b"\n")
    assert json.loads(say("--json")[1])["recommended"] != best
    asked = ("--precision", precision, "--precision", "bf16")
    said = json.loads(say(*asked, "--json")[1])
    kept = {one["precision"]: (one["quality_kept"], one["quality_from"]) for one in said["plans"] if one["kv"] == "dynamic"}
    assert kept[precision] == (0.1, ON_MODEL)
    assert kept["bf16"] == (1.0, "rule of thumb")
    _, out, _ = say(*asked)
    assert f"{precision} measured on this model, others by rule of thumb." in " ".join(out.split())
