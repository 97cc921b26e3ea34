"""Server-sent events of a watched request.

Source of the format: the HTML standard, section 9.2 (Server-sent events).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from anyio import CancelScope
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deployments.api.errors import answer

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""Seconds of silence after which a comment is sent: proxies between us and a browser end silent connections."""


class EventStream(StreamingResponse):
    """A watched request as a response. However it ends, its generators are closed before this returns.

    Starlette leaves the generator of a disconnected client to the garbage collector, and the job would run on (API-9).
    """

    def __init__(
        self, first: T, items: AsyncGenerator[T, None], tell: Callable[[T], bytes], request_id: str, end: bytes = b""
    ) -> None:
        """Tell `first`, then `items`, each as the events that `tell` makes of it, then `end`."""
        self._items = items
        self._events = events(first, items, tell, request_id, end)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(self._events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the last one or until the client disconnects."""
        async with aclosing(self._items), aclosing(self._events):
            await super().__call__(scope, receive, send)


async def events(
    first: T, items: AsyncGenerator[T, None], tell: Callable[[T], bytes], request_id: str, end: bytes = b""
) -> AsyncGenerator[bytes, None]:
    """The events, and comments in long silences; an exception becomes an `error` event, which ends them."""
    yield tell(first)
    try:
        async with aclosing(_with_silences(items)) as told:
            async for item in told:
                yield b": keep-alive\n\n" if item is None else tell(item)
    except Exception as error:  # the status line is long gone: the stream itself must say it
        yield b"event: error\ndata: " + bytes(answer(error, request_id).body) + b"\n\n"
    else:
        yield end


async def _with_silences(items: AsyncGenerator[T, None]) -> AsyncGenerator[T | None, None]:
    """The items, and None after each `KEEP_ALIVE_S` seconds without one."""
    while True:
        waiting = asyncio.ensure_future(anext(items, _END))
        try:
            while not (await asyncio.wait((waiting,), timeout=KEEP_ALIVE_S))[0]:
                yield None
            item = waiting.result()
        finally:
            waiting.cancel()
            with CancelScope(shield=True):  # Starlette's cancellation is repeated at every await
                await asyncio.wait((waiting,))  # a generator that still runs cannot be closed
        if item is _END:
            return
        yield item


_END: Any = object()


def event(name: str, data: Any) -> bytes:
    """One event; `data` as JSON on a single line."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
