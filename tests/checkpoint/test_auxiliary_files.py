"""The files beside the weights: the code that they name is known, and nothing without bound or from elsewhere passes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.architecture import model_spec, skeleton_source
from harness.catalog.shipped import catalog
from harness.checkpoint import auxiliary_files, reader
from harness.checkpoint.auxiliary_files import RemoteCode, remote_code
from harness.checkpoint.formats.files import Directory
from harness.core.errors import CheckpointError
from harness.core.records import Verdict
from harness.planning.planner import Planner
from tests.support import builders
from tests.support.checkpoint_files import write_safetensors
from tests.support.packed_files import write_hollow
from tests.support.strangers import change

LLAMA = next(entry.config for name, entry in catalog().items() if name.endswith("SmolLM2-135M-Instruct"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a config and a tensor."""
    made = tmp_path / "model"
    made.mkdir()
    change(made / "config.json", LLAMA)
    write_safetensors(made / "model.safetensors", {"w": (2, 2)})
    return made


def found(folder: Path) -> list[tuple[str, str, str]]:
    return [(code.kind, code.file, code.name) for code in reader.read(folder).remote_code]


def test_a_plain_model_asks_for_no_code(folder: Path) -> None:
    change(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ 1 }}"})
    assert found(folder) == []


@pytest.mark.parametrize(
    ("file", "changes", "code"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "a.C"}}, ("model", "config.json", "a.C")),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "who/what--a.M"}}, ("model", "config.json", "who/what--a.M")),
        ("config.json", {"auto_map": {"AutoTokenizer": [None, "t.T"]}}, ("tokenizer", "config.json", "t.T")),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["t.T", None]}}, ("tokenizer", "tokenizer_config.json", "t.T")),
        ("tokenizer_config.json", {"auto_map": ["t.T", None]}, ("tokenizer", "tokenizer_config.json", "t.T")),
        ("config.json", {"attn_implementation": "who/kernel"}, ("kernel", "config.json", "who/kernel")),
        ("config.json", {"_attn_implementation": {"text_config": "who/k:f"}}, ("kernel", "config.json", "who/k:f")),
        ("config.json", {"text_config": {"experts_implementation": "who/k"}}, ("kernel", "config.json", "who/k")),
    ],
)
def test_what_a_file_asks_for_is_named(folder: Path, file: str, changes: Mapping[str, Any], code: tuple[str, str, str]) -> None:
    change(folder / file, changes)
    assert found(folder) == [code]


def test_a_generate_of_its_own_is_named(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / auxiliary_files.CUSTOM_GENERATE).write_text("print(1)")
    assert [code.kind for code in reader.read(folder).remote_code] == ["generate"]


@pytest.mark.parametrize("value", [[], {}, {"AutoConfig": "x"}, {"AutoTokenizer": {"a": "b"}}, [[]], "x" * 100_000])
def test_any_auto_map_is_survived(folder: Path, value: object) -> None:
    for file in ("config.json", "tokenizer_config.json"):
        change(folder / file, {"auto_map": value, "attn_implementation": value})
    assert all(len(code.name) < 130 for code in reader.read(folder).remote_code)


@pytest.mark.parametrize("value", [None, 1, False, float("nan")])
def test_an_auto_map_that_nothing_can_be_looked_up_in_is_refused(folder: Path, value: object) -> None:
    """transformers looks for AutoConfig in whatever stands there, and ends in an error of Python."""
    change(folder / "config.json", {"auto_map": value})
    with pytest.raises(CheckpointError, match=r"gives 'auto_map' as \w+; it must be a table of classes"):
        reader.read(folder)


@pytest.mark.parametrize(
    ("kind", "without_class", "with_class"),
    [("model", True, False), ("tokenizer", True, False), ("generate", False, False), ("kernel", True, True)],
)
def test_what_is_needed(kind: str, without_class: bool, with_class: bool) -> None:
    code = RemoteCode(kind=kind, file="f", name="n")
    assert (code.needed(False), code.needed(True)) == (without_class, with_class)


def planned(folder: Path, *, trust: bool = False) -> Any:
    spec = model_spec.of_checkpoint("tiny", "tiny", reader.read(folder), folder)
    return Planner(spec, builders.machine(), trust=trust).plan(builders.case())


@pytest.fixture
def real(folder: Path) -> Path:
    """The same with all the tensors that the config describes, shapes alone."""
    shape = skeleton_source.shipped(LLAMA)
    assert shape is not None
    saved = [weight for weight in shape.weights if not weight.tied_to and weight.tensor.kind != "unsaved"]
    write_hollow(folder / "model.safetensors", {weight.path: ("BF16", weight.tensor.shape) for weight in saved})
    return folder


def test_code_that_transformers_has_itself_is_not_needed_and_refused_by_name(real: Path) -> None:
    assert "trust_remote_code" not in planned(real).code
    change(real / "config.json", {"auto_map": {"AutoConfig": "a.C", "AutoModelForCausalLM": "a.M"}})
    one = planned(real)
    assert one.verdict is Verdict.FITS
    assert "trust_remote_code=False" in one.code
    trusted = planned(real, trust=True)
    assert "trust_remote_code=True" in trusted.code
    assert (trusted.remote_code, trusted.trusted) == (["a.C (config.json)", "a.M (config.json)"], True)


@pytest.mark.parametrize("name", ["THUDM/chatglm-6b", "THUDM/chatglm2-6b", "fnlp/moss-moon-003-sft"])
def test_architectures_of_our_own_need_no_code(name: str) -> None:
    config = {**catalog()[name].config, "auto_map": {"AutoConfig": "a.C", "AutoModel": "a.M"}}
    shape = skeleton_source.shipped(config)
    assert shape is not None
    held = reader.FileInfo(name="model.safetensors", bytes=1, format="safetensors")
    tensors = tuple(
        reader.StoredTensor(name=weight.path, dtype="float16", shape=weight.tensor.shape, bytes=1, file=held.name)
        for weight in shape.weights
    )
    code = remote_code(Empty(), config)
    read = reader.Checkpoint(path=name, config=config, tensors=tensors, files=(held,), remote_code=code)
    spec = model_spec.of_checkpoint("tiny", name, read, None)
    assert [code.needed(spec.has_class) for code in spec.remote_code] == [False]


class Empty(Directory):
    """A directory without files."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere/at/all"))


def test_a_kernel_of_the_hub_is_code(real: Path) -> None:
    change(real / "config.json", {"attn_implementation": "who/kernel"})
    one = planned(real)
    assert one.verdict is Verdict.INVALID
    assert one.code is None
    assert one.why == (
        "config.json asks for code of the model's own, 'who/kernel', which nothing loads without: "
        "read it and, if you trust it, add --trust-remote-code"
    )


# Bounds


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        auxiliary_files.check_files(Directory(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "vocab.json",
        "vocab.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "x.tiktoken",
        "additional_chat_templates/tool_use.jinja",
    ],
)
def test_text_is_bounded_in_size(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate(auxiliary_files.MOST_TEXT_BYTES + 1)
    assert "is the most" in refused(folder)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", "[" * 100_000 + "]" * 100_000, "nested too deep"),
        ("tokenizer_config.json", "[" * 100_000 + "]" * 100_000, "cannot be understood as JSON"),
        ("generation_config.json", '{"a": ' + "[" * 80 + "]" * 80 + "}", "nested more than"),
        ("tokenizer.json", "[" + "0," * 9_000_000 + "0]", "values"),
        ("tokenizer.json", '{"a": tru}', "cannot be understood as JSON"),
        ("tokenizer.json", '{"a": true}', "is no tokenizer (Object missing required field `model`): download it again, or take"),
        ("generation_config.json", "[1]", "not an object"),
    ],
)
def test_text_is_bounded_in_depth_and_values(folder: Path, name: str, text: str, said: str) -> None:
    (folder / name).write_text(text)
    assert said in refused(folder)


def test_a_template_is_no_link_to_elsewhere(folder: Path) -> None:
    (folder / auxiliary_files.TEMPLATES).mkdir()
    (folder / auxiliary_files.TEMPLATES / "tool_use.jinja").symlink_to("/etc/passwd")
    assert "is a link to a place outside its directory" in refused(folder)


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    change(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "who/what"})
    assert "an adapter on top of the weights, or another model" in refused(folder)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "another.index.json"])
@pytest.mark.parametrize("shard", ["/etc/passwd", "../secret.bin", "a/../../secret.bin", "C:\\secret.bin", "out.safetensors"])
def test_no_index_leads_out_of_the_directory(folder: Path, index: str, shard: str) -> None:
    (folder.parent / "secret.bin").write_text("secret")
    (folder / "out.safetensors").symlink_to(folder.parent / "secret.bin")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {"w": shard}}))
    assert "outside its directory" in refused(folder)


@pytest.mark.parametrize("where", ["absolute", "relative", "from anywhere"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json", "generation_config.json", "special_tokens_map.json"])
def test_no_config_names_a_file_of_this_machine(folder: Path, file: str, where: str) -> None:
    secret = folder.parent / "secret.txt"
    secret.write_text("secret")
    path = {"absolute": str(secret), "relative": "../secret.txt", "from anywhere": f"../../../../../..{secret}"}[where]
    change(folder / file, {"a": [{"vocab_file": path}]})
    assert "outside its directory" in refused(folder)


def test_paths_that_lead_nowhere_or_stay_inside_are_left_alone(folder: Path) -> None:
    (folder / "vocab.txt").write_text("a\nb\n")
    paths = {
        "tokenizer_file": "/somebody/else/tokenizer.json",
        "special_tokens_map_file": "../x/map.json",
        "vocab_file": "./vocab.txt",
    }
    change(folder / "tokenizer_config.json", {**paths, "name_or_path": str(folder.parent), "chat_template": "/{{ a }}\0"})
    auxiliary_files.check_files(Directory(folder))


def test_so_many_paths_are_no_config(folder: Path) -> None:
    change(folder / "tokenizer_config.json", {"a": [f"/{number}" for number in range(2000)]})
    assert "names 2,000 paths" in refused(folder)


def test_text_is_no_link_to_elsewhere_and_weights_may_be(folder: Path) -> None:
    for name in ("elsewhere.safetensors", "elsewhere.txt"):
        (folder.parent / name).write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")
    auxiliary_files.check_files(Directory(folder))
    (folder / "vocab.txt").symlink_to(folder.parent / "elsewhere.txt")
    assert "is a link to a place outside its directory" in refused(folder)


def test_the_links_of_a_hub_cache_stay_inside(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots/abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    files = {
        "config.json": json.dumps(LLAMA),
        "tokenizer.json": '{"model": {}}',
        "model.safetensors.index.json": '{"metadata": {}, "weight_map": {"w": "a.safetensors"}}',
    }
    for number, (name, text) in enumerate(files.items()):
        (blobs / str(number)).write_text(text)
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    write_safetensors(blobs / "w", {"w": (2, 2)})
    (snapshot / "a.safetensors").symlink_to("../../blobs/w")
    auxiliary_files.check_files(Directory(snapshot))
    assert reader.read(snapshot).tensors[0].name == "w"
    assert remote_code(Directory(snapshot), {}) == ()
