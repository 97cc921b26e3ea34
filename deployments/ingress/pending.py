"""Waiting for the last of a chain of calls whose responses were handed on un-awaited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

PATIENCE_S = 5.0
"""How often it is asked whether the graph is well."""
LONG_S = 60.0
"""How long before the arguments are looked at, however well the graph seems."""


async def last_of_chain(last: Any, calls: Iterable[Any], well: Callable[[], Awaitable[bool]]) -> Any:
    """Await `last`, looking from time to time whether it can still come.

    Serve 2.60 takes a call whose argument failed with ActorUnavailableError (its replica's node was lost a moment ago)
    for one to an unavailable replica, and sends it again for ever. So where the graph was not well, or a call takes
    very long, its arguments are looked at: the first that raised is what happened. Not sooner, for looking fetches
    tensors, and torch, into this process.

    Args:
        last: the response to wait for.
        calls: the responses it depends on; None among them is no call.
        well: whether what the calls visit is well; raises when there is nothing to wait for.

    Raises:
        Exception: what `last`, one of `calls` or `well` raised.
    """
    begin = time.monotonic()
    suspicious = False
    waiting = asyncio.ensure_future(_value(last))
    looked_at: list[asyncio.Future[Any]] = []
    try:
        while not (await asyncio.wait((waiting,), timeout=PATIENCE_S))[0]:
            suspicious |= not await well() or time.monotonic() - begin > LONG_S
            if suspicious and not looked_at:
                looked_at = [asyncio.ensure_future(_value(call)) for call in calls if call is not None]
                await asyncio.sleep(0)
            for call in looked_at:
                if call.done() and (error := call.exception()):
                    raise error
        return waiting.result()
    finally:
        for call in (waiting, *looked_at):
            call.cancel()


async def _value(response: Any) -> Any:
    return await response
