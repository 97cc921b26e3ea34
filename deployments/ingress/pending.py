"""Waiting for calls that depend on one another, whose responses were handed on un-awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from deployments.graph import Call

T = TypeVar("T")

HEALTH_CHECK_S = 5.0
"""Seconds between health checks while waiting."""
CHECK_ARGUMENTS_S = 60.0
"""Seconds of waiting for one result after which upstream calls are checked even if every deployment is healthy."""


class Pending:
    """The calls of one composition. Leaving it by an exception cancels them all.

    Serve 2.60 takes a call whose argument failed with ActorUnavailableError (its replica's node was lost a moment ago)
    for one to an unavailable replica, and sends it again for ever (tests/upstream). So where a deployment was
    unhealthy, or a result takes very long, the calls it depends on are checked: the first that raised is what happened.
    This is not done sooner, because it loads tensors, and torch, into this process (GRA-5).
    """

    def __init__(self, healthy: Callable[[], Awaitable[bool]]) -> None:
        """Call `healthy` from time to time; it raises if a deployment that the calls visit cannot answer."""
        self._healthy = healthy
        self._calls: list[Call[Any]] = []
        self._checked: dict[int, asyncio.Future[Any]] = {}
        self._was_unhealthy = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for checked in self._checked.values():
            checked.cancel()
        if error is not None:
            for call in self._calls:
                call.cancel()

    def add(self, call: Call[T]) -> Call[T]:
        """Remember a call that later ones depend on."""
        self._calls.append(call)
        return call

    async def wait(self, result: Awaitable[T]) -> T:
        """Await a result that depends on the calls added so far.

        Raises:
            Exception: what `result`, one of the calls, or the health check raised.
        """
        clock = asyncio.get_running_loop().time
        begin = clock()
        waiting = asyncio.ensure_future(_awaited(result))
        try:
            while not (await asyncio.wait((waiting,), timeout=HEALTH_CHECK_S))[0]:
                self._was_unhealthy |= not await self._healthy()
                if self._was_unhealthy or clock() - begin > CHECK_ARGUMENTS_S:
                    await self._check_calls()
            return waiting.result()
        finally:
            waiting.cancel()
            await asyncio.wait((waiting,))  # a generator that still runs cannot be closed

    async def _check_calls(self) -> None:
        """Raise what a call has raised."""
        for index, call in enumerate(self._calls):
            if index not in self._checked:
                self._checked[index] = asyncio.ensure_future(_awaited(call))
        await asyncio.sleep(0)  # lets those that are done already end
        for checked in self._checked.values():
            if checked.done() and not checked.cancelled() and (error := checked.exception()):
                raise error


async def _awaited(awaitable: Awaitable[T]) -> T:
    return await awaitable
