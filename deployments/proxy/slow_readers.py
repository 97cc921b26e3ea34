"""A middleware around Serve's HTTP proxy that drops clients that hardly read (API-14).

The proxy keeps what a client has not taken yet, and its connection, for as long as the client likes. Nothing else is
held: the picture is drawn at its own pace, and no replica waits for a client.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.ray_compat import transport_of

logger = logging.getLogger(__name__)

CHECK_S = 30.0
"""Seconds between two checks of how much a client has read."""
LAST_BYTES_S = 0.2
"""Seconds between two checks whether a client has read the end of a reply."""
SLOWEST_BYTES_S = 1024
"""Bytes a second that a client must take on average, while anything waits for it."""


class SlowReaders:
    """Drops a connection whose client takes less than `SLOWEST_BYTES_S`. Must be the outermost layer.

    What the kernel's buffers hold counts as taken. A dropped client is like one that left: its work is cancelled.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the connection on, and stay until its client has taken everything."""
        transport = transport_of(send) if scope["type"] == "http" else None
        if transport is None:
            await self._app(scope, receive, send)
            return
        given = 0

        async def counted(message: Message) -> None:
            nonlocal given
            given += len(message.get("body", b""))
            await send(message)

        async def watch() -> None:
            taken = 0
            while True:
                await asyncio.sleep(CHECK_S)
                waiting = transport.get_write_buffer_size()
                before, taken = taken, given - waiting
                if waiting and taken - before < SLOWEST_BYTES_S * CHECK_S:
                    message = "a client took %d bytes in %g s while %d waited for it: dropped"
                    logger.warning(message, max(0, taken - before), CHECK_S, waiting)
                    transport.abort()
                    return

        watching = asyncio.create_task(watch())
        try:
            await self._app(scope, receive, counted)
            while transport.get_write_buffer_size() and not transport.is_closing():  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(LAST_BYTES_S)
        finally:
            watching.cancel()
