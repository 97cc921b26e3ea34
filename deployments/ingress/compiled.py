"""The sizes that the replicas of compiled UNets have reported."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from deployments.graph import Graph
from pipelines.compiling import CompileReport, CompilingSize, RefusedSize, WantedProgram
from pipelines.plan import CompiledSize, GenerationPlan

logger = logging.getLogger(__name__)

ANSWER_S = 1.0
"""Seconds a request waits for replicas that have not answered yet; without an answer `auto` means torch."""
QUARANTINE_S = 60.0
"""Seconds in which only requests that name tvm use a compiled UNet that failed."""
UNFINISHED = ("waiting", "compiling", "loading")


class CompiledSizes:
    """Asks each compiled deployment once, again some time after it failed, and while it has something compiled."""

    def __init__(self, graph: Graph, on_demand: bool = False) -> None:
        """Ask the deployments of `graph`, which compile what they lack if it is wanted `on_demand`."""
        self._graph = graph
        self._on_demand = on_demand
        self._answers: dict[str, CompileReport] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._quarantined: dict[str, float] = {}
        self._on_a_gpu: set[str] = set()

    async def available_sizes(self) -> list[CompiledSize]:
        """Sizes that compiled UNets can currently run."""
        now = asyncio.get_running_loop().time()
        for component in [c for c, until in self._quarantined.items() if until <= now]:
            del self._quarantined[component]
            self._answers.pop(component, None)  # asked again
        for component in self._graph.compiled_components:
            answer = self._answers.get(component)
            if component not in self._quarantined and (answer is None or _is_unfinished(answer)):
                self._ask_once(component)
        first = [task for component, task in self._asking.items() if component not in self._answers and not task.done()]
        if first:
            await asyncio.wait(first, timeout=ANSWER_S)
        return [
            replace(size, speedup=0.0) if component in self._quarantined else size
            for component, answer in self._answers.items()
            for size in answer.sizes
        ]

    def pending(self) -> list[CompilingSize]:
        """Sizes that are being compiled, or could not be."""
        return [size for answer in self._answers.values() for size in answer.pending]

    def refused(self) -> list[RefusedSize]:
        """Sizes whose programs the replicas do not run, with reasons."""
        return [size for answer in self._answers.values() for size in answer.refused]

    def want_what_lacks(self, plan: GenerationPlan) -> None:
        """Have compiled what a request would have run on, where that is done on demand."""
        if not self._on_demand:
            return
        for stage in plan.stages:
            component, wanted = stage.component, WantedProgram.of(stage)
            answer = self._answers.get(component)
            there = answer is not None and any(wanted.is_of(size) for size in answer.sizes)
            if component in self._graph.compiled_components and component not in self._on_a_gpu and not there:
                self._ask_once(component, wanted)

    def quarantine(self, component: str) -> None:
        """A compiled UNet failed: for a while `auto` does not choose it."""
        self._quarantined[component] = asyncio.get_running_loop().time() + QUARANTINE_S

    def _ask_once(self, component: str, *wanted: WantedProgram) -> None:
        task = self._asking.get(component)
        if wanted and task is not None and not task.done():
            self._asking[component] = asyncio.create_task(self._ask(component, wanted, task))
        elif task is None or task.done():
            self._asking[component] = asyncio.create_task(self._ask(component, wanted))

    async def _ask(
        self, component: str, wanted: tuple[WantedProgram, ...], before: asyncio.Task[None] | None = None
    ) -> None:
        try:
            if before is not None:
                await before
            if component not in self._answers and await self._graph.device(component) != "cpu":
                self._on_a_gpu.add(component)
            answer = await self._graph.compile_report(
                component=component, wanted=() if component in self._on_a_gpu else wanted
            )
        except Exception as error:  # whatever it is, torch draws
            logger.warning("compiled %s does not answer: %s", component, error)
            self.quarantine(component)
        else:
            # They were measured against torch on the CPU: beside a GPU they are for requests that name tvm.
            if component in self._on_a_gpu:
                answer = replace(answer, sizes=tuple(replace(size, speedup=0.0) for size in answer.sizes))
            self._answers[component] = answer


def _is_unfinished(answer: CompileReport) -> bool:
    return any(size.state in UNFINISHED for size in answer.pending)
