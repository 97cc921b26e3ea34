"""Limits on how a request's body is read: its size, its encoding, and how long its client may pause."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.errors import ErrorCode, Failure, answer
from deployments.api.scope import request_id_of
from pipelines.errors import TooLargeError

PAUSE_S = 30.0
"""Seconds a client may pause in the middle of its body, after which it is taken to be gone."""


class BodyLimit:
    """Reads a request's body before anything else does, and stops reading at the limit.

    Ray Serve has no body limit, and a chunked body announces no length, so bytes are counted as they arrive. The limit
    belongs in Serve's proxy (`proxy_middlewares` in app.py), whose own queue of body chunks has no bound; the
    application has it too, for a proxy that was started without it (API-1).
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the connection on with its whole body, or answer 408, 413 or 415."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        encoding = Headers(scope=scope).get("content-encoding", "identity")
        if encoding.strip().lower() not in ("identity", ""):
            message = f"content-encoding '{encoding}' is not supported; send the JSON as it is"
            await Failure.invalid(415, ErrorCode.MALFORMED, message).response()(scope, receive, send)
            return
        try:
            body = await self._read(receive)
        except TimeoutError:
            message = f"the body did not arrive: nothing came for {PAUSE_S:g} seconds"
            await Failure.invalid(408, ErrorCode.OTHER, message).response()(scope, receive, send)
        except TooLargeError as error:
            await answer(error, request_id_of(scope))(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, None if its client disconnected before its end.

        Raises:
            TooLargeError: it is over the limit.
            TimeoutError: the client paused for too long.
        """
        chunks, size = [], 0
        while True:
            async with asyncio.timeout(PAUSE_S):
                message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_bytes:
                raise TooLargeError(f"the body is larger than {self._max_bytes} bytes")
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
