"""A device map of the user's own: read from JSON and TOML, checked, planned, loaded, and found where it says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from harness.architecture import model_spec, skeleton_source
from harness.checkpoint import reader
from harness.core.errors import UsageError
from harness.core.records import Loaded, Machine, Plan, Verdict
from harness.measure import verify
from harness.measure.protocol import Load
from harness.planning.device_map import user_map
from harness.planning.device_map.infer import Device
from harness.planning.planner import Planner
from harness.worker import model as work
from tests.support import small_models
from tests.support.builders import case, gpu, machine

MODEL = skeleton_source.named("qwen2.5-0.5b-instruct")  # tied, 24 blocks
TINY = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "lm_head": "cpu"}


def write(folder: Path, text: str, name: str = "map.json") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


# Reading


def test_json_and_toml_say_the_same(tmp_path: Path) -> None:
    expected = {"model.embed_tokens": 0, "model.layers.0": 1, "model.layers.1": 1, "model.norm": "cpu", "lm_head": "disk"}
    text = (
        '{"model.embed_tokens": 0, "model.layers.0": "cuda:1", "model.layers.1": "gpu:1", "model.norm": "cpu", "lm_head": "disk"}'
    )
    assert user_map.read(write(tmp_path, text)) == expected
    toml = 'lm_head = "disk"\n[model]\nembed_tokens = 0\n"layers.0" = "cuda:1"\nlayers.1 = 1\nnorm = "cpu"\n'
    assert user_map.read(write(tmp_path, toml, "map.toml")) == expected
    for mark in ("", "\ufeff"):  # which editors of Windows put before it
        assert user_map.read(write(tmp_path, mark + '"" = "cpu"', "all.toml")) == {"": "cpu"}
        assert user_map.read(write(tmp_path, mark + '{"": "cpu"}')) == {"": "cpu"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "not a map such as"),
        ("{}", "not a map such as"),
        ('{"a": "cpu", "a": 0}', "'a' is there twice"),
        ('{"a.b": "cpu", "a": {"b": 0}}', "'a.b' is there twice"),
        ('{"a": "gpu"}', '\'a\' is on \'gpu\', which is no device: write "cpu", "disk", 0 or "cuda:0"'),
        ('{"a": -1}', "'a' is on -1, which is no device"),
        ('{"a": true}', "'a' is on True, which is no device"),
        ('{"a": 1.0}', "'a' is on 1.0, which is no device"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "is not JSON"),
        ('{"a": 10000}', "'a' is on 10000, which is no device"),
        ('{"a": "cuda:' + "1" * 5000 + '"}', "which is no device"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "more than a device map can need"),
    ],
)
def test_what_is_no_map_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as error:
        user_map.read(write(tmp_path, text))
    assert str(error.value).startswith(f"--device-map {tmp_path / 'map.json'}")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        user_map.read(tmp_path / "nowhere.json")
    with pytest.raises(UsageError, match="is not TOML"):
        user_map.read(write(tmp_path, "= 1", "map.toml"))
    for text in (f"a = 0x{'f' * 5000}", "a." * 5000 + "a = 0"):  # longer than Python writes, and deeper than it calls
        with pytest.raises(UsageError, match="is not TOML"):
            user_map.read(write(tmp_path, text, "map.toml"))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UsageError, match="is not JSON"):
        user_map.read(tmp_path / "bytes.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("what", ["pipe", "device", "sparse"])
def test_a_map_that_never_ends_or_never_begins_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "map.json"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(3 << 30)
    said = "more than a device map can need" if what == "sparse" else "it is no regular file"
    with pytest.raises(UsageError, match=said):
        user_map.read(path)


# Checking

BLOCKS: dict[str, Device] = {f"model.layers.{number}": "cpu" for number in range(24)}
WHOLE: dict[str, Device] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", **BLOCKS}


@pytest.mark.parametrize("good", [WHOLE, {"": 0}, {"model": "cpu", "lm_head": "cpu"}, {**WHOLE, "model.rotary_emb": 0}])
def test_a_map_that_places_every_tensor_once_is_good(good: dict[str, Device]) -> None:
    user_map.check_map(good, MODEL, 1, model="m")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({**WHOLE, "model.norm": 1}, "'model.norm' is on GPU 1, and the only GPU is 0"),
        ({**WHOLE, "model.layer.3": "cpu"}, "no module 'model.layer.3': did you mean 'model.layers.3'"),
        ({"": "cpu", "lm_head": "cpu"}, "'lm_head' lies inside 'the whole model', which is placed as well"),
        ({"model": "cpu", **WHOLE}, "'model.embed_tokens' lies inside 'model', which is placed as well"),
        (
            {**{name: place for name, place in WHOLE.items() if name != "model.layers.3"}, "model.layers.3.mlp": "cpu"},
            "'model.layers.3.mlp' lies inside 'model.layers.3', which is kept on one device (Qwen2DecoderLayer)",
        ),
        ({"model.embed_tokens": "cpu", "lm_head": "cpu", **BLOCKS}, "it does not place model.norm"),
        ({"model.norm": "cpu"}, "it places neither model.embed_tokens nor model.layers.0 nor model.layers.1 and 23 more"),
        ({**WHOLE, "lm_head": "disk"}, "lm_head.weight and model.embed_tokens.weight are one tensor, and lie on disk and cpu"),
    ],
)
def test_a_map_that_does_not_fit_says_which_module(wrong: dict[str, Device], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"the device map does not fit m: {said}")):
        user_map.check_map(wrong, MODEL, 1, model="m")


# Planning and loading


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llama"
    small_models.save("llama", directory)
    return directory


@pytest.fixture(scope="module")
def llama_bin(llama: Path) -> Path:
    """The same in torch's old format."""
    directory = llama.with_name("llama-bin")
    shutil.copytree(llama, directory)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def planned(directory: Path, device_map: dict[str, Device], precision: str = "bf16", on: Machine | None = None) -> Plan:
    spec = model_spec.of_checkpoint("tiny", str(directory), reader.read(directory), directory)
    on = on or machine()
    user_map.check_map(device_map, spec.skeleton, len(on.gpus), model="tiny")
    return Planner(spec, on, device_map=device_map).plan(case(precision, "file"))


def load(directory: Path, plan: Plan, place: Path) -> Loaded:
    """Load by the plan's code in an empty folder."""
    assert plan.code is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        loaded, _ = work.load(Load(model=str(directory), code=plan.code, tokenizer=False), lambda _: contextlib.nullcontext())
        ids = torch.tensor([[1, 2, 3]])
        loaded.module.generate(ids, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
        return work.loaded_facts(loaded)


@pytest.mark.parametrize("form", ["llama", "llama_bin"])
def test_what_is_loaded_lies_where_the_map_says(form: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    directory = request.getfixturevalue(form)
    plan = planned(directory, dict(TINY))
    found = load(directory, plan, tmp_path)
    assert plan.verdict is Verdict.FITS
    assert plan.device_map == TINY
    assert f"device_map={json.dumps(TINY)}" in str(plan.code)
    assert set(verify.checks(plan, found).values()) == {verify.OK}
    assert plan.estimate is not None
    written = sum(path.stat().st_size for path in (tmp_path / "offload").rglob("*") if path.is_file())
    assert plan.estimate.tiers["disk"].needed_bytes == pytest.approx(written, rel=0.02)
    assert (written > 0) == (form == "llama_bin")
    assert {name: plan.estimate.tiers[name].weights_bytes for name in ("cpu", "disk")} == pytest.approx(found.tier_bytes, rel=0.001)


def test_a_map_that_was_not_obeyed_is_seen(llama: Path, tmp_path: Path) -> None:
    found = load(llama, planned(llama, {"": "cpu"}), tmp_path)
    assert verify.checks(planned(llama, dict(TINY)), found)["placement"] == (
        "1 of 5 entries of the device map were not obeyed: model.layers.1 is on cpu"
    )


# bitsandbytes with parts off the GPU

HALF: dict[str, Device] = {**TINY, "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu"}


def weights(plan: Plan, *tiers: str) -> int:
    assert plan.estimate is not None
    return sum(plan.estimate.tiers[name].weights_bytes for name in tiers or ("gpu:0", "cpu", "disk") if name in plan.estimate.tiers)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_a_map_has_off_the_gpu_is_not_quantized(precision: str, llama: Path) -> None:
    on = machine(gpu())
    plan, all_of_it = planned(llama, HALF, precision, on), planned(llama, {"": 0}, precision, on)
    plain = planned(llama, {"": 0}, "fp16", on)
    assert plan.verdict is Verdict.FITS
    assert '"llm_int8_enable_fp32_cpu_offload": True' in str(plan.code)
    assert "offload" not in str(all_of_it.code)
    saved = weights(plain) - weights(all_of_it)
    assert weights(plain) - weights(plan) == pytest.approx(saved / 2, rel=0.001)  # one block of two
    assert weights(plan, "cpu") > 0


def test_without_a_gpu_nothing_would_be_quantized_so_it_is_refused(llama: Path) -> None:
    """That is what transformers does with a map of RAM and disk: see the test below."""
    plan = planned(llama, dict(TINY), "int8")
    assert plan.verdict is Verdict.INVALID
    assert str(plan.why).startswith("transformers leaves parts of a bitsandbytes model")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_transformers_leaves_alone_what_an_explicit_map_has_off_the_gpu(precision: str, llama: Path, tmp_path: Path) -> None:
    """The switch that the plan's code sets, tried where there is no GPU: all of it is off the GPU."""
    plan = planned(llama, HALF, precision, machine(gpu()))
    code = str(plan.code).replace(": 0", ': "cpu"')
    found = load(llama, replace(plan, code=code), tmp_path)
    assert not {"int8", "nf4"} & found.linear_dtype_bytes.keys()
    usual = load(llama, planned(llama, {"": "cpu"}, precision), tmp_path)
    assert {"int8", "nf4"} & usual.linear_dtype_bytes.keys()


def test_a_divided_case_passes_if_the_gpu_holds_what_it_asks_for(llama: Path) -> None:
    plan = planned(llama, HALF, "int8", machine(gpu()))
    homes = {name: str(place) for name, place in HALF.items()}
    mixed = Loaded(
        model_class="L",
        dtype_bytes={"int8": 5, "float16": 9},
        linear_dtype_bytes={"int8": 5, "float16": 9},
        tier_bytes={"gpu:0": 5, "cpu": 9},
        device_map=homes,
    )
    assert set(verify.checks(plan, mixed).values()) == {verify.OK}
    plain = replace(mixed, linear_dtype_bytes={"float16": 14})
    assert verify.checks(plan, plain)["precision"].startswith("int8 did not take effect")
