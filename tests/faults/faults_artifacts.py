"""Artifacts of strangers: archives and results made to hang, to fill the memory or to be believed.

Each is published by the real command beside one honest file, in a process of its own whose time and memory are measured.
"""

from __future__ import annotations

import io
import os
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.core.records import encode_record
from harness.core.units import MIB, format_size
from harness.results import store
from tests.support import builders
from tests.support.reporting import Figure

ROOT = Path(__file__).parents[2]
MUTATED, SEED = 300, 20261129
MOST_S, MOST_BYTES = 10.0, 512 * MIB
NAME = "a/results.jsonl"


def golden() -> list[bytes]:
    return [line.replace(b'"at":"2026', b'"at":"2024') for line in map(encode_record, store.read(builders.GOLDEN)[0])]


def packed(data: bytes, method: int = zipfile.ZIP_DEFLATED, names: int = 1) -> bytes:
    kept = io.BytesIO()
    with zipfile.ZipFile(kept, "w", method) as archive:
        for number in range(names):
            archive.writestr(f"{number}/results.jsonl", data)
    return kept.getvalue()


def overlapping(data: bytes, names: int) -> bytes:
    """One packed file under many names: the directory lists it again and again."""
    alone = packed(data)
    start = alone.rindex(b"PK\x01\x02")
    end = alone.rindex(b"PK\x05\x06")
    entry = alone[start:end]
    directory = entry * names
    return alone[:start] + directory + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, names, names, len(directory), start, 0)


def edited(field: str, value: int) -> bytes:
    """An honest archive that says another size of its file."""
    data = bytearray(packed(golden()[0] + b"\n"))
    at = data.rindex(b"PK\x01\x02") + {"packed": 20, "size": 24, "offset": 42, "method": 10}[field]
    struct.pack_into("<H" if field == "method" else "<I", data, at, value)
    return bytes(data)


ARCHIVES: Mapping[str, Callable[[], bytes]] = {
    "lines that are no results": lambda: packed(b"x\n" * 100_000),
    "empty lines": lambda: packed(b"\n" * 5_000_000),
    "zeros": lambda: packed(bytes(50_000_000)),
    "one endless line": lambda: packed(b'{"schema":1,"x":"' + b"a" * 50_000_000),
    "a line of beginnings": lambda: packed(b'{"schema":' * 500_000),
    "brackets": lambda: packed(b"[" * 1_000_000 + b"\n" + b'{"a":' * 200_000),
    "a long number": lambda: packed(b'{"schema":' + b"9" * 900_000 + b"}\n"),
    "the same result": lambda: packed((golden()[0] + b"\n") * 5_000),
    "many files": lambda: packed(b"x\n", names=3_000),
    "overlapping files": lambda: overlapping(b"\n" * 500_000, 3_000),
    "bzip2": lambda: packed(bytes(50_000_000), zipfile.ZIP_BZIP2),
    "lzma": lambda: packed(bytes(50_000_000), zipfile.ZIP_LZMA),
    "a method of nobody": lambda: edited("method", 97),
    "a size of gigabytes": lambda: edited("size", 0xFFFFFFF0),
    "a size of nothing": lambda: edited("size", 0),
    "a packed size of gigabytes": lambda: edited("packed", 0xFFFFFFF0),
    "an offset beyond the end": lambda: edited("offset", 0x7FFFFFFF),
    "an archive in an archive": lambda: packed(packed(b"x\n" * 1000)),
    "cut short": lambda: packed(b"".join(line + b"\n" for line in golden()))[:-40],
    "nothing": lambda: b"",
    "no archive": lambda: b"PK\x03\x04" + bytes(1000),
}  # fmt: skip
SECRETS = (b"hf_abcDEF0123456789", b"sk_live_51Habcdefghijkl", b"/home/alice/x", b"C:\\\\Users\\\\alice", b"alice@mail.example.org")


class Published(NamedTuple):
    """What became of a place that was published: exit status, words, seconds and the most memory."""

    status: int
    said: str
    seconds: float
    bytes: int


# Seconds of the processor, not of the clock: the machine may be busy.
PUBLISH = """
import resource, sys
from harness.cli.entry import main

status = main(sys.argv[1:])
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print("\\npeak", used[0].ru_maxrss << 10, sum(one.ru_utime + one.ru_stime for one in used))
sys.exit(status)
"""


def publish(place: Path) -> Published:
    command = [sys.executable, "-c", PUBLISH, "publish", str(place), "--to", str(place.with_name(f"{place.name}-site"))]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    peak, seconds = done.stdout.rpartition("peak ")[2].split() if "peak " in done.stdout else ("0", "0")
    return Published(done.returncode, done.stdout + done.stderr, float(seconds), int(peak))


def judged(what: str, found: Mapping[str, Published], figures: list[Figure]) -> list[str]:
    """Count what went wrong; return it in words."""
    broken = [
        f"{name}: {one.status} {one.said[-600:]}"
        for name, one in found.items()
        if "Traceback" in one.said or one.status not in (0, 2)
    ]
    slow, large = max(one.seconds for one in found.values()), max(one.bytes for one in found.values())
    figures += [
        Figure(what=f"{what}: tracebacks and worse", rows=len(found), found=str(len(broken)), wanted="0"),
        Figure(what=f"{what}: slowest", rows=len(found), found=f"{slow:.1f} s", wanted=f"{MOST_S:.0f} s"),
        Figure(what=f"{what}: most memory", rows=len(found), found=format_size(large), wanted=format_size(MOST_BYTES)),
    ]
    too_much = [
        f"{name}: {one.seconds:.1f} s, {one.bytes}" for name, one in found.items() if one.seconds > MOST_S or one.bytes > MOST_BYTES
    ]
    return broken + too_much


def test_archives_of_strangers(tmp_path: Path, figures: list[Figure]) -> None:
    found, silent = {}, []
    for name, make in ARCHIVES.items():
        place = tmp_path / name
        place.mkdir()
        (place / "a.zip").write_bytes(make())
        (place / "honest.zip").write_bytes(packed(golden()[0] + b"\n"))
        found[name] = publish(place)
        if found[name].status != 0:
            silent.append(f"{name}: the honest one beside it is not published: {found[name].said[-300:]}")
    wrong = judged("archives", found, figures)
    figures.append(
        Figure(what="honest archives beside them that are not published", rows=len(found), found=str(len(silent)), wanted="0")
    )
    assert not wrong + silent, "\n".join(wrong + silent)


def test_mutated_results(tmp_path: Path, figures: list[Figure]) -> None:
    """Have lines cut, doubled and mixed with secrets. What is published holds no secret, and every honest result but those
    that a mutated one contradicts: of two that differ and claim to be of the same run neither is published, and both are named.
    """
    lot, lines = random.Random(SEED), golden()
    place = tmp_path / "mutated"
    for number in range(MUTATED):
        line = bytearray(lot.choice(lines))
        for _ in range(lot.choice((1, 1, 3))):
            at = lot.randrange(len(line))
            piece = lot.choice((*SECRETS, b'"', b"\\", b"{", b"\0", b"1e999", b"\xff", lot.randbytes(4)))
            line[at : at + lot.choice((0, 1, 8))] = piece
        (place / str(number)).mkdir(parents=True)
        (place / str(number) / "results.jsonl").write_bytes(bytes(line) + b"\n")
    (place / "honest").mkdir()
    (place / "honest/results.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    found = publish(place)
    wrong = judged("mutated results, all at once", {"mutated": found._replace(seconds=found.seconds / MUTATED)}, figures)
    site = tmp_path / "mutated-site"
    pages = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    # Within a word, where chance put some, a secret is none.
    looks = [re.compile(rb"(?<![\w\\/.-])" + re.escape(secret) + rb"(?!\w)") for secret in SECRETS]
    told = [f"{path}: {look.pattern!r}" for path, data in pages.items() for look in looks if look.search(data)]
    published = {line for path in (site / "raw").iterdir() for line in path.read_bytes().splitlines()}
    absent = {number for number, line in enumerate(lines, 1) if line not in published}
    against = {int(number) for number in re.findall(r"honest/results\.jsonl:(\d+): contradicts ", found.said)}
    figures += [
        Figure(what="mutated results: secrets on the site", rows=MUTATED, found=str(len(told)), wanted="0"),
        Figure(
            what="honest results refused, as a mutated one contradicts them",
            rows=len(lines),
            found=str(len(against)),
            wanted="",
        ),
        Figure(what="other honest results lost", rows=len(lines), found=str(len(absent - against)), wanted="0"),
    ]
    assert not wrong + told, "\n".join(wrong + told)
    assert absent == against


@pytest.mark.parametrize("name", ["lines that are no results"])
def test_what_is_small_is_small(name: str) -> None:
    assert len(ARCHIVES[name]()) < 1000
