"""A model hub on loopback: one directory per repository, ranged reads, and a count of the bytes that left it."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40
ENDLESS_BYTES, DRIPS_S = 256 << 20, 15.0  # what never ends goes on for so long: several times what any bound lets through


class HubServer(ThreadingHTTPServer):
    """Serves ROOT/OWNER/NAME/FILE as files of the model OWNER/NAME. What is in a repository's name decides how it behaves:

    gated (403), broken (503), wholesale (ranges are ignored), elsewhere (files redirect to another host, as to a CDN),
    garbled (an answer that is no JSON). NASTY says of others what their list of files is.
    """

    daemon_threads = True
    block_on_close = False  # of what drips and never ends

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.requests: list[tuple[str, str, int]] = []
        self.leaked_tokens: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def sent(self) -> int:
        """Return the bytes of file contents sent so far."""
        return sum(length for _, _, length in self.requests)


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "broken" in path and "resolve" in path:
            return self.answer(503, b"later")
        if "gated" in path and ("resolve" in path or "closed" in path):
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if model := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/([^/]+))?", path):
            return self.model_info(model[1], model[3])
        if listed := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            return self.tree(self.server.root / listed[1])
        if "endless-file" in path and "resolve" in path and self.command == "GET":
            return _endless(self)
        if "slow-file" in path and "resolve" in path:
            return _drip_body(self)
        if file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.resolve(file[1], file[2])
        if file := re.fullmatch(r"/elsewhere/(.+)", path):
            self.server.leaked_tokens += [self.headers["Authorization"]] if self.headers["Authorization"] else []
            return self.send_file(self.server.root / file[1])
        return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def model_info(self, name: str, revision: str | None) -> None:
        folder = self.server.root / name
        if "garbled" in name:
            return self.answer(200, b"<html>Please log in")
        if (kind := name.partition("/")[2]) in NASTY:
            return NASTY[kind](self)
        if not folder.is_dir():
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", COMMIT):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = [path for path in folder.rglob("*") if path.is_file()]
        siblings = [{"rfilename": path.relative_to(folder).as_posix(), "size": path.stat().st_size} for path in files]
        return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())

    def tree(self, folder: Path) -> None:
        """List the files as a download of all of them asks for them."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        facts = [{"size": path.stat().st_size, "oid": hashlib.sha1(path.read_bytes()).hexdigest()} for path in files]
        listed = [{"type": "file", "path": path.relative_to(folder).as_posix()} for path in files]
        self.answer(200, json.dumps([one | fact for one, fact in zip(listed, facts, strict=True)]).encode())

    def resolve(self, name: str, file: str) -> None:
        path = self.server.root / name / file
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if "elsewhere" in name:
            port = self.server.server_port
            return self.answer(302, b"", {"Location": f"http://localhost:{port}/elsewhere/{name}/{file}"})
        return self.send_file(path)

    def send_file(self, path: Path) -> None:
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if not wanted or "wholesale" in str(path):
            return self.answer(200, data, file=path)
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        return self.answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, file=path)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, file: Path | None = None) -> None:
        if file is not None:
            tag = {"ETag": f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"', "X-Repo-Commit": COMMIT}
            headers = {**(headers or {}), **tag}
            sent = 0 if self.command == "HEAD" else len(body)
            self.server.requests.append((file.name, self.headers["Range"] or "", sent))
        try:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)
        except (BrokenPipeError, ConnectionResetError):  # the reader had enough of a whole file
            self.close_connection = True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # the reader had enough
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


def go_on(handler: Handler, piece: bytes) -> None:
    """Repeat a piece far beyond every bound, as fast as the reader takes it; not for ever: a reader without a bound is to fail."""
    handler.close_connection = True  # the end of what has no length
    many = piece * (1 + (64 << 10) // len(piece))
    for _ in range(ENDLESS_BYTES // len(many)):
        handler.wfile.write(many)


def drip(handler: Handler, data: bytes) -> None:
    """Send a byte at a time, each in time for any time limit of a socket; not for ever, as above."""
    handler.close_connection = True
    begun_s = time.monotonic()
    for byte in data * 100:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)
        if time.monotonic() - begun_s > DRIPS_S:
            return


def _endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"siblings": [')
    go_on(handler, b'{"rfilename": "model.safetensors", "size": 1},' * 10_000)


def _drip_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    drip(handler, b" ")


def _drip_headers(handler: Handler) -> None:
    drip(handler, b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100)


def _bomb(handler: Handler) -> None:
    """Half a megabyte that unpacks to half a gigabyte."""
    handler.answer(200, _packed(b'{"siblings": []') + _packed(b" " * 1_000_000) * 500 + _packed(b"}"), {"Content-Encoding": "gzip"})


@functools.cache
def _packed(data: bytes) -> bytes:
    return gzip.compress(data)


def _says(value: Any) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(200, json.dumps(value).encode())


def _refuses(value: Any) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(500, json.dumps(value).encode())


def _in_circles(handler: Handler) -> None:
    handler.answer(302, b"", {"Location": handler.path})


NASTY: dict[str, Callable[[Handler], None]] = {
    "endless": _endless,
    "drip-body": _drip_body,
    "drip-headers": _drip_headers,
    "bomb": _bomb,
    "circles": _in_circles,
    "away": lambda handler: handler.answer(302, b"", {"Location": "/elsewhere/list"}),
    "list": _says([]),
    "null": _says(None),
    "text": _says("siblings"),
    "siblings-text": _says({"siblings": "x"}),
    "siblings-of-numbers": _says({"siblings": [1]}),
    "name-number": _says({"siblings": [{"rfilename": 1}]}),
    "size-text": _says({"siblings": [{"rfilename": "config.json", "size": "1"}]}),
    "size-negative": _says({"siblings": [{"rfilename": "config.json", "size": -1}]}),
    "size-huge": _says({"siblings": [{"rfilename": "config.json", "size": 10**30}]}),
    "sha-path": _says({"sha": "../../x", "siblings": []}),
    "nothing": _says({}),
    "config-huge": _says(
        {"siblings": [{"rfilename": "config.json", "size": 1 << 50}, {"rfilename": "model.safetensors", "size": 9}]}
    ),
    "names-odd": _says({"siblings": [{"rfilename": "../../../config.json"}, {"rfilename": "a\nb"}, {"rfilename": ""}]}),
    "error-list": _refuses([]),
    "error-shape": _refuses({"error": {"a": 1}, "errors": [1]}),
    "error-text": _refuses("no"),
}


@contextmanager
def serving(root: Path) -> Iterator[HubServer]:
    server = HubServer(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
