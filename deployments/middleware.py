"""ASGI layers around the application: a limit on what is read, and one log line a request."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from deployments.failures import failure_of, reply
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


class AccessLog:
    """One line a request: method, path, status, time, request id."""

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

        await self._app(scope, receive, noted)
        if scope["type"] == "http":
            taken = (time.perf_counter() - begin) * 1000
            logger.info("%s %s %d %.0f ms id=%s", scope["method"], scope["path"], status, taken, request_id_of(scope))


def request_id_of(scope: Scope) -> str:
    """The id of a request. Serve's proxy takes `x-request-id` from the client or makes one, and sends it back."""
    for name, value in scope["headers"]:
        if name.lower() == b"x-request-id":
            return str(value.decode("latin-1"))[:128]
    return "unknown"
