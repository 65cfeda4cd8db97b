"""Model repositories on the hub, by ranged requests: headers travel, weights do not. The one door to huggingface_hub.

Settings are huggingface_hub's own: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, errors, get_session, hf_hub_url, snapshot_download
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined] # public, unmarked

from harness.core.errors import CheckpointError, UsageError

# The base of all errors of the HTTP library, which is httpx under huggingface_hub 1 and httpx2 under 2.
TRANSPORT_ERROR: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]

TIMEOUT_S = 10.0
LEAST_BYTES = 1 << 16


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
            info = HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
        except (ValueError, KeyError, TypeError) as error:  # a login page of the network, for one
            raise UsageError("what answered is not the hub: check the network and HF_ENDPOINT, or name a directory") from error
        self.where = repo_id
        self.revision = info.sha or revision
        self._sizes = {item.rfilename: item.size for item in info.siblings or ()}

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
        # Compressed, the range would count other bytes than the file's.
        headers = {**build_hf_headers(), "Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", self._url, headers=headers, follow_redirects=True, timeout=TIMEOUT_S) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and offset:
                raise CheckpointError(self.where, "the server sends only whole files: download the model and name its directory")
            data = bytearray()
            for piece in response.iter_raw():
                data += piece
                if len(data) >= length:  # a server that ignores the range would go on with the weights
                    break
        if len(data) < length:
            raise CheckpointError(self.where, f"the server sent {len(data)} bytes of {length}: try again")
        return bytes(data[:length])


def _status(error: errors.HfHubHTTPError) -> str:
    return f"HTTP {error.response.status_code}"
