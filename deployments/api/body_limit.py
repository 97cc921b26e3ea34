"""A limit on how many bytes of a request's body are read."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.errors import answer
from deployments.api.scope import request_id_of
from pipelines.errors import TooLargeError


class BodyLimit:
    """Reads a request's body before anything else does, and stops reading at the limit.

    Ray Serve has no body limit, and a chunked body announces no length, so bytes are counted as they come. It belongs
    in Serve's proxy (`proxy_middlewares` in app.py), whose own queue of body chunks is unbounded; it stands before the
    application too, for a proxy that was started without it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the connection on with its whole body, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = await self._read(receive)
        if body is None:
            error = TooLargeError(f"the body is larger than {self._max_bytes} bytes")
            await answer(error, request_id_of(scope))(scope, receive, send)
        else:
            await self._app(scope, replay(body, receive), send)

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


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body` once and then whatever comes next (a disconnect)."""
    handed_out = False

    async def replayed() -> Message:
        nonlocal handed_out
        if handed_out:
            return await receive()
        handed_out = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
