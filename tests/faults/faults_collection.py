"""A collection that reads what it should not.

`pytest cases/ --collect-only` names, beside an honest model, directories whose config, index, weights or tokenizer are a pipe, a
device, gigabytes of nothing, a circle of links or no text. It ends, in bounded time and memory, with the honest model's cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.core.units import GIB, MIB, format_size
from tests.faults.faults_files import save_one, save_shards
from tests.support.reporting import Figure

ROOT = Path(__file__).parents[2]
MOST_S, MOST_BYTES = 10.0, 300 * MIB
FILES = ("config.json", "model.safetensors.index.json", "a.safetensors", "tokenizer_config.json", "generation_config.json")


def pipe(file: Path) -> None:
    os.mkfifo(file)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def terminal(file: Path) -> None:
    file.symlink_to("/dev/tty")


def gigabytes(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(3 * GIB)


def gigabytes_of_json(file: Path) -> None:
    with file.open("wb") as stream:
        stream.write(b'{"model_type": "llama"')
        stream.seek(3 * GIB)
        stream.write(b"}")


def circle(file: Path) -> None:
    file.symlink_to(file)


def to_nowhere(file: Path) -> None:
    file.symlink_to("/nonexistent/file")


def directory(file: Path) -> None:
    file.mkdir()


def no_text(file: Path) -> None:
    file.write_bytes(bytes(range(255)))


def nothing(file: Path) -> None:
    file.write_bytes(b"")


def deep(file: Path) -> None:
    file.write_text("[" * 1_000_000)


def long_list(file: Path) -> None:
    file.write_text(json.dumps({"weight_map": {f"t{number}": f"{number}.safetensors" for number in range(200_000)}}))


def long_number(file: Path) -> None:
    file.write_text('{"model_type": "llama", "hidden_size": ' + "9" * 1_000_000 + "}")


def memory_of_a_process(file: Path) -> None:
    file.symlink_to("/proc/self/mem")


WAYS: Mapping[str, Callable[[Path], None]] = {
    way.__name__.replace("_", " "): way
    for way in (
        pipe, device, terminal, gigabytes, gigabytes_of_json, circle, to_nowhere, directory, no_text, nothing, deep, long_list,
        long_number, memory_of_a_process,
    )
}  # fmt: skip

# Seconds of the processor, not of the clock: the machine may be busy. No torch: a collection needs none.
COLLECT = """
import resource, sys
import pytest

sys.modules["torch"] = sys.modules["transformers"] = None
status = int(pytest.main(["cases/", "--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
used = resource.getrusage(resource.RUSAGE_SELF)
print("\\npeak", used.ru_maxrss << 10, used.ru_utime + used.ru_stime)
sys.exit(status)
"""


class Collection(NamedTuple):
    """How one ended: exit status, words, seconds of the processor and the most memory."""

    status: int
    said: str
    seconds: float
    bytes: int


def collect(*models: Path) -> Collection:
    words = [word for model in models for word in ("--model", str(model))]
    command = [sys.executable, "-c", COLLECT, *words]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False)
    peak, seconds = done.stdout.rpartition("peak ")[2].split() if "peak " in done.stdout else ("0", "0")
    return Collection(done.returncode, done.stdout + done.stderr, float(seconds), int(peak))


def test_what_lies_in_a_model_s_directory(tmp_path: Path, figures: list[Figure]) -> None:
    honest = save_one(tmp_path / "honest")
    plain = collect(honest)
    assert plain.status == 0, plain.said
    found: dict[str, Collection] = {}
    for way, make in WAYS.items():
        folders = [save_shards(tmp_path / f"{way} as {file}".replace(" ", "-")) for file in FILES]
        for folder, file in zip(folders, FILES, strict=True):
            (folder / file).unlink()
            make(folder / file)
        found[way] = collect(honest, *folders)
    broken = [f"{name}: {one.status} {one.said[-1500:]}" for name, one in found.items() if not is_told(one)]
    lost = [name for name, one in found.items() if "honest/bf16/cpu" not in one.said]
    slow, large = max(one.seconds - plain.seconds for one in found.values()), max(one.bytes - plain.bytes for one in found.values())
    rows = len(found) * len(FILES)
    figures += [
        Figure(what="tracebacks, hangs and endings of no kind", rows=rows, found=str(len(broken)), wanted="0"),
        Figure(what="collections without the honest model's cases", rows=rows, found=str(len(lost)), wanted="0"),
        Figure(what="more time than for the honest one, at most", rows=rows, found=f"{slow:.1f} s", wanted=f"{MOST_S:.0f} s"),
        Figure(what="more memory, at most", rows=rows, found=format_size(large), wanted=format_size(MOST_BYTES)),
    ]
    assert not broken, "\n\n".join(broken)
    assert not lost, "\n\n".join(f"{name}: {found[name].said[-800:]}" for name in lost)
    assert slow < MOST_S
    assert large < MOST_BYTES


def is_told(one: Collection) -> bool:
    """Say whether a collection went through: what is wrong with a model is said when it is fetched."""
    ended = (pytest.ExitCode.OK, pytest.ExitCode.USAGE_ERROR)
    return one.status in ended and "Traceback" not in one.said and "INTERNALERROR" not in one.said and one.bytes > 0
