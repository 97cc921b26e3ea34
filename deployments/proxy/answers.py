"""A middleware around Serve's HTTP proxy: its own errors in the contract's form, and a second try for a dead ingress.

The states of one request, for what the proxy sends:

    nothing, or a start without a body   the ingress replica died: pass the request on once more, then answer 503
    a start of a plain-text error        the proxy answered by itself: answer the same in the contract's form
    anything else                        the application's answer: forwarded as it comes
"""

from __future__ import annotations

import logging

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.body_limit import replay
from deployments.api.errors import ErrorCode, Failure
from deployments.ray_compat import PROXY_ERROR_TYPE
from deployments.telemetry.metrics import metrics

logger = logging.getLogger(__name__)


class ProxyAnswers:
    """Stands around Serve's proxy, inside a BodyLimit, which has read the body.

    An ingress replica that dies takes its requests along, and the proxy then sends nothing. As the client has not
    received anything yet, the request is sent once more, to another replica or to the successor (GRA-4).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the connection on, a second time if there was no response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytes((await receive()).get("body", b""))
        scope = {**scope, "headers": [header for header in scope["headers"] if _is_utf8(header[1])]}
        attempt = _Attempt(self._app, scope, body, receive, send)
        await attempt.run()
        if attempt.no_response and not attempt.disconnected:
            logger.warning("an ingress replica died, trying again")
            metrics().retries.inc(1, {"reason": "ingress died"})
            attempt = _Attempt(self._app, scope, body, receive, send)
            await attempt.run()
        if not attempt.forwarded and not attempt.disconnected:
            await attempt.contract_answer()(scope, receive, send)


def _is_utf8(value: bytes) -> bool:
    """Serve's proxy decodes headers such as `x-request-id` as UTF-8 and fails on others, which are left out."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


class _Attempt:
    """One pass of a request through the proxy."""

    def __init__(self, app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        # The layers inside write into the scope, and a second pass must begin like the first.
        self._call = app(dict(scope), self._watched(replay(body, receive)), self._forward)
        self._send = send
        self._start: Message | None = None
        self.forwarded = False
        """The application's own answer went out, or began to."""
        self.disconnected = False
        """The client left."""

    async def run(self) -> None:
        """Return when the proxy is done with the request."""
        try:
            await self._call
        except Exception:
            if self.forwarded:
                raise
            logger.exception("the proxy raised")

    @property
    def no_response(self) -> bool:
        """True if the proxy produced no usable response (headers without a body do not count)."""
        return not self.forwarded and not self._is_proxy_error

    @property
    def _is_proxy_error(self) -> bool:
        """Whether the proxy answered by itself."""
        if self._start is None or self._start["status"] < 400:
            return False
        return self._headers.get("content-type", "").startswith(PROXY_ERROR_TYPE)

    @property
    def _headers(self) -> Headers:
        return Headers(raw=list(self._start["headers"]) if self._start else [])

    def _watched(self, receive: Receive) -> Receive:
        async def watched() -> Message:
            message = await receive()
            self.disconnected |= message["type"] == "http.disconnect"
            return message

        return watched

    async def _forward(self, message: Message) -> None:
        """Send on what is the application's; a start waits for its body, for a replica can die between the two."""
        if message["type"] == "http.response.start":
            self._start = message
        elif not self._is_proxy_error:
            if not self.forwarded and self._start is not None:
                await self._send(self._start)
            self.forwarded = True
            await self._send(message)

    def contract_answer(self) -> JSONResponse:
        """What the proxy meant: no route, a full queue, its own timeout, a dead replica."""
        request_id = self._headers.get("x-request-id", "unknown")
        match self._start["status"] if self._is_proxy_error and self._start else None:
            case 404:
                failure = Failure.invalid(404, ErrorCode.OTHER, "Not Found")
            case 408:
                failure = Failure.late("the proxy's own time limit", request_id)
            case 503 | 429:
                failure = Failure.overloaded("all queues are full; try again")
            case _:
                failure = Failure.restarting(request_id)
        response = failure.response()
        if self._start is not None:
            response.headers["x-request-id"] = request_id
        return response
