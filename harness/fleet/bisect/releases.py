"""The releases of a package between two of them, as pip finds them here: in its index, or in a directory of wheels alone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import InvalidName, canonicalize_name
from packaging.version import InvalidVersion, Version

from harness.core.errors import UsageError
from harness.core.records import Record

# The line of `pip index versions` that lists them: the pip of a new environment of Python 3.11 has no --json for it.
_AVAILABLE = re.compile(r"^Available versions: (.+)$", re.M)


class ReleaseRange(Record, frozen=True, kw_only=True):
    """Releases in order, from the good one to the bad one, and the pre-releases among them that are left out."""

    package: str
    releases: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def releases_between(package: str, good: str, bad: str, wheels: Path | None = None) -> ReleaseRange:
    """Return the releases of a package for this Python from `good` to `bad`, whichever of them is the newer one.

    Those that were yanked pip itself leaves out. `wheels` is a directory, which is then asked instead of the index.

    Raises:
        UsageError: this is no name of a package, or pip finds no releases of it, or not these two.
    """
    try:
        canonicalize_name(package, validate=True)
    except InvalidName:
        raise UsageError(f"--package {package!r}: is no name of a package; write one such as transformers") from None
    found = sorted(map(Version, _listed(package, wheels)))
    final = [one for one in found if not one.is_prerelease]
    first, last = (_known(flag, text, package, final) for flag, text in (("--good", good), ("--bad", bad)))
    if first == last:
        raise UsageError(f"--good {good} and --bad {bad} are one release of {package}: nothing changed between them; name two")
    low, high = min(first, last), max(first, last)
    within = [str(one) for one in final if low <= one <= high]
    return ReleaseRange(
        package=package,
        releases=tuple(within if first < last else within[::-1]),
        left_out=tuple(str(one) for one in found if one.is_prerelease and low < one < high),
    )


def _listed(package: str, wheels: Path | None) -> list[str]:
    if wheels is not None and not wheels.is_dir():
        raise UsageError(f"--find-links {wheels}: there is no such directory; name one with wheels of {package}")
    where = ["--no-index", "--find-links", str(wheels)] if wheels else []
    command = [sys.executable, "-m", "pip", "index", "versions", package, "--pre", *where]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise UsageError(f"--package {package}: pip lists no releases of it ({said[-1]}); check the name, and pip config list")
    found = _AVAILABLE.search(done.stdout)
    return found[1].split(", ") if found else []


def _known(flag: str, text: str, package: str, known: Sequence[Version]) -> Version:
    try:
        asked = Version(text)
    except InvalidVersion:
        raise UsageError(f"{flag} {text!r}: is no version; write one such as {known[-1] if known else '1.0'}") from None
    if asked in known:
        return asked
    near = [*[one for one in known if one < asked][-1:], *[one for one in known if one > asked][:1]]
    if not near:
        raise UsageError(f"--package {package}: has no release but pre-releases; name another package")
    raise UsageError(
        f"{flag} {text}: is no release of {package} that pip installs here (pre-releases and yanked ones do not count); "
        f"next to it {'are' if len(near) > 1 else 'is'} {' and '.join(map(str, near))}"
    )
