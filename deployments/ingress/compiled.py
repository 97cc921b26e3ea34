"""What the replicas of compiled UNets can draw, as far as they have said."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.plan import CompiledSize

logger = logging.getLogger("sdgraph.ingress")

PATIENCE_S = 1.0
"""How long a request waits for replicas that have not answered yet; without an answer `auto` means torch."""
DISTRUST_S = 60.0
"""How long a compiled UNet that failed is left alone."""


class CompiledSizes:
    """Asks each deployment once, and again some time after it failed."""

    def __init__(self, handles: Mapping[str, Any], torch_handles: Mapping[str, Any]) -> None:
        """Ask `handles`, by component id; several components may share one. `torch_handles` run the same UNets."""
        self.handles = handles
        self._torch_handles = torch_handles
        self._answers: dict[str, tuple[CompiledSize, ...]] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._distrusted: dict[str, float] = {}

    async def known(self) -> list[CompiledSize]:
        """What is on offer now."""
        now = asyncio.get_running_loop().time()
        for component in [c for c, until in self._distrusted.items() if until <= now]:
            del self._distrusted[component]
            self._answers.pop(component, None)  # asked anew
        for component in self.handles:
            if component not in self._answers and component not in self._distrusted:
                task = self._asking.get(component)
                if task is None or task.done():
                    self._asking[component] = asyncio.create_task(self._ask(component))
        if running := [task for task in self._asking.values() if not task.done()]:
            await asyncio.wait(running, timeout=PATIENCE_S)
        return [
            replace(size, speedup=0.0) if component in self._distrusted else size
            for component, sizes in self._answers.items()
            for size in sizes
        ]

    def distrust(self, component: str) -> None:
        """A compiled UNet failed: for a while only who names tvm is sent there."""
        self._distrusted[component] = asyncio.get_running_loop().time() + DISTRUST_S

    async def _ask(self, component: str) -> None:
        try:
            sizes = await self.handles[component].compiled_sizes.remote()
            # They were measured against torch on the CPU: beside a GPU they are for who asks for them by name.
            if sizes and await self._torch_handles[component].device.remote() != "cpu":
                sizes = [replace(size, speedup=0.0) for size in sizes]
        except Exception as error:  # whatever it is, torch draws
            logger.warning("compiled %s does not answer: %s", component, error)
            self.distrust(component)
        else:
            self._answers[component] = tuple(size for size in sizes if size.component == component)
