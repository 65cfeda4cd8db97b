"""Checkpoints of torchao in both containers: planned by their headers as transformers loads, multiplies and counts them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from harness.architecture import model_spec, skeleton_source
from harness.architecture.inspection import inspect
from harness.catalog import resolve
from harness.checkpoint import reader
from harness.core.records import Verdict
from harness.measure import verify
from harness.measure.protocol import Load
from harness.planning.planner import Planner
from harness.worker import build_skeleton as worker
from harness.worker import model as work
from tests.strangers import made_by_packages
from tests.support.builders import case, gpu, machine
from tests.support.small_models import held_bytes

pytestmark = pytest.mark.filterwarnings("ignore")
NEAR = 0.01
INT4 = vars(torch)["int4"]  # which torch's own types leave out
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
KINDS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "int8": (lambda ao: ao.Int8WeightOnlyConfig(), {}),
    "int8, but": (lambda ao: ao.Int8WeightOnlyConfig(), {"modules_to_not_convert": ["model.layers.0", "lm_head"]}),
    "int8, dynamic": (lambda ao: ao.Int8DynamicActivationInt8WeightConfig(), {}),
    "fp8": (lambda ao: ao.Float8WeightOnlyConfig(), {"modules_to_not_convert": ["lm_head", "down_proj"]}),
    "intx": (lambda ao: ao.IntxWeightOnlyConfig(), {}),
    "intx, with embeddings": (lambda ao: ao.IntxWeightOnlyConfig(), {"include_input_output_embeddings": True}),
    "intx, groups": (lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=ao.PerGroup(32)), {}),
    "by module": (
        lambda ao: ao.FqnToConfig(
            {
                "_default": ao.Int8WeightOnlyConfig(),
                "re:.*mlp.*": ao.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=ao.PerGroup(32)),
            }
        ),
        {},
    ),
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    transformers.logging.disable_progress_bar()


def save(folder: Path, kind: str, container: str) -> Path:
    library = pytest.importorskip("torchao.quantization")
    make, more = KINDS[kind]
    asked = transformers.TorchAoConfig(make(library), **more)
    source = made_by_packages.plain(folder / "plain")
    config = json.loads((source / "config.json").read_text())
    odd = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "vocab_size": 515}))
    odd.bfloat16().save_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16", quantization_config=asked)
    model.save_pretrained(folder / "made")
    if container == "bin":
        (folder / "made/model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "made/pytorch_model.bin")
    return folder / "made"


@pytest.mark.parametrize("container", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_is_what_transformers_does(kind: str, container: str, tmp_path: Path) -> None:
    folder = save(tmp_path, kind, container)
    spec = model_spec.read_spec(resolve.resolve(str(folder)))
    assert spec.packed is not None
    own = spec.packed.precision
    seen = inspect(reader.read(folder), name="stranger", kind="directory", source="stranger")
    assert seen.parameters == spec.skeleton.parameters
    for precision, dtype in {own: "bfloat16"}.items() if own else DTYPES.items():
        plan = Planner(spec, machine(), here=True).plan(case(precision, "cpu"))
        real = made_by_packages.loaded(folder, dtype)
        assert (plan.verdict is Verdict.FITS) is ("error" not in real), (precision, plan.why, real)
        if plan.code is None or "error" in real:
            continue
        model = work.load(Load(model=str(folder), code=plan.code, tokenizer=False), lambda _: contextlib.nullcontext())[0]
        assert set(verify.checks(plan, work.loaded_facts(model)).values()) == {verify.OK}
        assert plan.estimate is not None
        planned = sum(tier.weights_bytes for tier in plan.estimate.tiers.values())
        assert planned == pytest.approx(held_bytes(model.module), rel=NEAR)
        assert planned == pytest.approx(real["held"], rel=NEAR)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["int8", "intx", "fp8"])
def test_a_head_that_a_pickle_shares_with_the_embedding_counts_once(kind: str, tied: bool, tmp_path: Path) -> None:
    library = pytest.importorskip("torchao.quantization")
    make, _ = KINDS[kind]
    config = {**made_by_packages.CONFIG, "vocab_size": 2048, "tie_word_embeddings": True}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).bfloat16().save_pretrained(tmp_path / "plain")
    asked = transformers.TorchAoConfig(make(library))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="bfloat16", quantization_config=asked)
    folder = tmp_path / "made"
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": tied}))
    spec = model_spec.read_spec(resolve.resolve(str(folder)))
    assert spec.packed is not None
    plan = Planner(spec, machine(), here=True).plan(case(spec.packed.precision or "bf16", "cpu"))
    assert plan.estimate is not None
    held = made_by_packages.loaded(folder, "bfloat16")["held"]
    assert sum(tier.weights_bytes for tier in plan.estimate.tiers.values()) == pytest.approx(held, rel=0.001)


@pytest.mark.parametrize("kind", ["int8", "by module"])
def test_a_map_that_transformers_infers_divides_no_weights_that_were_quantized_by_name(kind: str, tmp_path: Path) -> None:
    """Inferring ends in a ValueError as soon as a module with a buffer is placed by itself; an explicit map is not inferred."""
    folder = save(tmp_path, kind, "safetensors")
    spec = model_spec.read_spec(resolve.resolve(str(folder)))
    assert spec.packed is not None
    precision = spec.packed.precision or "bf16"
    held = made_by_packages.loaded(folder, "bfloat16")["held"]
    try:
        divided = any(len(set(found.values())) > 1 for _, found in made_by_packages.auto_maps(folder, "bfloat16", held))
    except ValueError:
        divided = False
    assert divided is (kind == "int8")
    planner = Planner(spec, machine(gpu()), here=False)
    plans = {placement: planner.plan(case(precision, placement)) for placement in ("gpu+cpu", "recommended", "cpu")}
    said = {placement for placement, plan in plans.items() if "quantized by the names of modules" in (plan.why or "")}
    assert said == (set() if divided else {"gpu+cpu"}), plans
