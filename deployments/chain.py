"""Waiting for the last of a chain of calls whose responses were handed on un-awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

PATIENCE_S = 5.0
"""How long nothing is asked: most pictures are done by then, and asking fetches what goes from stage to stage."""


async def last_of_chain(last: Any, calls: Iterable[Any], check: Callable[[], Awaitable[None]]) -> Any:
    """Await `last`, looking from time to time whether it can still come.

    Serve 2.60 takes a call whose argument failed with ActorUnavailableError (its replica's node was lost a moment ago)
    for one to an unavailable replica, and sends it again for ever. So a call that takes long has its arguments looked
    at: the first that raised is what happened.

    Args:
        last: the response to wait for.
        calls: the responses it depends on; None among them is no call.
        check: raises when there is another reason not to wait any longer.

    Raises:
        Exception: what `last`, one of `calls` or `check` raised.
    """
    waiting = asyncio.ensure_future(_value(last))
    looked_at: list[asyncio.Future[Any]] = []
    try:
        while not (await asyncio.wait((waiting,), timeout=PATIENCE_S))[0]:
            if not looked_at:
                looked_at = [asyncio.ensure_future(_value(call)) for call in calls if call is not None]
                await asyncio.sleep(0)
            for call in looked_at:
                if call.done() and (error := call.exception()):
                    raise error
            await check()
        return waiting.result()
    finally:
        for call in (waiting, *looked_at):
            call.cancel()


async def _value(response: Any) -> Any:
    return await response
