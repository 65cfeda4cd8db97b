"""Which modules a library packs: experts of a mixture, vision towers beside packed text, blocks and classes of other names.

What is said of each is what transformers 5.24 did with it, with gptqmodel 7.7 and optimum 2.3; where these are installed, it is
loaded again to see.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from harness.architecture import model_spec, skeleton_source
from harness.architecture.stored import packed_check
from harness.catalog import resolve
from harness.core.errors import CheckpointError
from harness.core.methods.packages import lacking
from harness.core.methods.table import METHODS
from harness.core.precisions import PRECISIONS
from harness.core.records import Verdict
from harness.planning.other_form import stored_for
from harness.planning.planner import Planner
from harness.worker import build_skeleton as worker
from tests.strangers import architectures
from tests.support.builders import case, machine
from tests.support.small_models import held_bytes

pytestmark = pytest.mark.filterwarnings("ignore")
Pack = Callable[[str, torch.Tensor], dict[str, torch.Tensor]]
GROUP = 32


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build skeletons here: a worker costs seconds."""
    monkeypatch.setattr(skeleton_source, "build", lambda config, _: worker.build_skeleton(config))
    transformers.logging.disable_progress_bar()


def words(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2**31 - 1, shape, dtype=torch.int32)


def gptq(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    order = {f"{module}.g_idx": (torch.arange(inputs) // GROUP).int()}
    return {f"{module}.qweight": words(inputs // 8, outputs), **grouped(module, outputs, inputs), **order}


def awq(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    return {f"{module}.qweight": words(inputs, outputs // 8), **grouped(module, outputs, inputs)}


def grouped(module: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    scales = torch.full((inputs // GROUP, outputs), 0.01, dtype=torch.float16)
    return {f"{module}.qzeros": words(inputs // GROUP, outputs // 8), f"{module}.scales": scales}


def nf4(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    packed, state = quantize_4bit(weight.float().contiguous(), quant_type="nf4")
    beside = {f"{module}.weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {f"{module}.weight": packed, **beside}


def int8(module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    most = weight.float().abs().amax(1)
    whole = (weight.float() / most[:, None] * 127).round().to(torch.int8)
    return {f"{module}.weight": whole, f"{module}.SCB": most, f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8)}


SETTINGS: Mapping[Pack, Mapping[str, Any]] = {
    gptq: {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    awq: {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    nf4: {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    int8: {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def save(folder: Path, name: str, pack: Pack, which: str, **said: Any) -> Path:
    """Save an architecture with the weights packed whose names a pattern finds."""
    architectures.save(name, folder)
    weights = dict(load_file(folder / "model.safetensors"))
    for key in [key for key, weight in weights.items() if weight.dim() == 2 and re.search(which, key)]:
        weights |= pack(key.removesuffix(".weight"), weights.pop(key))
    if pack in (gptq, awq):
        weights = {key: weight.half() if weight.is_floating_point() else weight for key, weight in weights.items()}
    save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {**SETTINGS[pack], **said}}))
    return folder


TEXT = r"(language_model|model\.layers).*proj\.weight$"
LINEARS = r"\.(h|layers|blocks)\.\d+\..*\.(\w+_proj|w[123]|Wqkv|dense\w*|query_key_value|\w*h_to_\w*h)\.weight$"
EXPERTS = "joins the experts of a layer to one tensor, as .*experts.*, and joins none that {} packed"
OWN_LINEAR = "is packed, and optimum makes packed layers of torch's own Linear alone, in blocks that it knows"
KEEPS = {"modules_to_not_convert": ["model.visual"]}
BEGUN = {"modules_to_not_convert": ["visual"]}  # as Qwen publishes it: no name begins so in transformers 5
# architecture, how and what is packed, what else the config says, why it is refused; None: it runs
KINDS: Mapping[str, tuple[str, Pack, str, dict[str, Any], str | None]] = {
    "gptq of experts": ("qwen3_moe", gptq, LINEARS, {}, EXPERTS.format("GPTQ")),
    "gptq of mixtral's": ("mixtral", gptq, LINEARS, {}, EXPERTS.format("GPTQ")),
    "awq of experts": ("mixtral", awq, LINEARS, {}, EXPERTS.format("AWQ")),
    "awq but of experts": ("mixtral", awq, r"self_attn.*proj\.weight$", {}, None),
    "nf4 of experts": ("mixtral", nf4, LINEARS, {}, EXPERTS.format("bitsandbytes 4-bit")),
    "nf4 but of experts": ("mixtral", nf4, r"self_attn.*proj\.weight$", {}, None),
    "int8 of experts": ("qwen3_moe", int8, LINEARS, {}, EXPERTS.format("bitsandbytes 8-bit")),
    "gptq beside a tower": ("qwen2_5_vl", gptq, TEXT, {}, None),
    "gptq beside a clip": ("llava", gptq, TEXT, {}, None),
    "gptq beside a pixtral": ("mistral3", gptq, TEXT, {}, None),
    "gptq in a tower": ("llava", gptq, r"(self_attn|mlp)\..*\.weight$", {}, OWN_LINEAR),
    "awq beside a tower": ("qwen2_5_vl", awq, TEXT, KEEPS, None),
    "awq beside a tower by half a name": ("qwen2_5_vl", awq, TEXT, BEGUN, "write whole names in it"),
    "gptq of falcon": ("falcon", gptq, LINEARS, {}, OWN_LINEAR),
    "gptq of other blocks": ("mpt", gptq, LINEARS, {}, OWN_LINEAR),
    "gptq of other blocks, named": ("mpt", gptq, LINEARS, {"block_name_to_quantize": "transformer.blocks"}, None),
    "gptq of bloom": ("bloom", gptq, LINEARS, {}, None),
    "awq that is to be kept": ("llama", awq, LINEARS, {"modules_to_not_convert": ["down_proj"]}, "keeps it in 16 bits"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_is_what_the_library_packs(kind: str, tmp_path: Path) -> None:
    name, pack, which, said, why = KINDS[kind]
    folder = save(tmp_path / "model", name, pack, which, **said)
    told = refusal(folder)
    assert (told is None) is (why is None)
    assert re.search(why or "", told or "")
    if not lacking(METHODS["gptq" if pack is gptq else "awq" if pack is awq else "bitsandbytes_4bit"].needs):
        assert runs(folder, name) is (why is None)


def refusal(folder: Path) -> str | None:
    """Return why a plan refuses a checkpoint on a machine with every package; None if it fits."""
    try:
        spec = model_spec.read_spec(resolve.resolve(str(folder)))
    except CheckpointError as error:
        return str(error)
    assert spec.packed is not None
    plan = Planner(spec, machine(), here=False).plan(case(str(spec.packed.precision), "cpu"))
    assert plan.verdict in (Verdict.INVALID, Verdict.FITS)
    return None if plan.verdict is Verdict.FITS else plan.why


def runs(folder: Path, name: str) -> bool:
    """Say whether transformers loads all that the files hold, nothing else, and writes with it."""
    try:
        loaded: Any = architectures.auto_class(name).from_pretrained(folder, dtype="float16", output_loading_info=True)
        loaded[0].generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    return not any(loaded[1].values()) and held_bytes(loaded[0]) > 0


@pytest.mark.parametrize("precision", ["gptq-int4", "gptq-int8", "awq-int4"])
def test_a_mixture_is_not_said_to_run_in_a_form_that_nothing_loads(precision: str) -> None:
    spec = model_spec.read_spec(resolve.resolve("mixtral-8x7b-v0.1"))
    form = stored_for(spec, PRECISIONS[precision])
    assert form is not None
    assert form.packed is not None
    assert re.search(EXPERTS.format("(GPTQ|AWQ)"), str(form.packed.fault))
    plan = Planner(spec, machine()).plan(case(precision, "cpu"))
    assert plan.verdict is Verdict.INVALID
    assert "look for one on the hub" not in str(plan.why)
    dense = stored_for(model_spec.read_spec(resolve.resolve("qwen3-8b")), PRECISIONS[precision])
    assert dense is not None
    assert dense.packed is not None
    assert dense.packed.fault is None


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.packs_linears and name in AUTO_QUANTIZER_MAPPING])
def test_what_joins_packed_experts_is_what_the_library_unpacks_first(name: str) -> None:
    """transformers dequantizes before it merges (HfQuantizer.update_weight_conversions), or a stack keeps what is packed."""
    said = SimpleNamespace(linear_class="autobitlinear", quantization_mode="offline", quant_type=None)
    quantizer: Any = AUTO_QUANTIZER_MAPPING[name]
    operations = quantizer.get_load_operations(SimpleNamespace(quantization_config=said))
    if name != "gguf":  # whose names are converted one by one
        assert ("dequantize" in operations) is (METHODS[name].unpacked is not None)


def test_blocks_are_looked_for_where_optimum_does() -> None:
    constants = pytest.importorskip("optimum.gptq.constants", reason="optimum is not installed")
    assert list(packed_check.OPTIMUM_BLOCKS) == constants.BLOCK_PATTERNS
