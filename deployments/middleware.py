"""ASGI layers: a limit on what is read, an answer in the contract's form whatever happens, one log line a request."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from deployments.failures import Failure, counted, failure_of, late, overloaded, reply, restarting
from deployments.metrics import metrics
from pipelines.errors import TooLargeError

logger = logging.getLogger("sdgraph.http")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class BodyLimit:
    """Reads a request's body before anything else does, and stops reading at the limit.

    Ray Serve has no body limit, and a chunked body announces no length, so bytes are counted as they come. It belongs
    into Serve's proxy (`proxy_middlewares` in app.py), whose own queue of body chunks knows no bound; it stands before
    the application too, for a proxy that was started without it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = await self._read(receive)
        if body is None:
            error = TooLargeError(f"the body is larger than {self._max_bytes} bytes")
            await reply(failure_of(error, request_id_of(scope)))(scope, receive, send)
        else:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, None once it is over the limit."""
        chunks, size = [], 0
        while True:
            message = await receive()
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_bytes:
                return None
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body` once and then whatever comes next (a disconnect)."""
    handed = False

    async def replayed() -> Message:
        nonlocal handed
        if handed:
            return await receive()
        handed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


class ProxyAnswers:
    """Stands around Serve's proxy: what the proxy answers by itself, in plain text, becomes the contract's answer.

    An ingress replica that died takes the requests in it along; the proxy answers them 500. As nothing of an answer was
    sent yet, the request is sent once more, to another replica or to the successor. It must stand inside a BodyLimit,
    which has read the body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytes((await receive()).get("body", b""))
        plain = await self._try(scope, _replay(body, receive), send)
        if plain is not None and plain.status == 500:
            logger.warning("an ingress replica died, trying again: %s", plain.text[:200])
            metrics().retries.inc(1, {"reason": "ingress died"})
            plain = await self._try(scope, _replay(body, receive), send)
        if plain is not None:
            answer = reply(counted(plain.failure()))
            answer.raw_headers.extend(plain.headers)
            await answer(scope, receive, send)

    async def _try(self, scope: Scope, receive: Receive, send: Send) -> _PlainError | None:
        """Pass an answer of the application on; one of the proxy's own comes back instead."""
        plain: _PlainError | None = None

        async def watched(message: Message) -> None:
            nonlocal plain
            if message["type"] == "http.response.start" and message["status"] >= 400:
                headers = [(bytes(name).lower(), bytes(value)) for name, value in message["headers"]]
                if dict(headers).get(b"content-type", b"").startswith(b"text/plain"):
                    plain = _PlainError(message["status"], [h for h in headers if not h[0].startswith(b"content-")])
                    return
            if plain is None:
                await send(message)
            else:
                plain.text += bytes(message.get("body", b"")).decode("utf-8", "replace")

        # A copy: the layers inside write into it, and a second try begins like the first.
        await self._app(dict(scope), receive, watched)
        return plain


@dataclass
class _PlainError:
    """An error that Serve's proxy made: no route, a full queue, a dead replica, its own timeout."""

    status: int
    headers: list[tuple[bytes, bytes]]
    text: str = ""

    def failure(self) -> Failure:
        request_id = dict(self.headers).get(b"x-request-id", b"unknown").decode("latin-1")
        match self.status:
            case 404:
                return Failure(404, 40000, "invalid_request_error", "Not Found")
            case 408:
                return late("the proxy waited long enough", request_id)
            case 500:
                return restarting(request_id)
            case _:
                self.headers = [header for header in self.headers if header[0] != b"retry-after"]
                return overloaded("all queues are full; try again")


KEY = "sdgraph.key"
"""Where the application leaves the name of a request's key in its ASGI scope."""


class AccessLog:
    """One line a request: method, path, status, time, name of the key; Serve's own is off."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        begin, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            if scope["type"] == "http":
                seconds, key = time.perf_counter() - begin, scope.get(KEY) or "-"
                route = getattr(scope.get("route"), "path", "unknown")
                metrics().requests.inc(1, {"route": route, "status": str(status)})
                logger.info(
                    "%s %s %d %.0f ms key=%s",
                    *(scope["method"], scope["path"], status, seconds * 1000, key),
                    extra={"request_id": request_id_of(scope), "status": status, "key": key},
                )


def request_id_of(scope: Scope) -> str:
    """The id of a request. Serve's proxy takes `x-request-id` from the client or makes one, and sends it back."""
    for name, value in scope["headers"]:
        if name.lower() == b"x-request-id":
            return str(value.decode("latin-1"))[:128]
    return "unknown"
