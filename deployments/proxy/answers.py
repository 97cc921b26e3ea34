"""ASGI layers: a limit on what is read, an answer in the contract's form whatever happens, one log line a request."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from deployments.api.errors import Failure, counted, failure_of, late, overloaded, reply, restarting
from deployments.telemetry.metrics import metrics
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

    An ingress replica that died takes the requests in it along, and the proxy then sends nothing. As the client saw
    nothing of an answer yet, the request is sent once more, to another replica or to the successor. It must stand
    inside a BodyLimit, which has read the body.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytes((await receive()).get("body", b""))
        attempt = _Attempt(self._app, scope, body, receive, send)
        await attempt.run()
        if attempt.nothing and not attempt.disconnected:
            logger.warning("an ingress replica died, trying again")
            metrics().retries.inc(1, {"reason": "ingress died"})
            attempt = _Attempt(self._app, scope, body, receive, send)
            await attempt.run()
        if not attempt.answered and not attempt.disconnected:
            await attempt.translated()(scope, receive, send)


class _Attempt:
    """One pass through the proxy.

    Attributes:
        answered: the application's own answer went out, or began to.
        disconnected: the client left.
    """

    def __init__(self, app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        # The layers inside write into the scope, and a second pass begins like the first.
        self._call = app(dict(scope), self._watch(_replay(body, receive)), self._sort)
        self._send = send
        self._start: Message | None = None
        self.answered = False
        self.disconnected = False

    async def run(self) -> None:
        """Until the proxy is done with it."""
        try:
            await self._call
        except Exception:
            if self.answered:
                raise
            logger.exception("the proxy raised")

    @property
    def nothing(self) -> bool:
        """Whether nothing came that could be an answer: a start without a body is none."""
        return not self.answered and not self._plain

    @property
    def _plain(self) -> bool:
        """Whether the proxy answered by itself: the application never sends an error as plain text."""
        if self._start is None or self._start["status"] < 400:
            return False
        return self._header(b"content-type").startswith(b"text/plain")

    def _header(self, name: bytes) -> bytes:
        headers = self._start["headers"] if self._start else ()
        return next((bytes(value) for key, value in headers if bytes(key).lower() == name), b"")

    def _watch(self, receive: Receive) -> Receive:
        async def watched() -> Message:
            message = await receive()
            self.disconnected |= message["type"] == "http.disconnect"
            return message

        return watched

    async def _sort(self, message: Message) -> None:
        """Pass on what is the application's; a start waits for its body, for a replica can die between the two."""
        if message["type"] == "http.response.start":
            self._start = message
        elif not self._plain:
            if not self.answered and self._start is not None:
                await self._send(self._start)
            self.answered = True
            await self._send(message)

    def translated(self) -> JSONResponse:
        """What the proxy meant: no route, a full queue, its own timeout, a dead replica."""
        request_id = self._header(b"x-request-id").decode("latin-1") or "unknown"
        match self._start["status"] if self._plain and self._start else None:
            case 404:
                failure = Failure(404, 40000, "invalid_request_error", "Not Found")
            case 408:
                failure = late("the proxy waited long enough", request_id)
            case 503 | 429:
                failure = overloaded("all queues are full; try again")
            case _:
                failure = restarting(request_id)
        answer = reply(counted(failure))
        if self._start is not None:
            answer.headers["x-request-id"] = request_id
        return answer


KEY = "sdgraph.key"
"""Where the application leaves the name of a request's key in its ASGI scope."""
PROBED = ("/healthz", "/readyz")
"""Asked every few seconds by probes; their lines would bury the others."""


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
                status = status or 499  # the client left before there was one
                metrics().requests.inc(1, {"route": route, "status": str(status)})
                logger.log(
                    logging.DEBUG if route in PROBED else logging.INFO,
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
