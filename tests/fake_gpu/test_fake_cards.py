"""`pytest cases/` on cards that are not there: the libraries' own code places, counts and computes, on tiny models, with values.

Every row of PLACEMENTS that can use a card is run, those of several processes aside: a new row is tried here as it comes.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from harness.architecture.model_spec import ModelSpec, read_spec
from harness.catalog.resolve import resolve
from harness.cli import entry
from harness.core.placements import FILE, PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Outcome, Plan, Result
from harness.measure import verify
from harness.planning.code import loading_code
from harness.planning.device_map import user_map
from harness.planning.device_map.infer import STRATEGIES
from harness.planning.device_map.tiers import device
from harness.planning.planner import Planner
from harness.results.audit import examine
from tests.fake_gpu.runs import CONTEXT_BYTES, MIXED, ON_ONE, ON_SMALL, ON_TWO, PARTS, SINGLE, Runs, peak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard is lent as it lies in libc10.so")

WHERE = {"one": ON_ONE, "two": ON_TWO, "small": ON_SMALL}
CASES = [(run, placement) for run, placements in WHERE.items() for placement in placements]
every_case = pytest.mark.parametrize(("run", "placement"), CASES, ids=[f"{run}-{placement}" for run, placement in CASES])


@cache
def spec_of(model: Path) -> ModelSpec:
    return read_spec(resolve(str(model)))


def planned(runs: Runs, run: str, result: Result) -> Plan:
    """Plan the case of a result again, for the machine that it was measured on."""
    file = runs.folder / f"map-{run}.json"
    given = user_map.read(file) if result.case.placement == FILE else None
    return Planner(spec_of(runs.model), result.machine, device_map=given).plan(result.case)


def devices(device_map: Mapping[str, object], modules: list[str]) -> dict[str, str]:
    """Return the tier of every module by the closest entry of a map at or above it."""
    found = {}
    for module in modules:
        path = module
        while path and path not in device_map:
            path = path.rpartition(".")[0]
        place = str(device_map.get(path))
        found[module] = f"gpu:{place}" if place.isdecimal() else place
    return found


@pytest.fixture(scope="session")
def on_the_processor(runs: Runs) -> dict[str, Any]:
    """What the quality probe finds of the model in RAM, in this process, which has no fake cards."""
    protocol, probe, work = (
        import_module(f"harness.{name}") for name in ("measure.protocol", "worker.quality_probe", "worker.model")
    )
    code = loading_code(PRECISIONS["bf16"], PLACEMENTS["cpu"], "bfloat16")
    request = protocol.Load(model=str(runs.model), code=code, tokenizer=True)
    model, _ = work.load(request, lambda _: contextlib.nullcontext())
    found: dict[str, Any] = probe.score(model, protocol.Score(model="tiny"))
    return found


@pytest.fixture(scope="session")
def skeleton(runs: Runs) -> Any:
    """The model as transformers infers a map for it: without weights."""
    torch, transformers = import_module("torch"), import_module("transformers")
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(runs.model)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def test_every_placement_that_uses_a_card_is_tried() -> None:
    """But for tensor parallelism: its processes speak to each other by a library that needs real cards."""
    tried = {placement for _, placement in CASES} | {*MIXED}
    left = {row.name for row in PLACEMENTS.values() if "gpu" in row.devices} - tried
    assert left == {row.name for row in PLACEMENTS.values() if row.parallel}
    assert set(SINGLE) >= {FILE, "direct", "auto"}


@every_case
def test_a_placement_writes_what_the_processor_writes(
    runs: Runs, on_the_processor: dict[str, Any], run: str, placement: str
) -> None:
    """Token for token, ten answers in one padded batch; a stray mask or a layer left out would show in the perplexity as well."""
    result = runs[run].of(placement)
    assert result.outcome is Outcome.OK, f"{result.why}\n{result.log_tail}"
    assert result.quality is not None
    assert [answer.answer for answer in result.quality.answers] == [answer.answer for answer in on_the_processor["answers"]]
    assert len({answer.answer for answer in result.quality.answers}) > 3
    expected = math.exp(on_the_processor["nll"] / on_the_processor["positions"])
    assert result.metrics["perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("placement", MIXED[1:])
def test_experts_answer_alike_wherever_they_lie(runs: Runs, placement: str) -> None:
    result, usual = runs["mixed"].of(placement), runs["mixed"].of("cpu")
    assert result.outcome is Outcome.OK, f"{result.why}\n{result.log_tail}"
    assert set(result.checks.values()) == {verify.OK}
    assert result.quality is not None
    assert usual.quality is not None
    assert [answer.answer for answer in result.quality.answers] == [answer.answer for answer in usual.quality.answers]
    assert result.metrics["perplexity"] == pytest.approx(usual.metrics["perplexity"], rel=1e-3)


def test_experts_that_stay_in_ram_are_all_that_does(runs: Runs) -> None:
    result = runs["mixed"].of("experts-in-ram")
    assert result.estimate is not None
    assert result.loaded is not None
    wanted = {tier: one.weights_bytes for tier, one in result.estimate.tiers.items() if one.weights_bytes}
    assert result.loaded.tier_bytes == pytest.approx(wanted, rel=0.001)
    assert wanted["gpu:0"] < result.metrics["vram_peak_bytes"] < wanted["gpu:0"] + wanted["cpu"] / 2


@every_case
def test_weights_lie_where_they_were_planned(runs: Runs, run: str, placement: str) -> None:
    result = runs[run].of(placement)
    assert set(result.checks.values()) == {verify.OK}
    assert result.estimate is not None
    assert result.loaded is not None
    wanted = {tier: one.weights_bytes for tier, one in result.estimate.tiers.items() if one.weights_bytes}
    assert {tier: size for tier, size in result.loaded.tier_bytes.items() if size} == pytest.approx(wanted, rel=0.01)
    assert any(tier.startswith("gpu") for tier in wanted)


@every_case
def test_the_map_is_the_planned_one_module_by_module(runs: Runs, skeleton: Any, run: str, placement: str) -> None:
    result = runs[run].of(placement)
    plan = planned(runs, run, result)
    assert isinstance(plan.device_map, dict)
    assert result.loaded is not None
    modules = [path for path, module in skeleton.named_modules() if not any(module.children())]
    assert devices(result.loaded.device_map, modules) == devices(plan.device_map, modules)


@pytest.mark.parametrize(("run", "placement"), [pair for pair in CASES if PLACEMENTS[pair[1]].device_map in STRATEGIES])
def test_the_map_is_what_transformers_infers_for_such_cards(
    runs: Runs, skeleton: Any, run: str, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked in a process without fake cards, with their sizes: what the run found follows from these alone."""
    theirs = import_module("transformers.integrations.accelerate")
    result = runs[run].of(placement)
    plan = planned(runs, run, result)
    sizes = {device(gpu.name): gpu.total_bytes for gpu in result.machine.gpus} | {"cpu": 16 << 30}
    monkeypatch.setattr(theirs, "accelerate_max_memory", lambda given=None: sizes if given is None else given)
    limits = {device(tier): size for tier, size in plan.max_memory.items()} if plan.max_memory else None
    wanted = theirs._get_device_map(skeleton, PLACEMENTS[placement].device_map, limits, None)
    assert result.loaded is not None
    modules = [path for path, module in skeleton.named_modules() if not any(module.children())]
    assert devices(result.loaded.device_map, modules) == devices(wanted, modules)


@pytest.mark.parametrize("placement", [name for name in ON_TWO if PLACEMENTS[name].first_gpu_only])
def test_what_uses_one_card_takes_the_larger(runs: Runs, placement: str) -> None:
    result = runs["two"].of(placement)
    assert result.loaded is not None
    assert {tier for tier, size in result.loaded.tier_bytes.items() if size and tier.startswith("gpu")} == {"gpu:1"}
    assert {tier for one in result.phases for tier in one.vram_peak_bytes} == {"gpu:1"}


def test_cards_that_are_together_too_small_spill_into_the_ram(runs: Runs) -> None:
    """The limits leave each the context that every process has on a card, and less than half of the weights."""
    for placement in ON_SMALL:
        result = runs["small"].of(placement)
        assert result.case.vram_bytes is not None
        assert result.case.vram_bytes - CONTEXT_BYTES < runs.weights_bytes / 2
        assert result.loaded is not None
        assert result.loaded.tier_bytes.get("cpu")


@pytest.mark.parametrize(("run", "placement"), [pair for pair in CASES if pair[0] != "small"])
def test_the_peak_of_a_card_holds_its_weights(runs: Runs, run: str, placement: str) -> None:
    result = runs[run].of(placement)
    assert result.loaded is not None
    on_cards = [size for tier, size in result.loaded.tier_bytes.items() if tier.startswith("gpu")]
    assert result.metrics["vram_peak_bytes"] > max(on_cards)
    assert result.metrics["load_vram_peak_bytes"] >= max(on_cards)


@pytest.mark.parametrize("placement", ["direct", "ram-to-gpu", "auto", "dispatch", "recommended"])
def test_the_peak_is_the_planned_one_where_all_is_on_the_card(runs: Runs, placement: str) -> None:
    result = runs["one"].of(placement)
    assert result.estimate is not None
    assert result.metrics["vram_peak_bytes"] == pytest.approx(result.estimate.tiers["gpu:0"].allocated_bytes, rel=0.1)


@pytest.mark.parametrize("part", PARTS)
def test_too_little_is_out_of_memory_wherever_it_is_found(runs: Runs, part: str) -> None:
    """Under `--vram`: half of the weights, all and a quarter of what was beside them, 1 KiB less than what was enough."""
    result = runs["short"].results[PARTS.index(part)]
    assert result.outcome is Outcome.OOM, f"{result.outcome} {result.why}\n{result.log_tail}"
    assert result.stage == ("load" if part == "load" else "cold")
    assert (result.loaded is None) == (part == "load")
    assert ("in _prefill" in result.log_tail) == (part == "prefill")
    assert "out of memory during" in (result.why or "")
    assert "OutOfMemoryError" in (result.why or "")


def test_out_of_memory_is_a_result_and_no_failure(runs: Runs) -> None:
    assert runs["short"].status == 0, runs["short"].output
    assert not any(result.failed for result in runs["short"].results)


def test_a_limit_lets_what_fits_pass(runs: Runs) -> None:
    result = runs["enough"].of("direct")
    assert result.outcome is Outcome.OK, f"{result.why}\n{result.log_tail}"
    assert [gpu.limit_bytes for gpu in result.machine.gpus] == [2 << 30]
    assert peak(result, "load") < peak(result, "cold")


def test_a_case_that_lands_in_the_ram_is_caught(runs: Runs) -> None:
    """Whatever the placement: a library that takes no notice of its device map must not give a result under the card's name."""
    astray = runs["astray"]
    assert astray.status == 1
    assert len(astray.results) > 6
    for result in astray.results:
        assert result.loaded is not None, f"{result.case.placement}: {result.why}\n{result.log_tail}"
        assert set(result.loaded.tier_bytes) == {"cpu"}
        assert result.checks["placement"] != verify.OK, result.case.placement
        assert "test_load" in result.failed


@pytest.mark.parametrize(("run", "places"), [("one", {"0", "cpu", "disk"}), ("two", {"0", "1", "cpu"})])
def test_the_page_shows_cards_map_and_vram(runs: Runs, run: str, places: set[str]) -> None:
    page = (runs[run].folder / "index.html").read_text(encoding="utf-8")
    assert {gpu.model for gpu in runs[run].of("direct").machine.gpus} <= set(re.findall(r"NVIDIA A100-[\w-]+", page))
    for result in runs[run].results:
        assert f"<bdi>{result.case.placement}</bdi>" in page
        assert f'<data value="{result.metrics["vram_peak_bytes"]:.0f}" data-key="vram_peak_bytes">' in page
    (written,) = [result for result in runs[run].results if result.case.placement == FILE]
    entries = re.findall(r"<code>model\.layers\.(\d)</code> <span>(\w+)</span>", page)
    assert {(path[-1], place) for path, place in (written.device_map or {}).items() if "layers" in path} <= set(entries)
    assert {place for _, place in entries} == places


@pytest.mark.parametrize("run", ["one", "two", "small", "short"])
def test_the_report_as_json_has_cards_map_and_vram(runs: Runs, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["report", str(runs[run].folder), "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = [tier["model"] for tier in told["machines"][0]["tiers"] if tier["kind"] == "gpu"]
    other = {"two": ["NVIDIA A100-PCIE-40GB"], "small": ["NVIDIA A100-SXM4-80GB"]}
    assert names == ["NVIDIA A100-SXM4-80GB", *other.get(run, [])]
    by_id = {case["id"]: case for case in told["cases"]}
    for result in runs[run].results:
        case = by_id[result.id]
        assert case["device_map"] == result.device_map
        assert case["metrics"].get("vram_peak_bytes") == result.metrics.get("vram_peak_bytes")
        assert case["outcome"] == result.outcome.value


@pytest.mark.parametrize("run", ["one", "two", "small", "short", "enough"])
def test_the_audit_finds_nothing_against_what_a_run_wrote(runs: Runs, run: str) -> None:
    for result in runs[run].results:
        passed = examine(result, datetime.now(timezone.utc))
        assert isinstance(passed, Result), f"{result.id}: {passed}"


def test_results_of_cards_are_published(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["publish", str(runs["two"].folder), "--to", str(tmp_path / "site"), "--strict"]) == 0
    assert "0 lines refused" in capsys.readouterr().out
    pages = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html"))
    assert "A100" in pages
    assert str(runs.folder) not in pages


def test_nothing_is_loaded_by_another_thread() -> None:
    """Its tensors would be real ones. The library has a switch for that, which the cards set; it must still be there."""
    assert "HF_DEACTIVATE_ASYNC_LOAD" in inspect.getsource(import_module("transformers.core_model_loading"))
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
