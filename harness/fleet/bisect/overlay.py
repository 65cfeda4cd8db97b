"""An environment with one release of a package, made by uv over the environment that runs.

Only that release and what it needs anew are in it; everything else, torch above all, is that of the environment that runs, so that
two such environments differ in the package under test and its requirements alone. uv links files from its cache, and reads where
packages come from in pip's configuration, so that both look in the same place.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import site
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import harness
from harness.core.errors import UsageError
from harness.core.records import Record
from harness.machine.scratch import Scratch


class NotInstallable(Exception):
    """A release does not go into the environment; the text is why, in uv's words."""


class _Setting(Record, frozen=True, kw_only=True):
    """What a setting of pip is called by uv: a variable, and what stands between its values."""

    variable: str
    between: str = " "


# pip's settings that say where packages come from. Not its constraints: they hold the environment that runs to other releases.
_SETTINGS = {
    "index-url": _Setting(variable="UV_DEFAULT_INDEX"),
    "extra-index-url": _Setting(variable="UV_INDEX"),
    "find-links": _Setting(variable="UV_FIND_LINKS", between=","),
    "trusted-host": _Setting(variable="UV_INSECURE_HOST"),
    "proxy": _Setting(variable="ALL_PROXY"),
    "cert": _Setting(variable="SSL_CERT_FILE"),
}
_SCOPES = ("global", "install", ":env:")  # the later ones win
# Run in the environment: which requirements of the packages that are named are not met there, as arguments for uv.
_UNMET = """
import importlib.metadata as metadata, json, sys
from packaging.requirements import Requirement
unmet = []
for name in sys.argv[1:]:
    for text in metadata.requires(name) or ():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            met = wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
        except metadata.PackageNotFoundError:
            met = False
        if not met:
            unmet.append([wanted.name, str(wanted.specifier)])
print(json.dumps(unmet))
"""


@contextmanager
def overlay(package: str, release: str, wheels: Path | None = None) -> Iterator[str]:
    """Make an environment with a release of a package, lend its interpreter, and remove it; `wheels` as for `releases_between`.

    Raises:
        UsageError: uv is not here, or there is no room.
        NotInstallable: the release, or what it needs, cannot be installed.
    """
    uv = uv_program()
    with Scratch() as folder:
        place = folder / "environment"
        _run([uv, "venv", "--quiet", "--python", sys.executable, str(place)])
        python = str(place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
        _lay_over(python)
        only = ["--no-index"] * (pip_settings().get("no-index") in ("1", "true", "yes", "on"))
        first = ["--no-index", "--find-links", str(wheels.resolve())] if wheels else only
        _install(uv, python, [f"{package}=={release}"], first)
        asked: dict[str, set[str]] = {}
        new = [package]
        while unmet := _unmet(python, new):
            for name, specifier in unmet:
                asked.setdefault(name, set()).add(specifier)
            new = list(dict.fromkeys(name for name, _ in unmet))
            _install(uv, python, [name + ",".join(filter(None, sorted(asked[name]))) for name in new], only)
        yield python


def uv_program() -> str:
    """Return the path of uv. Raises UsageError: it is not installed."""
    found = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise UsageError("fleet bisect makes its environments with uv, which is not installed: pip install uv")
    return found


def _lay_over(python: str) -> None:
    """Have the environment see the packages of the one that runs, behind its own."""
    own = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    lines = [*(f"import site; site.addsitedir({place!r})" for place in own), str(Path(harness.__file__).parents[1])]
    ask = [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    place = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    (Path(place) / "the-environment-that-runs.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _install(uv: str, python: str, wanted: Sequence[str], words: Sequence[str]) -> None:
    """Install exactly these, compiled as pip leaves them: otherwise the first run alone would compile what it imports."""
    _run([uv, "pip", "install", "--quiet", "--no-deps", "--compile-bytecode", "--python", python, *words, *wanted])


def _unmet(python: str, names: Sequence[str]) -> list[list[str]]:
    found: list[list[str]] = json.loads(_run([python, "-I", "-c", _UNMET, *names]))
    return found


def _run(command: Sequence[str]) -> str:
    """Return what a program prints; whatever ends this ends all that it has started, which would go on writing."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | uv_settings(pip_settings(), os.environ),
        start_new_session=True,
    )
    try:
        printed, said = process.communicate()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise NotInstallable(" ".join(said.split()) or f"{Path(command[0]).name} ended with status {process.returncode}")
    return printed


def uv_settings(settings: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables that have uv look for packages where pip does, by pip's settings; what the user has set for uv stays."""
    known = {name: setting for name, setting in _SETTINGS.items() if name in settings}
    found = {setting.variable: setting.between.join(settings[name].split()) for name, setting in known.items()}
    # As pip has it: the best release of all places, not that of the first place that knows the name.
    found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {name: value for name, value in found.items() if name not in environment}


@cache
def pip_settings() -> dict[str, str]:
    """Return pip's settings by name, as its files and variables have them for an installation."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    rows = [row.partition("=") for row in listed.splitlines()]
    return {
        name.removeprefix(f"{scope}."): str(ast.literal_eval(value))
        for scope in _SCOPES
        for name, _, value in rows
        if name.startswith(f"{scope}.")
    }
