"""The loop of a denoiser replica: asyncio around step engines, without Ray.

Requests enter with `submit` or `watch`. Their jobs are prepared on threads beside; while any are inside, one task ticks
the engine of the oldest. Engines are touched on the worker's thread alone, so a job that arrives during a tick joins
after it, and one that leaves is gone after it.

On a GPU a tick is only queued when it returns. The next one is queued behind it while it runs, and no further; what
came of a tick is told when the device has done it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deployments.graph import Progress
from deployments.replicas.reads import Reads
from deployments.replicas.throughput import Throughput
from deployments.replicas.worker import Worker
from pipelines.errors import OverloadedError, SdgraphError
from pipelines.plan import StagePlan

if TYPE_CHECKING:
    from pipelines.control.types import ControlHint
    from pipelines.engine.engine import StepEngine, TickReport
    from pipelines.engine.job import DenoiseJob
    from pipelines.sampling.latents import Latents
    from pipelines.text.conditioning import Conditioning

logger = logging.getLogger(__name__)

MOST_RETRY_AFTER_S = 60
"""Upper bound of `Retry-After` in seconds: by then other replicas may have started."""
PREPARING_THREADS = 4
"""Threads that prepare jobs: several, so that a slow preparation delays no other."""


@dataclass(frozen=True)
class Work:
    """One stage to run, with what it needs."""

    stage: StagePlan
    conditioning: Conditioning
    latents: Latents | None = None
    """None for a picture from text; else where the stage begins."""
    hints: Sequence[ControlHint] = ()
    """The maps of the stage's controls."""
    expires: float = math.inf
    """The time at which the caller stops waiting, in seconds of Unix time."""


@dataclass(frozen=True)
class Update:
    """Progress of a watched stage."""

    progress: Progress
    latents: Latents | None
    """Where the picture stands, if previews were asked for."""


@dataclass
class _Request:
    """Work whose job is in an engine, or about to be."""

    work: Work
    started: Callable[[], None]
    result: asyncio.Future[Latents]
    job: DenoiseJob | None = None
    leaving: bool = False
    """Whether its last tick is queued: it has left its engine, and its result is being copied."""
    updates: asyncio.Queue[Update] | None = None
    position: int | None = None

    @property
    def component(self) -> str:
        return self.work.stage.component

    def settle(self, outcome: Latents | BaseException) -> None:
        if self.result.done():  # cancelled meanwhile
            return
        if isinstance(outcome, BaseException):
            self.result.set_exception(outcome)
        else:
            self.result.set_result(outcome)


@dataclass
class _Tick:
    """A tick that was begun."""

    component: str
    report: TickReport
    begun: float
    """By the clock of `time.perf_counter`."""
    progress: dict[str, Progress] = field(default_factory=dict)
    """How far its watched jobs were after it."""

    @property
    def over(self) -> bool:
        return self.report.mark is None or self.report.mark.passed


def _nothing() -> None:
    pass


def _ignore(component: str, report: TickReport, seconds: float) -> None:
    pass


def _itself(error: SdgraphError) -> BaseException:
    return error


class EngineLoop:
    """Ticks engines for as long as there is work. Belongs to one event loop."""

    def __init__(
        self,
        engines: Mapping[str, StepEngine],
        worker: Worker,
        *,
        on_tick: Callable[[str, TickReport, float], None] = _ignore,
        unwrap: Callable[[SdgraphError], BaseException] = _itself,
    ) -> None:
        """Run `engines`, by component id.

        Args:
            engines: what runs the work of each component.
            worker: the thread that touches them.
            on_tick: called on the event loop with each finished tick and its seconds.
            unwrap: turns an error of a tick into the one that its requests raise.
        """
        self._engines = engines
        self._worker = worker
        self._preparers = worker.beside("prepare", PREPARING_THREADS)
        self._reads = Reads(worker)
        self._waiter = worker.beside("wait")
        self._on_tick = on_tick
        self._unwrap = unwrap
        self._requests: dict[str, _Request] = {}  # oldest first
        self._task: asyncio.Task[None] | None = None
        self._last_end = 0.0
        self.throughput = Throughput()

    def __len__(self) -> int:
        """Requests inside."""
        return len(self._requests)

    def outstanding(self, component: str | None = None) -> int:
        """Rows x ticks to come x pixels, of one component or of all."""
        requests = (r for r in self._requests.values() if component in (None, r.component))
        return sum(request.job.outstanding_work for request in requests if request.job)

    async def submit(self, work: Work, started: Callable[[], None] = _nothing) -> Latents:
        """Run a stage, in ticks shared with whoever else is here. Cancelling it frees its rows at the next tick.

        `started` is called when the job was in its first tick.

        Raises:
            OverloadedError: the work that is here already leaves too little time.
            DenoiseError: its tick failed, alone too.
            RequestError: the stage cannot be run as it was asked for.
        """
        async with self._inside(work, started) as request:
            return await request.result

    async def watch(
        self, work: Work, started: Callable[[], None] = _nothing, previews: bool = False
    ) -> AsyncGenerator[Update | Latents, None]:
        """The same, telling of every step; the last item is the result. Closing it frees the rows."""
        updates: asyncio.Queue[Update] = asyncio.Queue()
        async with self._inside(work, started, updates, previews) as request:
            while not request.result.done() or not updates.empty():
                update = asyncio.ensure_future(updates.get())
                try:
                    await asyncio.wait((update, request.result), return_when=asyncio.FIRST_COMPLETED)
                    if update.done():
                        yield update.result()
                finally:
                    update.cancel()
            yield request.result.result()

    @asynccontextmanager
    async def _inside(
        self,
        work: Work,
        started: Callable[[], None],
        updates: asyncio.Queue[Update] | None = None,
        previews: bool = False,
    ) -> AsyncIterator[_Request]:
        """A job in its engine for as long as the block."""
        job_id = uuid.uuid4().hex
        engine = self._engines[work.stage.component]
        request = _Request(work, started, asyncio.get_running_loop().create_future(), updates=updates)
        self._requests[job_id] = request

        def wanted() -> bool:
            return job_id in self._requests

        try:
            held = await self._reads.all(engine.loras.needed(work.stage))
            job = await self._preparers.run(
                engine.prepare, job_id, work.stage, work.conditioning, work.latents, work.hints, wanted
            )
            del held  # the job has what it needs of it
            job.previews = previews
            request.job = await self._worker.run(engine.add, job)
            self._refuse_if_late(work.expires)
            self._ensure_task()
            yield request
        except BaseException:  # cancelled, closed, or failed
            self._worker.submit(_drop, engine, job_id)
            raise
        finally:
            self._requests.pop(job_id, None)

    def _refuse_if_late(self, expires: float) -> None:
        """Jobs run oldest first, so the newest is done when all are: too late, if that is past its deadline."""
        jobs = (request.job for request in self._requests.values())
        late_by = time.time() + self.throughput.seconds_for(job for job in jobs if job) - expires
        if late_by > 0:
            raise _overloaded(late_by)

    def shed(self) -> None:
        """Drop jobs that would miss their deadline even if they were in every tick; others can use their rows."""
        for request in self._requests.values():
            if request.job and not request.leaving:
                late_by = time.time() + self.throughput.least_seconds_for(request.job) - request.work.expires
                if late_by > 0:
                    request.settle(_overloaded(late_by))

    def _ensure_task(self) -> None:
        if self._task is None or self._task.done():
            # A fresh context: the loop outlives the request that started it and must not run under its identity.
            self._task = asyncio.create_task(self._run(), context=contextvars.Context())

    async def _run(self) -> None:
        """Tick engines until no job is left."""
        begun: deque[_Tick] = deque()
        try:
            while (component := self._next_component()) or begun:
                if component:
                    begun.append(await self._begin(component))
                while begun and (len(begun) > 1 or not component or begun[0].over):
                    await self._account(begun.popleft())
        except Exception as error:  # a bug of the loop itself must not leave anybody waiting for ever
            for request in self._requests.values():
                request.settle(error)
            logger.exception("the engine loop failed")

    def _next_component(self) -> str | None:
        """That of the oldest job; None if no engine has any."""
        return next((r.component for r in self._requests.values() if r.job and not r.leaving), None)

    async def _begin(self, component: str) -> _Tick:
        """Tick an engine, and note how far its jobs are now: they may be further when the device has done it."""
        begun = time.perf_counter()
        report = await self._worker.run(self._engines[component].tick)
        tick = _Tick(component, report, begun)
        for job in report.advanced:
            if request := self._requests.get(job.id):
                request.started()
                if request.updates is not None:
                    tick.progress[job.id] = Progress(component, job.steps_done, job.steps)
        for job in (*(fetched.job for fetched in report.finished), *(job for job, _ in report.failed)):
            if request := self._requests.get(job.id):
                request.leaving = True
        return tick

    async def _account(self, tick: _Tick) -> None:
        """What follows from a tick when the device has done it: times, progress, results."""
        report = tick.report
        if report.mark is not None and not report.mark.passed:
            await self._waiter.run(report.mark.wait)
        end = time.perf_counter()
        seconds, self._last_end = end - max(tick.begun, self._last_end), end  # what it waited for others is theirs
        if report.rows:
            self.throughput.record(report.advanced, seconds)
        self._on_tick(tick.component, report, seconds)
        self.shed()
        self._tell(tick)
        for fetched in report.finished:
            if request := self._requests.pop(fetched.job.id, None):
                try:
                    request.settle(fetched.result())
                except SdgraphError as no_picture:
                    request.settle(no_picture)
        for job, error in report.failed:
            if request := self._requests.pop(job.id, None):
                request.settle(self._unwrap(error))

    def _tell(self, tick: _Tick) -> None:
        """Step i of n to the watchers of jobs that ran, their place in the queue to those that wait."""
        previews = {fetched.job.id: fetched for fetched in tick.report.previews}
        for job_id, progress in tick.progress.items():
            request = self._requests.get(job_id)
            if request is not None and request.updates is not None:
                latents = previews[job_id].preview() if job_id in previews else None
                request.updates.put_nowait(Update(progress, latents))
        for position, (job_id, request) in enumerate(self._requests.items()):
            waits = job_id not in tick.progress and not request.leaving
            if waits and request.updates is not None and request.position != position:
                request.position = position
                request.updates.put_nowait(Update(Progress(request.component, 0, 0, position), None))


def _overloaded(late_by_s: float) -> OverloadedError:
    return OverloadedError(min(math.ceil(late_by_s), MOST_RETRY_AFTER_S))


def _drop(engine: StepEngine, job_id: str) -> None:
    """Remove a job that no caller waits for from its engine; its rows are free at the next tick."""
    if job := engine.cancel(job_id):
        logger.info("job cancelled at step %d/%d", job.steps_done, job.steps)
