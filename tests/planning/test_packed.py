"""The packed layers give what their published arithmetic gives, and take what the plan says beside their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch.utils._python_dispatch import TorchDispatchMode

from harness.architecture import model_spec
from harness.catalog import resolve
from harness.checkpoint import quantization
from harness.core.precisions import PRECISIONS
from harness.core.quantizers import UNPACKINGS
from harness.core.records import Workload
from harness.core.units import GIB
from harness.machine.gpus import profile
from harness.models import packed
from harness.models.packed import GroupScaledLinear, RowScaledLinear
from harness.planning.calibration import default
from harness.planning.cost import estimate
from harness.planning.cost.footprint import Footprint
from harness.planning.cost.inventory import Inventory
from harness.planning.cost.speed import seconds, timings_of
from harness.planning.cost.work import count_work

Layer = GroupScaledLinear | RowScaledLinear

# Row of UNPACKINGS -> a layer of so many inputs and outputs as its files have it.
MAKE: dict[str, Callable[[int, int], Layer]] = {
    "chatglm-int8": lambda inputs, outputs: RowScaledLinear(inputs, outputs, 8),
    "chatglm-int4": lambda inputs, outputs: RowScaledLinear(inputs, outputs, 4),
    "gptq-int8": lambda inputs, outputs: GroupScaledLinear(inputs, outputs, 8, 128),
    "gptq-int4": lambda inputs, outputs: GroupScaledLinear(inputs, outputs, 4, 128),
}
# A block takes part of the first, all of the second many times over, and does not divide the third.
SHAPES = [(256, 64), (1024, 4096), (1536, 2080)]
# Of the largest result: as far as the order of a sum may change its last digit.
NEAR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_layer(name: str, inputs: int, outputs: int, *, shuffled: bool = False) -> Layer:
    """Return a layer of random weights; `shuffled`: inputs belong to groups in no order, as with GPTQ's act-order."""
    layer = MAKE[name](inputs, outputs)
    for key, tensor in layer.named_parameters():
        if tensor.dtype.is_floating_point:
            tensor.data = torch.rand(tensor.shape).sub_(0.0 if "scale" in key else 0.5).div_(inputs).half()
        elif key == "g_idx":
            tensor.data = (torch.randperm(inputs) if shuffled else torch.arange(inputs)).div(128, rounding_mode="floor").int()
        else:
            tensor.data.copy_(torch.randint(-(2**31) if tensor.dtype == torch.int32 else -128, 2**31 - 1, tensor.shape))
    return layer.requires_grad_(False)


def published(layer: Layer, dtype: torch.dtype) -> torch.Tensor:
    """Unpack a weight [out, in] as published, number by number, and round it to a dtype."""
    if isinstance(layer, RowScaledLinear):
        whole: torch.Tensor = layer.weight
        if layer.bits == 4:
            whole = torch.stack((whole >> 4, (whole << 4) >> 4), dim=-1).flatten(1)
        return whole.to(dtype) * layer.weight_scale.to(dtype)[:, None]
    shifts = torch.arange(0, 32, layer.bits, dtype=torch.int32)
    fields = ((layer.qweight[:, None] >> shifts[:, None]) & (2**layer.bits - 1)).flatten(0, 1)
    zeros = ((layer.qzeros[:, :, None] >> shifts) & (2**layer.bits - 1)).flatten(1, 2) + 1
    group = layer.g_idx.long()
    unpacked: torch.Tensor = (fields - zeros[group]).to(dtype) * layer.scales.to(dtype)[group]
    return unpacked.T


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_it_gives_what_the_published_arithmetic_gives(name: str, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    layer = random_layer(name, inputs, outputs, shuffled=outputs == 2080).to(dtype)
    for shape in ((1, inputs), (2, 3, inputs)):
        states = torch.randn(shape).to(dtype)
        wanted = torch.nn.functional.linear(states, published(layer, dtype), layer.bias)
        found = layer(states)
        assert found.dtype is dtype
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= NEAR[dtype] * wanted.abs().max()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_its_weights_are_those_of_the_published_arithmetic_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    layer = random_layer(name, 256, 64).to(dtype)
    layer.bias = None
    assert torch.equal(layer(torch.eye(256, dtype=dtype)).T, published(layer, dtype))


@pytest.mark.parametrize("name", MAKE)
def test_what_came_before_it_can_still_be_trained(name: str) -> None:
    """Prompts and adapters are trained in front of packed layers."""
    layer = random_layer(name, 1024, 2080).float()
    states = torch.randn(2, 1024, requires_grad=True)
    layer(states).square().sum().backward()
    again = states.detach().clone().requires_grad_()
    torch.nn.functional.linear(again, published(layer, torch.float32), layer.bias).square().sum().backward()
    assert states.grad is not None
    assert again.grad is not None
    assert torch.allclose(states.grad, again.grad, rtol=1e-4, atol=1e-5 * float(again.grad.abs().max()))


# ---- what it takes beside its weights ----------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most that torch's allocator gave out at once, by its own profiler; None of it may be given back late."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    results: Any = seen.profiler.kineto_results
    given = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for _, size in sorted(given, key=lambda one: one[0]):
        held += size
        most = max(most, held)
    return most


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("tokens", [1, 20])
def test_it_takes_no_more_than_the_plan_says(name: str, tokens: int) -> None:
    """A layer of ChatGLM-6B's qkv: 100 MB in float16, of which no more than blocks are ever there."""
    layer = random_layer(name, 4096, 12288).half()
    states = torch.randn(1, tokens, 4096).half()
    with torch.inference_mode():
        peak = peak_bytes(lambda: layer(states))
    planned = UNPACKINGS[name].temporary_bytes(4096 * 12288, "cpu", tokens)
    sums = tokens * 12288 * (4 + 2 + 2)  # in float32, a part of them, and in float16
    assert 0.6 * planned < peak < 1.1 * planned + sums  # what oneDNN multiplies in 16 bits is there in them as well
    assert peak < 4096 * 12288 * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "native"), [(1, False), (1, True), (20, False), (20, True)])
def test_only_a_prompt_is_multiplied_in_16_bits_and_where_the_processor_can(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int, native: bool
) -> None:
    """torch's own loop for float16 took 8 times as long as float32 for a prompt of 64 tokens."""
    monkeypatch.setattr(packed, "_has_products", lambda _: native)
    found = multiplied(random_layer("gptq-int4", 256, 64).to(dtype), torch.randn(tokens, 256).to(dtype))
    assert found.dtypes == {dtype if native and tokens > 1 else torch.float32}


def test_a_processor_has_products_of_floats_alone() -> None:
    assert not packed._has_products(torch.int8)
    assert not packed._has_products(torch.float32)  # unpacked in it anyway


@pytest.mark.parametrize("name", MAKE)
def test_every_weight_is_unpacked_once_for_a_token(name: str) -> None:
    """What `speed_cost` charges for: weights that are multiplied with, whatever the blocks."""
    assert multiplied(random_layer(name, 1024, 2080).half(), torch.randn(1, 1024).half()).weights == 1024 * 2080


class Multiplied(TorchDispatchMode):
    """Counts the elements of the matrices that a token is multiplied with, and the dtypes that they have."""

    weights = 0
    dtypes: frozenset[torch.dtype] = frozenset()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.weights += args[-1].numel()
            self.dtypes |= {args[-1].dtype}
        return func(*args, **(kwargs or {}))


def multiplied(layer: Layer, states: torch.Tensor) -> Multiplied:
    """Return what a layer multiplies some states with."""
    counter = Multiplied()  # type: ignore[no-untyped-call]  # torch's class
    with torch.no_grad(), counter:
        layer(states)
    return counter


# ---- what the plan says ----------------------------------------------------------------------------------------------------------


def test_every_row_has_constants_of_its_own() -> None:
    names = default().constants.keys()
    for row in UNPACKINGS.values():
        asked = (
            "unpacked_elements_per_core_s",
            "gpu_unpacked_bytes_per_element",
            *(f"{on}_operations_per_linear" for on in ("cpu", "gpu")),
        )
        assert {f"{name}_{row.like}" for name in asked} <= names


def read_by(name: str, ours: bool) -> Footprint:
    """Count MOSS's int4 files for a processor, read by our layers or by gptqmodel."""
    one = model_spec.read_spec(resolve.resolve(name))
    assert one.packed is not None
    assert one.packed.own
    one = one if ours else replace(one, packed=replace(one.packed, name="gptq"))
    row = PRECISIONS["gptq-int4"]
    dtype = row.dtype if ours else "bfloat16"  # in which gptqmodel's kernels for processors are fast
    return Footprint(Inventory(one, estimate.weight_format(row, dtype, one)), "cpu", Workload(prompt_tokens=1), default())


def test_what_our_layers_read_is_planned_by_what_they_take() -> None:
    """A token of MOSS took 7 ns a weight, where the plan said bitsandbytes' 0.04: gptqmodel's layers keep that."""
    here = profile([], ram=64 * GIB)
    found = {ours: read_by("moss-moon-003-sft-int4", ours) for ours in (True, False)}
    counted = {ours: count_work(count, "gptq-int4", here) for ours, count in found.items()}
    assert {ours: work.like for ours, work in counted.items()} == {True: "moss_int4", False: "int4"}
    linears = 34 * (18432 + 6144 + 24576 + 24576) * 6144
    assert {ours: work.anew for ours, work in counted.items()} == {True: linears, False: 0}
    machine = replace(here, cores=2)
    token = {ours: seconds(timings_of(work, found[ours].workload, machine, default())) for ours, work in counted.items()}
    assert 1 / token[True].decode_tok_s.best > linears / (2 * default()["unpacked_elements_per_core_s_moss_int4"].best)
    assert token[True].decode_tok_s.best < token[False].decode_tok_s.best / 10
    halved = seconds(timings_of(counted[True], found[True].workload, replace(here, cores=1), default())).decode_tok_s.best
    assert token[True].decode_tok_s.best / halved == pytest.approx(2, rel=0.1)


def test_no_weight_of_theirs_is_planned_whole() -> None:
    """fc_in of MOSS: 302 MB in float16, and 1.8 GB in the three int32 that it once took."""
    whole, blocks = (read_by("moss-moon-003-sft-int4", ours).terms()["cpu"].activation.best for ours in (False, True))
    assert whole - blocks > 0.9 * 24576 * 6144 * 2


def test_a_quantization_config_is_read_by_a_package_whatever_the_model() -> None:
    config = {"model_type": "moss", "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    of_package, of_moss = quantization.packed(config), quantization.packed({"model_type": "moss", "wbits": 4, "groupsize": 128})
    assert of_package is not None
    assert of_moss is not None
    assert (of_package.own, of_moss.own) == (False, True)
