"""A hub that fails.

A real HTTP server on loopback answers each request of `inspect`, `plan` and a download honestly but one, which it cuts, garbles,
drips, packs, sends elsewhere or never ends. Whatever comes of it is one sentence in bounded time and memory, and what is taken from
such a hub in the end is what an honest one has.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.core.units import MIB, format_size
from tests.faults.faults_files import save_one
from tests.support.hub_server import Handler, HubServer, drip, go_on
from tests.support.reporting import Figure

ROOT = Path(__file__).parents[2]
COMMANDS = ("inspect", "plan", "fetch")
REQUESTS = 5  # of a command, each of which fails in its turn
PATIENCE_S, MOST_S, MOST_BYTES = 1.0, 30.0, 400 * MIB

# In a process of its own, because huggingface_hub reads its settings when it is imported; with little patience.
ASK = """
import contextlib, hashlib, io, json, sys, time, traceback
from pathlib import Path
from harness.catalog import download
from harness.checkpoint import hub
from harness.cli.entry import main
from harness.core.errors import HarnessError
from tests.faults.reading import memory

hub.WHOLE_S, hub.TIMEOUT_S = PATIENCE, PATIENCE

def fetch(name):
    folder = download.fetch(name)
    print({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())})
    return 0

def call(how, name):
    if how == "fetch":
        return fetch(name)
    return main([how, name, *(["--gpu", "8GiB", "--ram", "16GiB"] if how == "plan" else [])])

for asked in sys.stdin.read().split():
    how, name = asked.split(":")
    out, err, failure, status = io.StringIO(), io.StringIO(), "", 0
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = memory("VmRSS"), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = call(how, name)
        except HarnessError as error:
            print(f"fitmatrix: {error}", file=sys.stderr)
            status = 2
        except BaseException:
            failure = traceback.format_exc()[-2000:]
    grown = memory("VmHWM") - before
    told = {"how": how, "name": name, "status": status, "failure": failure, "out": out.getvalue(), "err": err.getvalue()}
    print(json.dumps(told | {"seconds": time.monotonic() - begun, "grown": grown}), file=sys.__stdout__, flush=True)
"""

Answer = tuple[int, bytes, dict[str, str]]


def begin(handler: Handler, answer: Answer, length: int | None) -> None:
    status, _, headers = answer
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()


def cut(handler: Handler, answer: Answer) -> None:
    begin(handler, answer, len(answer[1]))
    handler.wfile.write(answer[1][: len(answer[1]) // 2])
    handler.close_connection = True


def too_short(handler: Handler, answer: Answer) -> None:
    """Say and send less than there is."""
    begin(handler, answer, len(answer[1]) // 2)
    handler.wfile.write(answer[1][: len(answer[1]) // 2])


def too_long(handler: Handler, answer: Answer) -> None:
    """Say what there is and send more, which the next answer seems to begin with."""
    begin(handler, answer, len(answer[1]))
    handler.wfile.write(answer[1] + b"more" * 1000)


def other_bytes(handler: Handler, answer: Answer) -> None:
    begin(handler, answer, len(answer[1]))
    handler.wfile.write(bytes(255 - byte for byte in answer[1]))


def endless(handler: Handler, answer: Answer) -> None:
    begin(handler, answer, None)
    go_on(handler, answer[1] or b" " * 1000)


def dripping(handler: Handler, answer: Answer) -> None:
    begin(handler, answer, None)
    drip(handler, answer[1])


def bomb(handler: Handler, answer: Answer) -> None:
    packed = gzip.compress(b" " * MIB) * 256
    begin(handler, (answer[0], packed, {**answer[2], "Content-Encoding": "gzip"}), len(packed))
    handler.wfile.write(packed)


def silent(handler: Handler, answer: Answer) -> None:
    del answer
    time.sleep(4 * PATIENCE_S)
    handler.close_connection = True


def hung_up(handler: Handler, answer: Answer) -> None:
    del answer
    handler.close_connection = True


def no_http(handler: Handler, answer: Answer) -> None:
    del answer
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n")
    handler.close_connection = True


def says(status: int, headers: Mapping[str, str] | None = None) -> Callable[[Handler, Answer], None]:
    def say(handler: Handler, answer: Answer) -> None:
        del answer
        begin(handler, (status, b"", {name: value.format(path=handler.path) for name, value in (headers or {}).items()}), 0)

    return say


FAULTS: Mapping[str, Callable[[Handler, Answer], None]] = {
    "cut": cut,
    "too-short": too_short,
    "too-long": too_long,
    "other-bytes": other_bytes,
    "unending": endless,
    "dripping": dripping,
    "packed": bomb,
    "silent": silent,
    "hung-up": hung_up,
    "no-http": no_http,
    "status-500": says(500),
    "status-429": says(429, {"Retry-After": "0"}),
    "status-204": says(204),
    "status-401": says(401),
    "circle": says(302, {"Location": "{path}"}),
    "to-a-file": says(302, {"Location": "file:///etc/hostname"}),
    "to-nowhere": says(302, {"Location": "http://127.0.0.1:1/"}),
}


class FailingHandler(Handler):
    """Answers the request that the name of the model says, `cut-3-plan`, by the fault that it says, and all others honestly."""

    server: FailingHub

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, file: Path | None = None) -> None:
        found = re.search(r"/o/(.+)-(\d)-(?:inspect|plan|fetch)(?:/|\?|$)", self.path)
        if found is None or self.command == "HEAD":
            return super().answer(status, body, headers, file)
        with self.server.lock:
            number = self.server.counted[found[0].strip("/?")]
            self.server.counted[found[0].strip("/?")] += 1
        if number != int(found[2]):
            return super().answer(status, body, headers, file)
        self.server.failed.add(found[0].strip("/?").partition("/")[2])
        return FAULTS[found[1]](self, (status, body, headers or {}))


class FailingHub(HubServer):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.RequestHandlerClass = FailingHandler
        self.counted: Counter[str] = Counter()
        self.failed: set[str] = set()
        self.lock = threading.Lock()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailingHub]:
    root = tmp_path_factory.mktemp("hub")
    honest = root / "o" / "honest"
    honest.parent.mkdir()
    save_one(honest)
    for name in names():
        (root / "o" / name).symlink_to(honest)
    server = FailingHub(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def names() -> list[str]:
    return [f"{fault}-{number}-{how}" for fault in FAULTS for number in range(REQUESTS) for how in COMMANDS]


def ask(hub: HubServer, home: Path, asked: list[str]) -> list[dict[str, Any]]:
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("HF_") and "PROXY" not in name.upper()}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    settings |= {
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "FITMATRIX_CACHE": str(home.parent / "cache"),
    }  # one, for the worker that builds the model
    command = [sys.executable, "-W", "error", "-c", ASK.replace("PATIENCE", str(PATIENCE_S))]
    done = subprocess.run(
        command, input="\n".join(asked), cwd=ROOT, env=kept | settings, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"how"')]


def breach(one: Mapping[str, Any]) -> str:
    """Say what an ending has that none may have; empty if it is one sentence, or what was asked for."""
    if one["failure"] or one["status"] not in (0, 1, 2):
        return f"{one['name']}: {one['status']} {one['failure']}"
    sentence = one["err"].startswith("fitmatrix: ") and one["err"].count("\n") == 1 and len(one["err"]) < 2000
    return "" if one["status"] != 2 or sentence else f"{one['name']}: {one['err'][:500]!r}"


def test_a_hub_that_fails_once(hub: FailingHub, tmp_path: Path, figures: list[Figure]) -> None:
    honest = {one["how"]: one for one in ask(hub, tmp_path / "honest", [f"{how}:o/honest" for how in COMMANDS])}
    assert {how: one["status"] for how, one in honest.items()} == {"inspect": 0, "plan": 0, "fetch": 0}, honest
    asked = [f"{name.rpartition('-')[2]}:o/{name}" for name in names()]
    found = ask(hub, tmp_path / "home", asked)
    assert len(found) == len(asked)
    failed = [one for one in found if one["name"].partition("/")[2] in hub.failed]
    print(f"{len(failed)} of {len(found)} commands met a fault")
    again = ask(hub, tmp_path / "home", [f"fetch:{one['name']}" for one in failed if one["how"] == "fetch"])
    altered = [
        one["name"] for one in again if "other-bytes" not in one["name"] and (one["status"] or one["out"] != honest["fetch"]["out"])
    ]
    broken = [said for one in [*found, *again] if (said := breach(one))]
    slow, large = max(found, key=lambda one: one["seconds"]), max(found, key=lambda one: one["grown"])
    rows, patience = len(found), f"with {PATIENCE_S:.0f} s of patience"
    figures += [
        Figure(what="tracebacks, and errors in more than a sentence", rows=rows, found=str(len(broken)), wanted="0"),
        Figure(
            what="downloads not as from an honest hub, once it answers again", rows=len(again), found=str(len(altered)), wanted="0"
        ),
        Figure(what=f"slowest command, {patience}", rows=rows, found=f"{slow['seconds']:.1f} s", wanted=f"{MOST_S:.0f} s"),
        Figure(what="most memory", rows=rows, found=format_size(large["grown"]), wanted=format_size(MOST_BYTES)),
    ]
    assert {one["name"].partition("/")[2].rpartition("-")[0].rpartition("-")[0] for one in failed} == FAULTS.keys()
    assert {one["how"] for one in failed} == set(COMMANDS)
    assert not broken, "\n".join(broken)
    assert not altered, "\n".join(f"{one['name']}: {one['out']} {one['err']}" for one in again if one["name"] in altered)
    assert slow["seconds"] < MOST_S, slow
    assert large["grown"] < MOST_BYTES, large
