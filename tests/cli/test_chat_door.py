"""Who a chat answers, over HTTP: its own page, and no other page that the same browser shows."""

from __future__ import annotations

import collections
import http.client
import importlib.util
import itertools
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from harness.worker.web.door import MOST_BODY_BYTES
from tests.cli.test_chat import ask, folder, free_port, serving

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio, the extra chat")

__all__ = ["folder"]  # a fixture
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
FILE = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + bytes(1 << 16) + b"\r\n--x--\r\n"
PROMPT = json.dumps({"data": ["Hello"]}).encode()


class Served(NamedTuple):
    """A chat that runs: its process, its port and its folder for temporary files."""

    pid: int
    port: int
    temporary: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    temporary = tmp_path_factory.mktemp("t")
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        with serving(folder, port) as (process, told):
            assert told.startswith("Chat with ")
            yield Served(process.pid, port, temporary)
            process.send_signal(signal.SIGINT)
            process.wait(60)


def send(port: int, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> int:
    """Send a request with these headers alone; return the status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=True)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        return connection.getresponse().status
    finally:
        connection.close()


OWN = ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}", "localhost:4711", "localhost"]
FOREIGN = [
    "evil.example",
    "evil.example:{port}",
    "localhost.evil.example",
    "127.0.0.1.evil.example:{port}",
    "evil.example@localhost",
    "192.0.2.1:{port}",
    "0.0.0.0:{port}",
    "",
    "localhost:{port}/x",
    "a b",
]


@pytest.mark.parametrize("host", OWN)
def test_its_own_names_are_answered(served: Served, host: str) -> None:
    host = host.format(port=served.port)
    assert send(served.port, "GET", "/config", {"Host": host}) == 200
    assert send(served.port, "POST", "/gradio_api/call/chat", {"Host": host, "Origin": f"http://{host}", **JSON}, PROMPT) == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_a_name_that_was_bound_to_this_machine_is_not(served: Served, host: str) -> None:
    host = host.format(port=served.port)
    for origin in ({}, {"Origin": f"http://{host}"}):
        assert send(served.port, "GET", "/config", {"Host": host, **origin}) in (400, 403)
        assert send(served.port, "POST", "/gradio_api/call/chat", {"Host": host, **origin, **JSON}, PROMPT) in (400, 403)
        assert send(served.port, "POST", "/gradio_api/queue/join", {"Host": host, **origin, **JSON}, PROMPT) in (400, 403)


def test_a_request_without_a_host_or_with_two_is_not_answered(served: Served) -> None:
    assert send(served.port, "GET", "/config", {}) == 400
    with socket.create_connection(("127.0.0.1", served.port)) as line:
        line.sendall(f"GET /config HTTP/1.1\r\nHost: localhost:{served.port}\r\nHost: evil.example\r\n\r\n".encode())
        assert line.recv(12) == b"HTTP/1.1 400"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://127.0.0.1.evil.example"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ],
)
def test_another_page_may_not_use_it(served: Served, headers: dict[str, str]) -> None:
    own = {"Host": f"localhost:{served.port}"}
    assert send(served.port, "GET", "/config", own | headers) == 403
    assert send(served.port, "POST", "/gradio_api/call/chat", own | headers | JSON, PROMPT) == 403


def test_a_link_to_it_may_be_followed(served: Served) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert send(served.port, "GET", "/", {"Host": f"localhost:{served.port}", **link}) == 200


POSTED_TO = """
import gradio
from gradio.routes import App

def of(routes):
    for route in routes:
        if set(getattr(route, "methods", None) or ()) - {"GET", "HEAD", "OPTIONS"}:
            yield route.path
        yield from of(getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", ()))

print(*sorted(set(of(App.create_app(gradio.ChatInterface(lambda message, _: message)).routes))), sep="\\n")
"""


def posted_to() -> list[str]:
    """Every path of gradio's own server that takes a body."""
    return subprocess.run([sys.executable, "-c", POSTED_TO], capture_output=True, text=True, check=True).stdout.splitlines()


def test_no_route_takes_a_file(served: Served) -> None:
    own = {"Host": f"127.0.0.1:{served.port}"}
    paths = posted_to()
    assert {"/gradio_api/upload", "/gradio_api/queue/join"} <= set(paths)
    for path, headers in itertools.product([*paths, "/upload", "/gradio_api/upload/"], (FORM, {"Content-Type": "text/plain"}, {})):
        assert send(served.port, "POST", path.replace("{", "").replace("}", ""), own | headers, FILE) in range(400, 500), path
    assert send(served.port, "GET", "/gradio_api/upload_progress?upload_id=x", own) == 404
    left = [path for path in served.temporary.rglob("*") if path.is_file() and path.stat().st_size >= 1 << 16]
    assert not left


def test_a_body_without_end_is_not_held(served: Served) -> None:
    own = {"Host": f"127.0.0.1:{served.port}", **JSON}
    before = sum(process.memory_info().rss for process in tree(served.pid))
    assert send(served.port, "POST", "/gradio_api/call/chat", own, bytes(MOST_BODY_BYTES + 1)) == 413
    with socket.create_connection(("127.0.0.1", served.port)) as line:
        head = "".join(f"{name}: {value}\r\n" for name, value in own.items())
        line.sendall(f"POST /gradio_api/queue/join HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        pieces = itertools.repeat(b"100000\r\n" + bytes(1 << 20) + b"\r\n", 1024)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            collections.deque(map(line.sendall, pieces))
    assert sum(process.memory_info().rss for process in tree(served.pid)) - before < 128 << 20
    assert ask(served.url, "Hello")[-1][0] == "complete", "it goes on"


def tree(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def test_a_websocket_is_closed(served: Served) -> None:
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x" * 22 + "=="}
    assert send(served.port, "GET", "/", {"Host": f"localhost:{served.port}", **upgrade}) != 101
