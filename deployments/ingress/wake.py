"""Sleeping deployments are woken all at once, and those that cannot start are not waited for."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from pipelines.errors import UnstartableError

Readiness = Callable[[], Awaitable[tuple[bool, Mapping[str, str]]]]
"""Whether everything can serve, and the state of each deployment in Serve's own words."""
WELL = ("HEALTHY", "UPSCALING", "DOWNSCALING")
"""States in which a deployment serves, if only by waking: one that sleeps is healthy."""
FAILING = "failed to start"
"""Serve's words for replicas that raise when they are made; they stay until one starts."""
FAILING_S = 60.0
"""How long those words may stand: a replica may have met a dying node, and its successor is loading."""
STATES_S = 1.0
"""How old states may be: all who wait share one question to Serve's controller."""
SURELY_AWAKE_S = 60.0
"""Shorter than any delay before a deployment goes to sleep."""


class Waking:
    """Knocks at deployments that nobody was sent to for a while."""

    def __init__(self) -> None:
        self._last: dict[int, float] = {}
        self._knocking: set[asyncio.Task[None]] = set()

    def knock(self, handles: Iterable[Any]) -> None:
        """A request is about to visit these: those that may sleep start now. Nothing is waited for."""
        now = asyncio.get_running_loop().time()
        for handle in handles:
            if now - self._last.get(id(handle), -SURELY_AWAKE_S) >= SURELY_AWAKE_S:
                task = asyncio.create_task(self._knock(handle))
                self._knocking.add(task)
                task.add_done_callback(self._knocking.discard)
            self._last[id(handle)] = now

    async def _knock(self, handle: Any) -> None:
        with contextlib.suppress(Exception):  # whatever is wrong there, the request itself will meet it
            await handle.awake.remote()


class Health:
    """Whether deployments are well; remembers since when they have failed to start."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self._states: Mapping[str, str] = {}
        self._asked = -math.inf
        self._failing: dict[str, tuple[float, float]] = {}  # since when, and when it was seen last

    async def of(self, handles: Iterable[Any]) -> bool:
        """Whether none of these is missing a replica.

        Raises:
            UnstartableError: one has failed to start for so long that a request had better not wait.
        """
        now = asyncio.get_running_loop().time()
        if now - self._asked >= STATES_S:
            self._asked = now
            _, self._states = await self._readiness()
        states, well = self._states, True
        for handle in handles:
            name = str(handle.deployment_name)
            well &= states.get(name, "").startswith(WELL)
            if FAILING not in states.get(name, ""):
                self._failing.pop(name, None)
                continue
            since, seen = self._failing.get(name, (now, now))
            if now - seen > FAILING_S:  # nobody looked meanwhile: it may be another failure
                since = now
            self._failing[name] = since, now
            if now - since >= FAILING_S:
                raise UnstartableError(name)
        return well
