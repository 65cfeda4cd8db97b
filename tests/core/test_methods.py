"""The table of quantization methods against the library: a release that adds, drops or changes one makes a test here fail."""

from __future__ import annotations

import inspect
import re
from importlib import metadata
from typing import Any

import pytest

from harness.core.methods import packages
from harness.core.methods.config import is_converted, method_name, settings_of
from harness.core.methods.cpu_kernels import CPU_KERNELS
from harness.core.methods.kernels import PACKED_KERNELS
from harness.core.methods.method import Method
from harness.core.methods.packages import REQUIREMENTS, how_to_install, lacking
from harness.core.methods.table import FOREIGN, METHODS, OWN, foreign
from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS, Config, row_of

ROWS = pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)


def quantizer_of(row: Method) -> Any:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return AUTO_QUANTIZER_MAPPING[row.name]


def source_of(row: Method, name: str) -> str:
    return inspect.getsource(getattr(quantizer_of(row), name))


def test_there_is_a_row_for_each_method_of_transformers() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    assert METHODS.keys() == AUTO_QUANTIZER_MAPPING.keys() == AUTO_QUANTIZATION_CONFIG_MAPPING.keys()
    assert not METHODS.keys() & (FOREIGN.keys() | OWN.keys())


@ROWS
def test_a_row_refuses_by_traits_that_placements_have(row: Method) -> None:
    traits = {trait for placement in PLACEMENTS.values() for trait in placement.traits}
    assert row.refuses.keys() <= traits
    assert all(row.refuses.values())


@ROWS
def test_the_tenth_that_is_kept_free_is_the_library_s(row: Method) -> None:
    from transformers.quantizers.base import HfQuantizer

    adjusts = quantizer_of(row).adjust_max_memory is not HfQuantizer.adjust_max_memory
    assert row.margin == adjusts


# Those whose size of an element depends on the config, or is that of a replaced module that has its bytes already.
COUNTED_BY_CONFIG = {"quanto", "torchao"}
HELD_AS_COUNTED = {"fp8", "mxfp8"}


@ROWS
def test_what_an_element_counts_is_the_library_s(row: Method) -> None:
    size = inspect.getattr_static(quantizer_of(row), "quantized_element_size")
    if row.name in COUNTED_BY_CONFIG:
        assert row.counted is not None
    elif row.name in HELD_AS_COUNTED:
        assert (row.counted, size.fget(None)) == (None, 1)
    else:
        assert row.counted == size.fget(object())


@ROWS
def test_what_can_be_unpacked_has_a_setting_for_it(row: Method) -> None:
    """Only a config with `dequantize` takes that from the call, where the file has settings of its own."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, LOADING_ATTRIBUTES_CONFIG_TYPES

    kind: Any = AUTO_QUANTIZATION_CONFIG_MAPPING[row.name]
    takes = "dequantize" in inspect.signature(kind.__init__).parameters
    assert (row.unpacked is not None) == takes
    if row.unpacked is not None and row.name != "gguf":
        assert row.unpacked.expression == f"{kind.__name__}(dequantize=True)"
        assert issubclass(kind, LOADING_ATTRIBUTES_CONFIG_TYPES)
    assert {name for name in PRECISIONS if PRECISIONS[name].unpacks} == {"fp8", "mxfp8", "mxfp4", "gguf"}
    assert all(METHODS[name].unpacked is not None for name in PRECISIONS if PRECISIONS[name].unpacks)


@ROWS
def test_what_it_needs_is_what_the_library_looks_for(row: Method) -> None:
    """By the functions that its checks call: is_aqlm_available, is_kernels_available."""
    other = {
        "compressed_tensors": "compressed_tensors",
        "fast_hadamard_transform": "hadamard",
        "optimum.quanto": "optimum_quanto",
        "spqr_quant": "spqr",
    }
    text = source_of(row, "validate_environment") + source_of(row, "__init__")
    looked_for = set(re.findall(r"is_(\w+?)_available\(", text)) - {"accelerate", "torch", "torch_xpu", "torch_cuda"}
    if row.name == "fbgemm_fp8":  # on Intel's GPUs
        looked_for -= {"kernels"}
    if row.name == "metal":  # on Apple's
        looked_for -= {"kernels"}
    if row.name == "quanto":  # optimum itself comes with it
        looked_for -= {"optimum"}
    if row.name == "nvfp4":  # nothing that is stored so is loaded
        looked_for -= {"kernels"}
    if row.name in ("gguf", "bitsandbytes_4bit", "bitsandbytes_8bit"):  # gguf reads the file, before any of this
        looked_for |= {"gguf"} & set(row.needs)
    assert {other.get(module, module) for module in (*row.needs, *row.packs_with)} == looked_for
    assert {*row.needs, *row.packs_with} <= REQUIREMENTS.keys()


@ROWS
def test_the_compute_capability_is_the_library_s(row: Method) -> None:
    text = source_of(row, "validate_environment")
    asked = {
        "fp8": r"major == 8 and minor < 9",
        "mxfp8": r"major == 8 and minor < 9",
        "fbgemm_fp8": r"major < 9",
        "mxfp4": r"compute_capability >= \(7, 5\)",
        "fp_quant": "Blackwell GPU",
    }
    if row.name in asked:
        assert re.search(asked[row.name], text)
        assert row.packs_from in (8.9, 9.0, 7.5, 10.0)
    else:
        assert row.packs_from == 0


@ROWS
def test_what_runs_on_gpus_only_says_so_as_the_library_does(row: Method) -> None:
    ends = re.search(r"if not torch\.cuda\.is_available\(\)[^\n]*:\n\s+raise", source_of(row, "validate_environment"))
    raises = ends is not None or row.name in ("fbgemm_fp8",)
    assert ("ram" in row.refuses) == (raises and row.unsupported is None)


@pytest.mark.parametrize("name", ["bitsandbytes_4bit", "bitsandbytes_8bit", "bitnet", "eetq", "higgs", "fp_quant"])
def test_what_is_not_offloaded_is_refused_by_the_library_as_well(name: str) -> None:
    row = METHODS[name]
    text = source_of(row, "validate_environment")
    assert "offloads_to_cpu" in row.refuses
    assert re.search(r'"cpu" in (device_map\.values\(\)|values)', text)
    assert "self.pre_quantized and" not in text


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "metal", "fbgemm_fp8"])
def test_what_is_refused_only_while_quantizing_is_offloaded_when_stored(name: str) -> None:
    assert re.search(r"not self\.pre_quantized\s+and", source_of(METHODS[name], "validate_environment"))
    assert "offloads_to_cpu" not in METHODS[name].refuses


@pytest.mark.parametrize(
    ("module", "check", "limits"),
    [
        ("kernels", "is_kernels_available", ("KERNELS_MIN_VERSION", "KERNELS_MAX_VERSION")),
        ("bitsandbytes", "is_bitsandbytes_available", ("BITSANDBYTES_MIN_VERSION",)),
        ("hqq", "is_hqq_available", ("HQQ_MIN_VERSION",)),
        ("vptq", "is_vptq_available", ("VPTQ_MIN_VERSION",)),
        ("torchao", "is_torchao_available", ("TORCHAO_MIN_VERSION",)),
        ("compressed_tensors", "is_compressed_tensors_available", ("COMPRESSED_TENSORS_MIN_VERSION",)),
        ("auto_round", "is_auto_round_available", ("AUTOROUND_MIN_VERSION",)),
        ("gguf", "is_gguf_available", ("GGUF_MIN_VERSION",)),
    ],
)
def test_versions_are_the_library_s(module: str, check: str, limits: tuple[str, ...]) -> None:
    from transformers.utils import import_utils

    assert hasattr(import_utils, check)
    wanted = [getattr(import_utils, limit) for limit in limits]
    assert re.findall(r"[\d.]+\d", REQUIREMENTS[module]) == wanted


@pytest.mark.parametrize("module", ["flute", "fp_quant", "quark"])
def test_versions_that_stand_in_a_function_are_the_library_s(module: str) -> None:
    from transformers.utils import import_utils

    text = inspect.getsource(getattr(import_utils, f"is_{module}_available").__wrapped__)
    assert f'version.parse("{re.findall(r">=([0-9.]+)", REQUIREMENTS[module])[0]}")' in text


def test_triton_is_as_new_as_mxfp4_asks_on_a_cuda_gpu() -> None:
    text = source_of(METHODS["mxfp4"], "validate_environment").partition("torch.cuda.is_available")[2]
    assert f'is_triton_available("{REQUIREMENTS["triton"].partition(">=")[2]}")' in text


def test_gptqmodel_is_as_new_as_the_library_asks() -> None:
    from transformers.quantizers import quantizer_gptq

    assert REQUIREMENTS["gptqmodel"] == f"gptqmodel>={quantizer_gptq.MIN_GPTQ_VERSION}"
    assert REQUIREMENTS["optimum"] == f"optimum>={quantizer_gptq.MIN_OPTIMUM_VERSION}"


# ---- packages --------------------------------------------------------------------------------------------------------------


def test_what_is_missing_comes_with_the_command_that_installs_it() -> None:
    assert how_to_install(("kernels", "triton")) == ("kernels and triton: pip install 'kernels>=0.18.2,<0.19.0' 'triton>=3.4.0'")
    assert how_to_install(("sinq",)) == "sinq: pip install sinq"
    assert how_to_install(("gptqmodel",), "gptq") == "gptqmodel: pip install fitmatrix[gptq]"


@pytest.mark.parametrize(
    ("there", "lacks"),
    [("0.18.1", True), ("0.18.2", False), ("0.18.10", False), ("0.19", True), ("0.19.0.dev1", True), ("1", True)],
)
def test_a_version_that_transformers_does_not_take_is_as_good_as_none(
    there: str, lacks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "_is_here", lambda _: True)
    monkeypatch.setattr(metadata, "version", lambda _: there)
    assert lacking(("kernels",)) == (("kernels",) if lacks else ())


def test_what_is_here_lacks_nothing() -> None:
    assert lacking(("bitsandbytes", "json")) == ()
    assert lacking(("no_such_module", "optimum.no_such_module")) == ("no_such_module", "optimum.no_such_module")


# ---- what a config says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes_4bit"),
        ({"load_in_8bit": True}, "bitsandbytes_8bit"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"group_size": 64, "bits": 4}, "mlx"),
        ({"quant_algo": "FP8"}, ""),
        ({"quant_method": 7}, ""),
    ],
)
def test_settings_are_taken_as_transformers_takes_them(settings: dict[str, Any], name: str) -> None:
    assert method_name(settings) == name


@ROWS
def test_a_config_writes_what_transformers_calls_the_method(row: Method) -> None:
    from transformers.quantizers.auto import AutoQuantizationConfig
    from transformers.utils.quantization_config import QuantizationMethod

    word = row.written or row.name
    assert word in {one.value for one in QuantizationMethod}
    assert (row.written is None) == (row.name in {one.value for one in QuantizationMethod})
    if row.written is not None:
        said = {"quant_method": word, f"load_in_{row.bits}bit": True}
        assert AutoQuantizationConfig.from_dict(dict(said)).quant_method == word
        assert method_name(said) == row.name


def test_who_has_kernels_is_in_their_tables() -> None:
    those = {name for name, row in METHODS.items() if row.has_kernels}
    assert those == {name for kernel in PACKED_KERNELS for name in kernel.since}
    assert those == {name for kernel in CPU_KERNELS for name in kernel.groups}
    assert {name: METHODS[name].scheme({}).method for name in those} == {name: name for name in those}  # type: ignore[union-attr,misc]


def test_what_is_packed_in_blocks_is_what_optimum_s_quantizer_packs() -> None:
    """transformers hands GPTQ's modules to optimum, and replaces those of AWQ by itself, by `should_convert_module`."""
    by_optimum = {name for name, row in METHODS.items() if "optimum" in row.needs}
    assert {name for name, row in METHODS.items() if row.by_blocks} == by_optimum
    assert "optimum_quantizer" in source_of(METHODS["gptq"], "_process_model_before_weight_loading")
    for row in METHODS.values():
        if row.has_kernels and not row.by_blocks:
            assert "replace_with_awq_linear" in source_of(row, "_process_model_before_weight_loading")


@ROWS
def test_who_counts_by_name_asks_should_convert_module_for_an_element(row: Method) -> None:
    """transformers asks `param_needs_quantization` for each element where a quantizer has a size of its own for it."""
    by_name = row.counted is not None and "should_convert_module(param_name" in source_of(row, "param_needs_quantization")
    assert row.counts_by_name == by_name


NAMES = (
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.10.self_attn.q_proj",
    "lm_head.weight",
    "lm_head",
    "model.embed_tokens.weight",
)
KEPT_OUT = (
    "model.layers.0",
    "model.layers.1",
    "down_proj",
    "lm_head",
    r"model\.layers\.\d+\.mlp",
    "head",
    "weight",
    "model.layers.*.mlp",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", KEPT_OUT)
def test_what_a_config_keeps_out_is_transformers_own(name: str, kept: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert is_converted(name, [kept]) == should_convert_module(name, [kept])


def test_settings_stand_at_the_top_or_at_the_text_model() -> None:
    own = {"quant_method": "fp8"}
    assert settings_of({"quantization_config": own}) == own
    assert settings_of({"text_config": {"quantization_config": own}}) == own
    assert settings_of({"text_config": {"hidden_size": 8}, "quantization_config": {}}) is None
    assert settings_of({"quantization": {"bits": 4, "group_size": 64}}) == {"quant_method": "mlx", "bits": 4, "group_size": 64}
    assert settings_of({"text_config": 7, "quantization": "none"}) is None


@pytest.mark.parametrize("name", [*FOREIGN, "", "bitsandbytes", "somebody-s"])
def test_what_transformers_does_not_know_is_refused_with_a_way_out(name: str) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    why = foreign(name)
    assert name not in AUTO_QUANTIZATION_CONFIG_MAPPING
    assert why is not None
    assert ": " in why
    assert name not in FOREIGN or FOREIGN[name].readers in why


@ROWS
def test_what_transformers_knows_is_not_foreign(row: Method) -> None:
    assert foreign(row.name) is None


def test_rows_of_precisions_that_read_a_method_hold_what_it_holds() -> None:
    stored = {"fp8": "fp8", "mxfp8": "mxfp8", "gptq 4-bit": "gptq", "awq 4-bit": "awq", "gguf": "gguf"}
    for title, name in stored.items():
        precision = row_of(title)
        assert precision is not None
        assert precision.linear_dtype == METHODS[name].held
    assert isinstance(METHODS["mxfp4"].unpacked, Config)
