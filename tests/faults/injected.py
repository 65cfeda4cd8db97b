"""One call of the system made to fail, by strace: which calls of a command touch its files, and what became of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HUNG_S = 180.0
# How each call can fail: errno(3), and open(2), read(2), write(2), rename(2), fsync(2), close(2), flock(2), mkdir(2), unlink(2).
FAILURES: Mapping[str, tuple[str, ...]] = {
    "openat": ("ENOSPC", "EIO", "EACCES", "EROFS", "EMFILE", "ENFILE", "EDQUOT", "ENOMEM"),
    "read": ("EIO", "ENOMEM", "ESTALE"),
    "pread64": ("EIO", "ESTALE"),
    "write": ("ENOSPC", "EIO", "EDQUOT", "EFBIG"),
    "rename": ("ENOSPC", "EIO", "EACCES", "EROFS", "EDQUOT", "EXDEV"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT", "EROFS"),
    "ftruncate": ("EIO", "EACCES"),
    "mkdir": ("ENOSPC", "EIO", "EACCES", "EROFS", "EDQUOT", "EMLINK"),
    "unlink": ("EIO", "EACCES", "EROFS", "EBUSY"),
    "rmdir": ("EIO", "EACCES", "EBUSY"),
    "newfstatat": ("EIO", "EACCES", "ESTALE"),
    "fstat": ("EIO", "ESTALE"),
    "getdents64": ("EIO", "ESTALE"),
    "lseek": ("EIO",),
    "flock": ("EIO", "ENOLCK"),
    "close": ("EIO", "ENOSPC", "EDQUOT"),
    "readlink": ("EIO", "EACCES"),
    "chmod": ("EIO", "EACCES", "EROFS"),
    "statfs": ("EIO", "EACCES"),
}
_CALL = re.compile(r"(\w+)\((.*)")
_HIT = "(INJECTED)"


class Injection(NamedTuple):
    """The `when`-th call of this name fails with this error; `path` is what the survey saw it touch."""

    call: str
    when: int
    error: str
    path: str

    def __str__(self) -> str:
        return f"{self.call} {self.when} of {self.path}: {self.error}"


class Ended(NamedTuple):
    """What came of a command; `line` is strace's of the call that failed, empty if none did."""

    status: int
    output: str
    line: str
    hung: bool


class Command(NamedTuple):
    """A command in a folder of its own, and which of the calls it makes are to fail: those whose line says `mine`."""

    words: Sequence[str]
    mine: Callable[[str], bool]


def environment(folder: Path) -> dict[str, str]:
    """Keep all that a command touches within its folder: home, cache and temporary files."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "FITMATRIX_", "XDG_"))}
    ours = {"HOME": folder / "home", "FITMATRIX_CACHE": folder / "cache", "TMPDIR": folder / "t", "HF_HOME": folder / "hf"}
    fixed = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return kept | {name: str(place) for name, place in ours.items()} | fixed | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def strace(folder: Path, command: Command, *words: str) -> Ended:
    """Run a command under strace, its first thread alone, which is the one that writes."""
    log = folder.with_suffix(".strace")
    traced = ["strace", "-qq", "-y", "-s", "0", "-o", str(log), *words, sys.executable, *command.words]
    process = subprocess.Popen(
        traced,
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    hung = False
    try:
        output = process.communicate(timeout=HUNG_S)[0]
    except subprocess.TimeoutExpired:
        hung = True
        process.kill()
        output = process.communicate()[0]
    lines = log.read_text(errors="replace").splitlines()
    log.unlink()
    hits = "\n".join(line for line in lines if line.endswith(_HIT)) if any(word.startswith("inject") for word in words) else ""
    return Ended(process.returncode, output, hits or "\n".join(lines), hung)


def survey(folder: Path, command: Command) -> tuple[Ended, list[Injection]]:
    """Run a command undisturbed; return how it ended, and all failures of its calls that touch its files."""
    ended = strace(folder, command, "-e", f"trace={','.join(FAILURES)}")
    seen: dict[str, int] = {}
    found = []
    for line in ended.line.splitlines():
        if not (call := _CALL.match(line)):
            continue
        name = call[1]
        seen[name] = seen.get(name, 0) + 1
        if command.mine(call[2]):
            path = call[2].replace(str(folder), "")[:90]
            found += [Injection(name, seen[name], error, path) for error in FAILURES[name]]
    return ended, found


def inject(folder: Path, command: Command, one: Injection) -> Ended:
    """Run a command with one failure; `line` is empty if it hit nothing of the command's own."""
    how = ("-e", f"trace={one.call}", "-e", f"inject={one.call}:error={one.error}:when={one.when}")
    ended = strace(folder, command, *how)
    mine = ended.line.endswith(_HIT) and command.mine(ended.line)
    return ended if mine else ended._replace(line="")


def fresh(template: Path, place: Path) -> Path:
    """Copy a folder that is ready to be used, in place of what is left of the last."""
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(template, place, symlinks=True))
