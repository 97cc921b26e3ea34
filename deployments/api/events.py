"""Server-sent events of a watched request: `progress`, `preview`, and at last `result` or `error`.

Source of the format: the HTML standard, section 9.2 (Server-sent events).
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from deployments.api.errors import answer
from deployments.graph import Progress
from deployments.ingress.ingress import Generated, Restarted, Watched

EVENT_SCHEMA = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["progress", "preview", "result", "error"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


class EventStream(StreamingResponse):
    """A watched request as a response. However it ends, its generators are closed before this returns.

    Starlette leaves a generator that its client walked away from to the garbage collector, and the picture would go on.
    """

    def __init__(
        self,
        first: Watched,
        items: AsyncGenerator[Watched, None],
        reply: Callable[[Generated], BaseModel],
        request_id: str,
    ) -> None:
        """Tell `first`, then `items`; `reply` makes the result's body of the finished picture."""
        self._items = items
        self._events = events(first, items, reply, request_id)
        headers = {"cache-control": "no-store"}
        super().__init__(self._events, media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the last one or until the client disconnects."""
        async with aclosing(self._items), aclosing(self._events):
            await super().__call__(scope, receive, send)


async def events(
    first: Watched,
    items: AsyncGenerator[Watched, None],
    reply: Callable[[Generated], BaseModel],
    request_id: str,
) -> AsyncGenerator[bytes, None]:
    """The events; an exception becomes an `error` event, which ends them."""
    yield _event_of(first, reply)
    try:
        async for item in items:
            yield _event_of(item, reply)
    except Exception as error:  # the status line is long gone: the stream itself must say it
        yield b"event: error\ndata: " + bytes(answer(error, request_id).body) + b"\n\n"


def event(name: str, data: Any) -> bytes:
    """One event; `data` as JSON on a single line."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _event_of(item: Watched, reply: Callable[[Generated], BaseModel]) -> bytes:
    match item:
        case Progress(steps=0):
            return event("progress", {"state": "queued", "stage": item.stage, "position": item.position or 0})
        case Progress():
            data = {"state": "denoising", "stage": item.stage, "step": item.step, "steps": item.steps}
            return event("progress", data)
        case Restarted():
            return event("progress", {"state": "restarted", "stage": item.stage})
        case bytes():
            return event("preview", {"image": base64.b64encode(item).decode()})
        case Generated():
            return event("result", reply(item).model_dump())
