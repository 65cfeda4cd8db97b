"""What the planner's page runs: Python for browsers (Pyodide), and the part of this package that plans, as scripts beside the page.

From disk a page may load scripts and nothing else, so files travel inside scripts: gzipped, in base64, under their names. What runs
in the browser is the source that stands here, so a plan there is the plan of the command line by construction; a translation of the
planner would be a second one to keep right.
"""

from __future__ import annotations

import base64
import gzip
import importlib.resources
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import harness
from harness.core.errors import UsageError
from harness.core.text import line

# The version that the tests run the page with: what else calls itself Pyodide may hold another Python, or another way in.
PYODIDE = "314.0.7"
WHEEL = "msgspec-*-cp314-cp314-pyemscripten_2026_0_wasm32.whl"
_FILES = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip")
_LOCK = "pyodide-lock.json"
_NOTICE = f"// Pyodide {PYODIDE} (MPL-2.0, https://github.com/pyodide/pyodide) and msgspec (BSD-3-Clause), as published, gzipped."
FOLDER, RUNTIME, PROGRAM = "planner", "python.js", "fitmatrix.js"
# The rooms that planning needs, with the commands; what a command imports when it runs stays behind.
_ROOMS = ("core", "machine", "checkpoint", "catalog", "architecture", "planning", "live", "cli", "report/terminal", "report/export")
_UNREAD = frozenset({"zh.toml", "zh_site.toml", "zh_planner.toml"})
_DATE = (2024, 1, 1, 0, 0, 0)  # of what is packed, so that the same sources make the same bytes


class Runtime(NamedTuple):
    """Where Python for browsers lies: Pyodide's own files, and its build of msgspec."""

    folder: Path
    wheel: Path

    def parts(self) -> Mapping[str, bytes]:
        """Return the contents of all files, by the names under which the page asks for them."""
        lock = json.loads((self.folder / _LOCK).read_bytes())
        known = {"info": lock["info"], "packages": {}}  # no package of theirs is asked for
        files = {name: (self.folder / name).read_bytes() for name in _FILES}
        return files | {_LOCK: json.dumps(known).encode(), "msgspec.whl": self.wheel.read_bytes()}


def find_runtime(folder: Path) -> Runtime:
    """Return the runtime that lies in a folder.

    Raises:
        UsageError: it is not whole, or of another version.
    """
    way_out = f"unpack 'npm pack pyodide@{PYODIDE}' and put msgspec's wheel for it there (docs/publishing.md)"
    lacks = next((name for name in ("package.json", _LOCK, *_FILES) if not (folder / name).is_file()), None)
    if lacks is not None:
        raise UsageError(f"--planner {line(str(folder))} lacks {lacks}: {way_out}")
    try:
        version = json.loads((folder / "package.json").read_bytes()).get("version")
    except (ValueError, AttributeError):
        version = None
    if version != PYODIDE:
        found = f"Pyodide {line(str(version))}, and the page runs {PYODIDE}"
        raise UsageError(f"--planner {line(str(folder))} holds {found}: {way_out}")
    wheels = sorted(folder.glob(WHEEL))
    if len(wheels) != 1:
        raise UsageError(f"--planner {line(str(folder))} holds {len(wheels)} files {WHEEL}, and one is needed: {way_out}")
    return Runtime(folder, wheels[0])


def write_bundle(runtime: Runtime, folder: Path) -> dict[str, int]:
    """Write the scripts that hold the runtime and the program into a folder; return the bytes of each."""
    folder.mkdir()
    (folder / RUNTIME).write_text(f"{_NOTICE}\n{_script(runtime.parts())}", encoding="ascii")
    (folder / PROGRAM).write_text(_script({"fitmatrix.zip": program()}), encoding="ascii")
    return {name: (folder / name).stat().st_size for name in (RUNTIME, PROGRAM)}


def _script(parts: Mapping[str, bytes]) -> str:
    packed = {name: base64.b64encode(gzip.compress(data, mtime=0)).decode() for name, data in parts.items()}
    return f"takeParts({json.dumps(packed)});\n"


def program() -> bytes:
    """Return the part of this package that plans, and what it imports, as a zip archive of sources; gzip packs it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, path in sorted(_sources()):
            archive.writestr(zipfile.ZipInfo(name, _DATE), path.read_bytes())
    return stream.getvalue()


def _sources() -> Iterator[tuple[str, Path]]:
    """Yield the name in the archive and the place of each file."""
    home = Path(harness.__file__).parent
    found = [home / "__init__.py", home / "report/__init__.py"]
    found += [path for room in _ROOMS for path in (home / room).rglob("*.py")]
    found += [path for path in (home / "data").iterdir() if path.is_file() and path.name not in _UNREAD]
    yield from ((path.relative_to(home.parent).as_posix(), path) for path in found)
    with importlib.resources.as_file(importlib.resources.files("platformdirs")) as theirs:
        yield from ((f"platformdirs/{path.name}", path) for path in theirs.glob("*.py"))
