"""A request in flight, whose caller can watch and interrupt it."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from deployments.access.caller import Caller
from deployments.access.caller_state import Order
from deployments.api.a1111.translation import TranslatedRequest
from deployments.graph import Progress
from deployments.ingress.compose import Preview, Watcher
from deployments.ingress.ingress import Generated, Ingress, Restarted, Watched


class Job:
    """The pictures of one request. All are in flight at once and share ticks; `skip` leaves out a batch."""

    def __init__(self, request: TranslatedRequest) -> None:
        self.id = uuid.uuid4().hex
        self._request = request
        self._began = time.time()
        self._steps: dict[int, tuple[int, int]] = {}
        self._finished: dict[int, Generated] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._skipped = self._interrupted = False
        self._preview: Preview | None = None
        self.wants_preview = False

    @property
    def first(self) -> int:
        """The first picture that is not finished or left out."""
        return next((i for i, task in self._tasks.items() if not task.done()), 0)

    def follow(self, order: Order) -> None:
        """See `deployments.access.caller_state.Work.follow`."""
        if order == "show":
            self.wants_preview = self._request.options.live_previews_enable is not False
            return
        size, first = self._request.batch_size, self.first
        self._interrupted |= order == "interrupt"
        self._skipped |= order == "skip"
        for i, task in self._tasks.items():
            if order == "interrupt" or i // size == first // size:
                task.cancel()

    def state(self) -> dict[str, Any]:
        """See `deployments.access.caller_state.Work.state`; shares are of 1, times in seconds."""
        count, first = self._request.count, self.first
        shares = [self._share(i) for i in range(count)]
        step, steps = self._steps.get(first, (0, 0))
        shown = base64.b64encode(self._preview.data).decode() if self._preview else None
        return {
            "began": self._began,
            "progress": sum(shares) / count,
            "skipped": self._skipped,
            "interrupted": self._interrupted,
            "batches": count // self._request.batch_size,
            "batch": first // self._request.batch_size,
            "step": step,
            "steps": steps or self._request.params.steps or 0,
            "image": shown,
        }

    def _share(self, index: int) -> float:
        if index in self._tasks and self._tasks[index].done():
            return 1.0
        step, steps = self._steps.get(index, (0, 1))
        return step / max(steps, 1)

    async def draw(self, ingress: Ingress, caller: Caller) -> list[Generated]:
        """The pictures, without those that an order ended before they were finished.

        Raises:
            Exception: the first picture that failed, whose error ends the others.
        """
        series = [
            ingress.watch(params, _OnDemand(None, params.output_format, self, i), caller)
            for i, params in enumerate(self._request.each())
        ]
        await anext(series[0])  # a bad request is refused here, before the others are begun
        async with ingress.caller_state.at_work(caller.key, self):
            self._tasks = {i: asyncio.create_task(self._one(i, items)) for i, items in enumerate(series)}
            try:
                await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
                for task in self._tasks.values():
                    if task.done() and not task.cancelled() and (error := task.exception()):
                        raise error
            finally:
                for task in self._tasks.values():
                    task.cancel()
                await asyncio.wait(self._tasks.values())
                for items in series:  # of a task that was cancelled before it began
                    await items.aclose()
        return [self._finished[i] for i in sorted(self._finished)]

    async def _one(self, index: int, items: AsyncGenerator[Watched, None]) -> None:
        async with aclosing(items):
            async for item in items:
                match item:
                    case Progress():
                        self._steps[index] = item.step, item.steps
                    case Restarted():
                        self._steps.pop(index, None)
                    case Preview():
                        self._preview = item
                    case Generated():
                        self._finished[index] = item


@dataclass(frozen=True)
class _OnDemand(Watcher):
    """Previews that somebody has asked for since the last one, of the first picture that is not finished."""

    job: Job | None = None
    index: int = 0

    def wants_preview(self, stage: int, step: int, steps: int) -> bool:
        job = self.job
        if job is None or not job.wants_preview or job.first != self.index:
            return False
        job.wants_preview = False
        return True
