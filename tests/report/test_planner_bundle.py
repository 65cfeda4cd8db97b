"""What the planner's page loads: the part of this package that plans, which needs nothing else, and a runtime of one version."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import msgspec
import pytest

from harness.cli import entry as cli
from harness.core.errors import UsageError
from harness.report.planner import bundle

# Lets Python find nothing but its own modules, msgspec, and what was unpacked: as in the browser.
ALONE = """
import importlib.machinery, sys
kept = {"msgspec", "harness", "platformdirs", *sys.stdlib_module_names}
class Gone:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in kept:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone)
sys.path[:0] = sys.argv[1:3]
from harness.cli.entry import main
assert sys.modules["harness"].__file__.startswith(sys.argv[1])
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    zipfile.ZipFile(BytesIO(bundle.program())).extractall(folder)
    return folder


@pytest.mark.parametrize("model", ["chatglm-6b", "qwen3-30b-a3b", "gpt-oss-20b", "gemma-3-4b-it"])
def test_what_is_packed_plans_alone_as_the_command_line_does(
    unpacked: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", model, "--gpu", "RTX 3060 12GB", "--ram", "32GiB", "--json"]
    (tmp_path / "msgspec").symlink_to(Path(msgspec.__file__).parent)
    command = [sys.executable, "-I", "-S", "-c", ALONE, str(unpacked), str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert cli.main(words) == 0
    assert json.loads(done.stdout) == json.loads(capsys.readouterr().out)


def test_what_the_program_does_not_read_is_not_packed(unpacked: Path) -> None:
    packed = {path.name for path in (unpacked / "harness/data").iterdir()}
    assert {"catalog.toml", "skeletons.jsonl", "traces.jsonl"} <= packed
    assert not [name for name in packed if name.startswith("zh")]  # which the page itself holds


def test_the_same_sources_make_the_same_bytes() -> None:
    assert bundle.program() == bundle.program()


def runtime(folder: Path, version: str = bundle.PYODIDE, wheels: int = 1) -> Path:
    """Write files with the names of a runtime's."""
    folder.mkdir()
    (folder / "package.json").write_text(json.dumps({"version": version}))
    (folder / "pyodide-lock.json").write_text(json.dumps({"info": {"abi_version": "x"}, "packages": {"numpy": {}}}))
    for name in ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip"):
        (folder / name).write_text(name)
    for number in range(wheels):
        (folder / f"msgspec-0.{number}.0-cp314-cp314-pyemscripten_2026_0_wasm32.whl").write_bytes(b"wheel")
    return folder


def test_a_script_holds_every_file_as_it_is(tmp_path: Path) -> None:
    sizes = bundle.write_bundle(bundle.find_runtime(runtime(tmp_path / "runtime")), tmp_path / "out")
    assert {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()} == sizes
    script = (tmp_path / "out/python.js").read_text()
    packed = json.loads(script.partition("takeParts(")[2].removesuffix(");\n"))
    assert json.loads(decoded(packed["pyodide-lock.json"])) == {"info": {"abi_version": "x"}, "packages": {}}
    assert decoded(packed["pyodide.asm.wasm"]) == b"pyodide.asm.wasm"
    assert decoded(packed["msgspec.whl"]) == b"wheel"


def decoded(text: str) -> bytes:
    import base64
    import gzip

    return gzip.decompress(base64.b64decode(text))


def test_a_runtime_that_is_not_whole_or_another_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lacks package.json: unpack 'npm pack pyodide@"):
        bundle.find_runtime(tmp_path / "none")
    with pytest.raises(UsageError, match=f"holds Pyodide 0.1, and the page runs {bundle.PYODIDE}"):
        bundle.find_runtime(runtime(tmp_path / "old", version="0.1"))
    with pytest.raises(UsageError, match=r"holds 2 files msgspec-"):
        bundle.find_runtime(runtime(tmp_path / "two", wheels=2))
    (runtime(tmp_path / "cut") / "pyodide.asm.wasm").unlink()
    with pytest.raises(UsageError, match=r"lacks pyodide.asm.wasm"):
        bundle.find_runtime(tmp_path / "cut")
    (runtime(tmp_path / "odd") / "package.json").write_text("[1]")
    with pytest.raises(UsageError, match="holds Pyodide None"):
        bundle.find_runtime(tmp_path / "odd")


def test_a_wrong_runtime_is_told_before_results_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["publish", str(tmp_path / "none"), "--planner", str(tmp_path)]) == 2
    assert "lacks package.json" in capsys.readouterr().err
