"""Server-sent events of a watched request: `progress`, `preview`, and at last `result` or `error`.

Source of the format: the HTML standard, section 9.2 (Server-sent events).
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from deployments.api.errors import failure_of, reply
from deployments.telemetry.stages import Progress

if TYPE_CHECKING:
    from deployments.ingress.ingress import Generated


def event(name: str, data: Any) -> bytes:
    """One event; `data` as JSON on a single line."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


async def events(
    first: Progress, items: AsyncIterator[Progress | bytes | Generated], request_id: str
) -> AsyncIterator[bytes]:
    """The event stream of a watched request; an exception becomes an `error` event, which ends it."""
    yield _progress(first)
    try:
        async for item in items:
            match item:
                case Progress():
                    yield _progress(item)
                case bytes():
                    yield event("preview", {"image": base64.b64encode(item).decode()})
                case _:
                    yield event("result", item.response().model_dump())
    except Exception as error:  # the status line is long gone: the stream itself must say it
        yield b"event: error\ndata: " + bytes(reply(failure_of(error, request_id)).body) + b"\n\n"


def _progress(item: Progress) -> bytes:
    if item.steps == 0:
        return event("progress", {"state": "queued", "stage": item.stage, "position": item.position or 0})
    return event("progress", {"state": "denoising", "stage": item.stage, "step": item.step, "steps": item.steps})
