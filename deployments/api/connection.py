"""Handling of a client's connection, shared by all dialects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response

from deployments.ingress.ingress import Generated
from deployments.telemetry.stages import server_timing

logger = logging.getLogger(__name__)
R = TypeVar("R")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """Await `work`; cancel it when the client disconnects, so that its rows serve others from the next tick on."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            logger.info("client disconnected")
            task.cancel()
        return await task
    finally:
        disconnected.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def describe(response: Response, generated: Generated) -> None:
    """Tell stages, backend and how long the prompt is in the reply's headers."""
    response.headers["server-timing"] = server_timing(generated.times)
    first = generated.plan.stages[0]
    response.headers["x-backend"] = first.backend
    if first.precision is not None:
        response.headers["x-precision"] = first.precision
    if (size := prompt_size(generated)) is not None:
        response.headers["x-prompt-tokens"] = size


def prompt_size(generated: Generated) -> str | None:
    """How long the longest text is and how it was read, such as `143/77 chunks=2`; None where nobody counted."""
    notes = [taken.note for taken in generated.times if taken.note]  # of two stages the first one ends last
    return notes[-1] if notes else None
