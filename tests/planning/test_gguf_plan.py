"""GGUF files are planned, loaded and told apart: what transformers unpacks, what it keeps in blocks, and what it does not load."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.integrations.accelerate import compute_module_sizes
from transformers.integrations.gguf import kernels
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS

from harness.architecture import model_spec, skeleton, skeleton_source
from harness.architecture.model_spec import ModelSpec
from harness.catalog import resolve
from harness.checkpoint import reader
from harness.core.errors import CheckpointError, UsageError
from harness.core.families import GGUF
from harness.core.options import DEFAULT_MODEL
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.records import Outcome, Plan, Verdict
from harness.measure import system_counters, verify
from harness.measure.protocol import Load
from harness.planning.code import Facts, loading_code
from harness.planning.cost import estimate
from harness.planning.device_map.infer import Widths, measure
from harness.planning.planner import Planner
from harness.results import store
from harness.worker import build_skeleton as worker
from harness.worker import model as work
from tests.support.builders import case, gpu, machine, weight_bytes
from tests.support.gguf_files import split_gguf, write_lfm2, write_llama
from tests.support.small_models import held_bytes

ROOT = Path(__file__).parents[2]
NEAR = 0.005
PROMPT = "The capital of France is"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""

    def build(metadata: dict[str, Any], tensors: Any, _: Path) -> skeleton.Skeleton:
        try:
            return worker.build_gguf_skeleton(metadata, tensors)
        except ValueError as error:
            raise UsageError(f"no skeleton: {error}") from None

    monkeypatch.setattr(skeleton_source, "build_gguf", build)
    transformers.logging.disable_progress_bar()


def spec(path: Path) -> ModelSpec:
    return model_spec.of_checkpoint("tiny", "tiny", reader.read(path), path.parent)


def loaded(one: ModelSpec, folder: Path, precision: str) -> work.Model:
    """Load in RAM by the code that `plan` prints."""
    row = PRECISIONS[precision]
    code = loading_code(one.adapted(row), PLACEMENTS["cpu"], row.dtype, facts=Facts(gguf_file=one.gguf_file))
    return work.load(Load(model=str(folder), code=code, gguf_file=one.gguf_file), lambda _: contextlib.nullcontext())[0]


def expected_bytes(one: ModelSpec, precision: str) -> int:
    row = PRECISIONS[precision]
    return sum(weight_bytes(one.skeleton, estimate.weight_format(row, row.dtype, one)).values())


# ---- unpacked on loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_what_is_unpacked_takes_what_was_estimated_and_is_checked(precision: str, kind: str, tmp_path: Path) -> None:
    one = spec(write_llama(tmp_path / "model.gguf", kind))
    found = loaded(one, tmp_path, precision)
    assert expected_bytes(one, precision) == pytest.approx(held_bytes(found.module), rel=NEAR)
    assert one.skeleton.model_class == "LlamaForCausalLM"
    assert one.skeleton.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    planned = Planner(one, machine()).plan(case(precision, "cpu"))
    assert planned.verdict is Verdict.FITS
    assert set(verify.checks(planned, work.loaded_facts(found)).values()) == {verify.OK}
    assert found.tokenizer(PROMPT)["input_ids"]


def test_a_header_is_enough_for_the_skeleton(tmp_path: Path) -> None:
    """As for a file on the hub, of which only the header travels."""
    read = reader.read(write_llama(tmp_path / "model.gguf"))
    (tmp_path / "model.gguf").unlink()
    assert model_spec.of_checkpoint("tiny", "tiny", read, None).skeleton.parameters == read.parameters


@pytest.mark.skipif(not system_counters.LINUX, reason="VmHWM is Linux's")
def test_the_printed_code_runs_in_the_memory_that_was_estimated(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    write_llama(folder / "model.gguf", "Q4_1")
    command = [sys.executable, "-m", "harness", "plan", str(folder), "--new-tokens", "8"]
    said = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    expected = next(one for one in json.loads(said)["plans"] if (one["precision"], one["placement"]) == ("bf16", "cpu"))
    assert expected["verdict"] == "fits"
    code = subprocess.run([*command, "--code", "bf16/cpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    peak = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    done = subprocess.run([sys.executable, "-c", code + peak], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert PROMPT in done.stdout
    assert expected["tiers"]["cpu"]["low_bytes"] <= int(done.stdout.split()[-1]) * 1024 <= expected["tiers"]["cpu"]["high_bytes"]


# ---- kept in blocks -----------------------------------------------------------------------------------------------------


class Kernel:
    """Stands for ggml's kernels, which are fetched from the hub for a GPU: the same sums in torch, on the processor."""

    GEMV_TYPES = frozenset(GGML_BLOCK)

    @staticmethod
    def mul_mat_vec(weight: torch.Tensor, flat: torch.Tensor, kind: int, rows: int) -> torch.Tensor:
        return flat.float() @ dequantize(weight, kind, torch.float32).reshape(rows, -1).T

    dequantize = get_rows = mul_mat_id = None


@pytest.fixture
def ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_gguf_kernel", kernels.GgufKernel(Kernel))


@pytest.mark.usefixtures("ggml")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_what_stays_in_blocks_takes_what_was_estimated(kind: str, tmp_path: Path) -> None:
    one = spec(write_lfm2(tmp_path / "model.gguf", kind))
    found = loaded(one, tmp_path, "gguf")
    assert expected_bytes(one, "gguf") == pytest.approx(held_bytes(found.module), rel=NEAR)
    assert expected_bytes(one, "gguf") < 0.3 * expected_bytes(one, "fp32")
    assert (
        verify.checks(Plan(case=case("gguf", "cpu"), verdict=Verdict.UNKNOWN), work.loaded_facts(found))["precision"] == verify.OK
    )
    tokens = torch.tensor([found.prompt(8)])
    assert torch.isfinite(found.module(tokens).logits).all()


def test_blocks_that_were_unpacked_after_all_are_told(tmp_path: Path) -> None:
    """Without the kernels transformers unpacks, with a warning in its log and nothing else."""
    one = spec(write_lfm2(tmp_path / "model.gguf"))
    found = work.loaded_facts(loaded(one, tmp_path, "gguf"))
    said = verify.checks(Plan(case=case("gguf", "cpu"), verdict=Verdict.UNKNOWN), found)["precision"]
    assert said.startswith("gguf did not take effect: 0.0 % of the Linear weights are uint8 (float32 ")


@pytest.mark.usefixtures("ggml")
def test_a_map_counts_what_stays_in_blocks_as_transformers_does(tmp_path: Path) -> None:
    """transformers puts the packed modules in their places before it infers a map."""
    one = spec(write_lfm2(tmp_path / "model.gguf"))
    row = PRECISIONS["gguf"]
    sizes = weight_bytes(one.skeleton, estimate.weight_format(row, row.dtype, one))
    real = compute_module_sizes(loaded(one, tmp_path, "gguf").module)[0]
    for path in ("model.layers.0", "model.layers.1", "model.embed_tokens"):
        assert measure(one.skeleton, Widths("float32", weights=sizes))[path] == pytest.approx(real[path], rel=NEAR)


def test_the_architectures_that_stay_packed_are_those_of_transformers() -> None:
    assert set(GGUF_ARCHS) == GGUF.packed_architectures


# ---- what cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (("int4", "cpu"), "transformers quantizes no GGUF file anew: load it with --precision bf16, fp16 or fp32"),
        (("bf16", "dispatch"), "load_checkpoint_and_dispatch does not read GGUF"),
        (("bf16", "disk"), "transformers does not offload a GGUF to the disk: what it would put there stays in RAM"),
        (
            ("gguf", "direct"),
            "transformers keeps the blocks of lfm2, qwen35, qwen35moe only and unpacks llama: use bf16, fp16 or fp32",
        ),
    ],
)
def test_what_a_gguf_is_not_loaded_as(of: tuple[str, str], said: str, tmp_path: Path) -> None:
    planned = Planner(spec(write_llama(tmp_path / "model.gguf")), machine(gpu())).plan(case(*of))
    assert (planned.verdict, planned.why, planned.code) == (Verdict.INVALID, said, None)


def test_transformers_says_so_itself(tmp_path: Path) -> None:
    one = spec(write_llama(tmp_path / "model.gguf"))
    with pytest.raises(ValueError, match="cannot combine Quantization and loading a model from a GGUF file"):
        loaded(one, tmp_path, "int4")


def test_no_tensor_in_blocks_is_nothing_to_keep(tmp_path: Path) -> None:
    planned = Planner(spec(write_lfm2(tmp_path / "model.gguf", "F16")), machine(gpu())).plan(case("gguf", "direct"))
    assert planned.why == "no tensor of the file is in blocks: load it with --precision bf16, fp16 or fp32"


def test_a_gguf_precision_is_for_gguf_files() -> None:
    one = ModelSpec(name="tiny", source="tiny", skeleton=skeleton_source.named("chatglm-6b"), stored={}, checkpoint_bytes=0)
    planned = Planner(one, machine(gpu())).plan(case("gguf", "direct"))
    assert planned.verdict is Verdict.INVALID
    assert planned.why == "needs a GGUF checkpoint, and this one is float16"


def test_an_architecture_that_transformers_does_not_load_is_told_before_loading(tmp_path: Path) -> None:
    one = spec(write_llama(tmp_path / "model.gguf", architecture="plamo"))
    assert one.rough
    assert one.notes
    planned = Planner(one, machine()).plan(case("bf16", "cpu"))
    assert planned.verdict is Verdict.INVALID
    assert planned.why is not None
    assert "architecture plamo is not supported yet" in planned.why


def test_parts_of_a_split_file_are_to_be_joined(tmp_path: Path) -> None:
    split_gguf(write_llama(tmp_path / "model.gguf"))
    one = model_spec.of_checkpoint("tiny", "tiny", reader.read(tmp_path), tmp_path)
    planned = Planner(one, machine()).plan(case("bf16", "cpu"))
    assert planned.verdict is Verdict.INVALID
    assert planned.why == "it is split into 2 files, and transformers loads one: join them with llama-gguf-split --merge"


def test_parts_of_what_transformers_does_not_map_are_not_to_be_joined(tmp_path: Path) -> None:
    split_gguf(write_llama(tmp_path / "model.gguf", architecture="plamo"))
    one = model_spec.of_checkpoint("tiny", "tiny", reader.read(tmp_path), tmp_path)
    planned = Planner(one, machine()).plan(case("bf16", "cpu"))
    assert planned.verdict is Verdict.INVALID
    assert "architecture plamo is not supported yet" in str(planned.why)


# ---- which file ---------------------------------------------------------------------------------------------------------


def test_one_file_of_several_is_named_by_its_path_or_by_an_option(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_llama(tmp_path / f"{name}.gguf")
    with pytest.raises(CheckpointError, match=r"has 2 GGUF files; name one, by its path or --file: 'a\.gguf', 'b\.gguf'$"):
        model_spec.read_spec(resolve.resolve(str(tmp_path)))
    sources = [resolve.resolve(str(tmp_path), "b.gguf"), resolve.resolve(str(tmp_path / "b.gguf"))]
    assert sources[0] == sources[1]
    assert sources[0].name == "b"
    assert model_spec.read_spec(sources[0]).gguf_file == "b.gguf"


@pytest.mark.parametrize(
    ("model", "file", "said"),
    [
        (".", "c.gguf", "has no file 'c.gguf': did you mean 'a.gguf'"),
        (".", "model.safetensors", "--file 'model.safetensors' is no GGUF file: leave it out"),
        ("a.gguf", "a.gguf", "a is neither a directory nor on the hub, leave it out"),
        (DEFAULT_MODEL, "a.gguf", "smollm2-135m is neither a directory nor on the hub, leave it out"),
        ("b.gguf", None, "no file 'b.gguf': check the path; a GGUF file on the hub is its repository and --file"),
    ],
)
def test_a_file_that_cannot_be(model: str, file: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "a.gguf")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as raised:
        resolve.resolve(model, file)
    assert said in str(raised.value)


def test_a_run_loads_it_and_leaves_out_no_precision_of_its_own(tmp_path: Path) -> None:
    model, results = write_llama(tmp_path / "tiny.gguf"), tmp_path / "results"
    options = ["--model", str(model), "--placement", "cpu", "--new-tokens", "2", "--repeats", "1", "--results", str(results)]
    options += ["--calibrate", "never"]
    command = [sys.executable, "-m", "pytest", "cases/test_load.py", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {result.case.precision: result for result in store.Store(results).read()[0]}
    assert set(found) == {"fp32", "bf16", "fp16", "gguf"}, done.stdout + done.stderr
    assert {name for name, one in found.items() if one.outcome is Outcome.OK} == {"fp32", "bf16", "fp16"}
    assert set(found["bf16"].checks.values()) == {verify.OK}
    assert found["bf16"].code is not None
    assert 'gguf_file="tiny.gguf"' in found["bf16"].code
    assert found["gguf"].outcome is Outcome.UNSUPPORTED
