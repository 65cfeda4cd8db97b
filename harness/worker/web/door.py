"""Who is let in to the chat: the page's own browser window, and no other page that the browser shows.

A page from anywhere may send requests to 127.0.0.1, and by DNS rebinding may even read the answers: it then comes by a name of
its own that now means this machine. So on a loopback address only requests for that address by its usual names are answered, and
nowhere those that another page began. Files are taken from nobody: a body is JSON, and short.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BODY_BYTES = 8 << 20  # a long conversation, which the page sends along with each message
# The server's ways to take or fetch files, which no chat needs.
CLOSED = re.compile(r"/(upload|upload_progress|process_recording|stream|custom_component|component_server)\b|/proxy=")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s/@:\[\]]+)(:\d{1,5})?")


class Door:
    """An ASGI application around another one; `name` is what the server was told to listen on."""

    def __init__(self, app: App, name: str) -> None:
        self._app, self._name = app, name.casefold()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":  # the page uses none
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = _refuse_sender(scope, self._name) or _refuse_contents(scope)
        if refused is not None:
            return await _say(send, *refused)
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # gone before all of it was sent
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MOST_BODY_BYTES:
                return await _say(send, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "more than a conversation takes")
        given = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_again() -> MutableMapping[str, Any]:
            return given.pop() if given else await receive()

        return await self._app(scope, receive_again, send)


def _refuse_sender(scope: Scope, name: str) -> tuple[HTTPStatus, str] | None:
    """Say why whoever sends a request is not answered."""
    headers = [(key.decode("latin-1").lower(), value.decode("latin-1")) for key, value in scope["headers"]]
    hosts, origins = ([value for key, value in headers if key == wanted] for wanted in ("host", "origin"))
    host = _AUTHORITY.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if host is None:
        return HTTPStatus.BAD_REQUEST, "the request names no host"
    server = scope.get("server")
    called = host[1].strip("[]").casefold()
    if (server is None or _is_loopback(str(server[0]))) and not (_is_loopback(called) or called == name):
        return HTTPStatus.FORBIDDEN, "this page is for this machine alone: open it as http://localhost, or start it with --host"
    own = {f"{scheme}://{hosts[0]}".casefold() for scheme in ("http", "https")}
    if any(origin.casefold() not in own for origin in origins) or _is_foreign(dict(headers)):
        return HTTPStatus.FORBIDDEN, "another page may not use this one"
    return None


def _is_foreign(headers: Mapping[str, str]) -> bool:
    """Say whether the browser tells that another page asks, and not for a window that it leaves to this one (Fetch Metadata)."""
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return False
    return headers.get("sec-fetch-dest") != "document"


def _refuse_contents(scope: Scope) -> tuple[HTTPStatus, str] | None:
    if CLOSED.search(scope["path"]):
        return HTTPStatus.NOT_FOUND, "files are neither taken nor fetched here"
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if scope["method"] not in ("GET", "HEAD", "OPTIONS") and kind not in (b"", b"application/json"):
        return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "only JSON is taken here"
    return None


def _is_loopback(name: str) -> bool:
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


async def _say(send: Send, status: HTTPStatus, why: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": f"{why}\n".encode()})
