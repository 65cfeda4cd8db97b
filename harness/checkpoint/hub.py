"""Model repositories on the hub, by ranged requests: headers travel, weights do not. The one door to huggingface_hub.

Settings are huggingface_hub's own: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. What answers there may be anything: shape, bytes
and time of its answers are bounded.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote as quote_url

import msgspec
from huggingface_hub import constants, errors, get_session, hf_hub_url, snapshot_download
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined] # public, unmarked

from harness.core.errors import CheckpointError, UsageError
from harness.core.units import format_size

# The base of all errors of the HTTP library, which is httpx under huggingface_hub 1 and httpx2 under 2.
TRANSPORT_ERROR: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]

# The library: httpx or httpx2.
_HTTP: Any = importlib.import_module(TRANSPORT_ERROR.__module__.partition(".")[0])

TIMEOUT_S = 10.0  # for one packet
WHOLE_S = 60.0  # for a whole answer of the API, and for a piece of a file
LEAST_BYTES = 1 << 16
LIST_BYTES = 64 << 20  # the list of a repository's files; 100,000 of them take some 20 MiB
_NO_HUB = "as the hub does not: check the network and HF_ENDPOINT, or name a directory"
LEAST_BYTES_PER_S = 1 << 10  # of a file's download, once WHOLE_S have passed

T = TypeVar("T")


class _File(msgspec.Struct, frozen=True):
    rfilename: str
    size: Annotated[int, msgspec.Meta(ge=0, lt=1 << 60)] | None = None


class ModelFiles(msgspec.Struct, frozen=True):
    """What the hub says of a model's files at one commit, `sha`."""

    sha: Annotated[str, msgspec.Meta(pattern=r"^[\w.-]{1,64}$")] | None = None
    siblings: list[_File] = []

    @property
    def sizes(self) -> dict[str, int | None]:
        """Bytes by name; None where the hub does not say."""
        return {file.rfilename: file.size for file in self.siblings if file.rfilename.isprintable()}


def model_files(repo_id: str, revision: str | None = None) -> ModelFiles:
    """Ask the hub for the files of a model.

    Raises:
        ValueError: what answers is not the hub.
        OSError, TRANSPORT_ERROR, or one of `huggingface_hub.errors`: it does not answer, or refuses.
    """
    url = f"{constants.ENDPOINT}/api/models/{repo_id}"
    url += f"/revision/{quote_url(revision, safe='')}" if revision else ""

    def ask() -> bytes:
        with bounded_session().stream(
            "GET", url, params={"blobs": True}, headers=build_hf_headers(), timeout=TIMEOUT_S
        ) as response:
            hf_raise_for_status(response)
            return bytes(response.read())

    return msgspec.json.decode(_within(WHOLE_S, ask), type=ModelFiles)


def bounded_session(largest_bytes: int | None = None) -> Any:
    """Return huggingface_hub's HTTP client, whose answers are bounded from now on, in its own requests as well as in ours.

    A file is no longer than `largest_bytes`, which the list of a repository's files says, where that is known.
    """
    client = get_session()
    hooks = {name: [hook for hook in found if not isinstance(hook, _Bound)] for name, found in client.event_hooks.items()}
    asking = [hook for hook in hooks["request"] if hook is not _ask_plainly]
    client.event_hooks = {"request": [*asking, _ask_plainly], "response": [*hooks["response"], _Bound(largest_bytes)]}
    return client


def _ask_plainly(request: Any) -> None:
    """Ask for no compression: a few kilobytes of it unpack to any number."""
    request.headers["accept-encoding"] = "identity"


@dataclass(frozen=True)
class _Bound:
    """Bounds what an answer may be. What an error says is not read at all: its status and headers tell enough."""

    largest_bytes: int | None

    def __call__(self, response: Any) -> None:
        of_api = "/api/" in response.url.path
        _refuse_tricks(response, of_api)
        unsaid = None if "content-length" in response.headers else LIST_BYTES
        most = LIST_BYTES if of_api else unsaid if self.largest_bytes is None else self.largest_bytes
        response.stream = _Bounded(response.stream, 0 if response.status_code >= 300 else most)


def _refuse_tricks(response: Any, of_api: bool) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise UsageError(f"what answered sends packed what was asked for plain, {_NO_HUB}")
    if of_api and 300 <= response.status_code < 400 and "/api/" not in response.headers.get("location", "/api/"):
        raise UsageError(f"what answered sends its list of files by another place, {_NO_HUB}")


class _Bounded(_HTTP.SyncByteStream):  # type: ignore[misc]  # one of two libraries'
    """The bytes of an answer, up to a number, none if that is 0, and no slower than a line that anybody would wait for."""

    def __init__(self, stream: Any, most: int | None) -> None:
        self._stream, self._most = stream, most

    def __iter__(self) -> Iterator[bytes]:
        if self._most == 0:
            return
        begun_s, count = time.monotonic(), 0
        for piece in self._stream:
            count += len(piece)
            if self._most is not None and count > self._most:
                raise UsageError(f"what answered sends more than {format_size(self._most)}, {_NO_HUB}")
            took_s = time.monotonic() - begun_s
            if took_s > WHOLE_S and count < took_s * LEAST_BYTES_PER_S:
                raise UsageError(f"what answered sent {format_size(count)} in {took_s:.0f} s: check the network and HF_ENDPOINT")
            yield piece

    def close(self) -> None:
        self._stream.close()


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what `call` returns. What takes longer goes on in a thread of its own, for nobody: no time limit of a socket ends an
    answer that comes byte by byte.

    Raises:
        TimeoutError: it is not done in time; and whatever it raises.
    """
    done: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:  # noqa: BLE001  # raised again below, in the thread that asked
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not done:
        raise TimeoutError(f"no whole answer in {seconds:.0f} s")
    return done[0]


def cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """Return the directory of a repository in the local cache, complete or not; None if there is none."""
    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)
        return Path(partial) if partial else None
    except errors.HFValidationError as error:
        raise UsageError(f"{repo_id!r} is neither a directory here nor a hub id: write a path, or owner/name") from error


@contextmanager
def connected() -> Iterator[None]:
    """Turn what can go wrong on the way to the hub into a UsageError that says what it was."""
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise UsageError(
            "offline (HF_HUB_OFFLINE is set) and the model is not in the local cache: unset it, or name a directory"
        ) from error
    except errors.GatedRepoError as error:
        raise UsageError(f"the model is gated: accept its terms on its page and set HF_TOKEN ({_status(error)})") from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"the model has no such revision: check --revision ({_status(error)})") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"no such model on the hub, or a private one: check the name, or set HF_TOKEN ({_status(error)})"
        ) from error
    except errors.HfHubHTTPError as error:
        raise UsageError(f"the hub refused ({_status(error)}): try again later, or name a directory") from error
    except (TRANSPORT_ERROR, OSError) as error:
        raise UsageError(
            f"the hub cannot be reached ({type(error).__name__}): check the network or HF_ENDPOINT, or name a directory"
        ) from error


class Repository:
    """The files of a model on the hub at one commit. A `harness.checkpoint.formats.files.Folder`."""

    remote = True

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        try:
            found = model_files(repo_id, revision)
        except ValueError as error:  # a login page of the network, for one
            raise UsageError("what answered is not the hub: check the network and HF_ENDPOINT, or name a directory") from error
        self.where = repo_id
        self.revision = found.sha or revision
        self._sizes = found.sizes

    def names(self, under: str = "") -> list[str]:
        return sorted(name for name in self._sizes if name.rpartition("/")[0] == under)

    def size(self, name: str) -> int | None:
        return self._sizes.get(name)

    def encloses(self, name: str) -> bool:  # noqa: ARG002 # a repository has no links
        return True

    def open(self, name: str) -> RemoteFile:
        url = hf_hub_url(self.where, name, revision=self.revision)
        return RemoteFile(url, name, f"{self.where}/{name}", self._sizes[name] or 0)


class RemoteFile:
    """A file on the hub. Its beginning is kept, because formats look there more than once."""

    def __init__(self, url: str, name: str, where: str, size: int) -> None:
        self.name = name
        self.where = where
        self.size = size
        self._url = url
        self._head = b""

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > max(self.size, 0):
            raise CheckpointError(self.where, f"ends at byte {self.size} while byte {offset + length} is needed")
        if offset == 0 and length > len(self._head):
            self._head = self._fetch(0, min(max(length, LEAST_BYTES), self.size))
        if offset + length <= len(self._head):
            return self._head[offset : offset + length]
        return self._fetch(offset, length)

    def close(self) -> None:
        """Nothing to give back: the session is huggingface_hub's."""

    def _fetch(self, offset: int, length: int) -> bytes:
        if not length:
            return b""
        try:
            data = _within(WHOLE_S, lambda: self._ask(offset, length))
        except TimeoutError as error:
            raise CheckpointError(self.where, f"the server sent {error}: check the network, and try again") from error
        if len(data) < length:
            raise CheckpointError(self.where, f"the server sent {len(data)} bytes of {length}: try again")
        return data[:length]

    def _ask(self, offset: int, length: int) -> bytes:
        headers = {**build_hf_headers(), "Range": f"bytes={offset}-{offset + length - 1}"}
        with bounded_session().stream("GET", self._url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and offset:
                raise CheckpointError(self.where, "the server sends only whole files: download the model and name its directory")
            data = bytearray()
            for piece in response.iter_raw():
                data += piece
                if len(data) >= length:  # a server that ignores the range would go on with the weights
                    break
        return bytes(data)


def _status(error: errors.HfHubHTTPError) -> str:
    return f"HTTP {error.response.status_code}"
