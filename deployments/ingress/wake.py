"""Waking deployments that scaled to zero: all that a request will visit, in parallel, when it is admitted.

Serve counts a call as waiting only when its arguments are there, so a VAE would start after the UNet had finished.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from deployments.graph import Call, Graph
from pipelines.plan import GenerationPlan
from pipelines.upscale import UpscalePlan

PING_AFTER_S = 60.0
"""Seconds after a visit before a deployment is pinged again; less than any delay before it scales to zero."""


class Wake:
    """Sends a no-op call to deployments that may have scaled to zero."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._visited: dict[str, float] = {}
        self._pings: set[asyncio.Task[None]] = set()

    def all_of(self, plan: GenerationPlan | UpscalePlan) -> None:
        """Wake what a plan will visit, unless it was visited a moment ago. Nothing is waited for."""
        now = asyncio.get_running_loop().time()
        for name, ping in self._graph.ping(plan).items():
            if now - self._visited.get(name, -PING_AFTER_S) >= PING_AFTER_S:
                task = asyncio.create_task(_send(ping))
                self._pings.add(task)
                task.add_done_callback(self._pings.discard)
            self._visited[name] = now


async def _send(ping: Callable[[], Call[None]]) -> None:
    with contextlib.suppress(Exception):  # whatever is wrong there, the request itself will meet it
        await ping()
