"""What the replicas of compiled UNets can draw, as far as they have said."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from deployments.graph import Graph
from pipelines.plan import CompiledSize

logger = logging.getLogger(__name__)

ANSWER_S = 1.0
"""Seconds a request waits for replicas that have not answered yet; without an answer `auto` means torch."""
QUARANTINE_S = 60.0
"""Seconds in which only requests that name tvm use a compiled UNet that failed."""


class CompiledSizes:
    """Asks each compiled deployment once, and again some time after it failed."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._answers: dict[str, tuple[CompiledSize, ...]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._quarantined: dict[str, float] = {}

    async def available_sizes(self) -> list[CompiledSize]:
        """Sizes that compiled UNets can currently run."""
        now = asyncio.get_running_loop().time()
        for component in [c for c, until in self._quarantined.items() if until <= now]:
            del self._quarantined[component]
            self._answers.pop(component, None)  # asked again
        for component in self._graph.compiled_components:
            if component not in self._answers and component not in self._quarantined:
                task = self._asking.get(component)
                if task is None or task.done():
                    self._asking[component] = asyncio.create_task(self._ask(component))
        if running := [task for task in self._asking.values() if not task.done()]:
            await asyncio.wait(running, timeout=ANSWER_S)
        return [
            replace(size, speedup=0.0) if component in self._quarantined else size
            for component, sizes in self._answers.items()
            for size in sizes
        ]

    def quarantine(self, component: str) -> None:
        """A compiled UNet failed: for a while `auto` does not choose it."""
        self._quarantined[component] = asyncio.get_running_loop().time() + QUARANTINE_S

    async def _ask(self, component: str) -> None:
        try:
            sizes = await self._graph.compiled_sizes(component)
            # They were measured against torch on the CPU: beside a GPU they are for requests that name tvm.
            if sizes and await self._graph.device(component) != "cpu":
                sizes = tuple(replace(size, speedup=0.0) for size in sizes)
        except Exception as error:  # whatever it is, torch draws
            logger.warning("compiled %s does not answer: %s", component, error)
            self.quarantine(component)
        else:
            self._answers[component] = tuple(size for size in sizes if size.component == component)
