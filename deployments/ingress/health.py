"""The health of deployments: requests do not wait for those that keep failing to start."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping

from deployments.ray_compat import FAILED_TO_START, SERVING_STATES
from pipelines.errors import UnstartableError

Readiness = Callable[[], Awaitable[tuple[bool, Mapping[str, str]]]]
"""Whether everything can serve, and the state of each deployment in Serve's own words."""
GIVE_UP_S = 60.0
"""Seconds of failed starts after which a request is refused: a replica may have met a dying node, and its successor
is loading."""
STATES_S = 1.0
"""Seconds that states are kept: all requests that wait share one question to Serve's controller."""


class Health:
    """The health of deployments; remembers since when they have failed to start."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        self._states: Mapping[str, str] = {}
        self._asked = -math.inf
        self._failing: dict[str, tuple[float, float]] = {}  # since when, and when it was seen last

    async def check(self, names: Iterable[str]) -> bool:
        """Whether every one of these deployments can serve.

        Raises:
            UnstartableError: one has failed to start for so long that a request had better not wait.
        """
        now = asyncio.get_running_loop().time()
        if now - self._asked >= STATES_S:
            self._asked = now
            _, self._states = await self._readiness()
        healthy = True
        for name in names:
            state = self._states.get(name, "")
            healthy &= state.startswith(SERVING_STATES)
            if FAILED_TO_START not in state:
                self._failing.pop(name, None)
                continue
            since, seen = self._failing.get(name, (now, now))
            if now - seen > GIVE_UP_S:  # nobody looked meanwhile: it may be another failure
                since = now
            self._failing[name] = since, now
            if now - since >= GIVE_UP_S:
                raise UnstartableError(name)
        return healthy
