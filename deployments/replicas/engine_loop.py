"""The loop of a denoiser replica, which runs step engines under asyncio. It does not depend on Ray.

Requests enter with `submit` or `watch`. Other threads prepare their jobs. While there are jobs, one task ticks the
engine of the oldest one. Engines are used on the worker's thread only, so a job that arrives or is cancelled during a
tick joins or leaves its engine after it.

On a GPU, a tick returns when its work is queued. While it runs, one further tick is queued behind it. The
results of a tick are reported when the device has completed it.
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
"""Upper bound of `Retry-After` in seconds, after which other replicas may have started."""
PREPARING_THREADS = 4
"""Number of threads that prepare jobs. There are several, so that a slow preparation does not delay others."""


@dataclass(frozen=True)
class Work:
    """One stage to run, with its inputs."""

    stage: StagePlan
    conditioning: Conditioning
    latents: Latents | None = None
    """The latents that the stage begins from; None for a picture from text."""
    hints: Sequence[ControlHint] = ()
    """The control maps of the stage."""
    expires: float = math.inf
    """The time at which the caller stops waiting, in seconds of Unix time."""


@dataclass(frozen=True)
class Update:
    """Progress of a watched stage."""

    progress: Progress
    latents: Latents | None
    """The latents of the picture at this step, if previews were requested."""


@dataclass
class _Request:
    """Work whose job is in an engine, or is being prepared for it."""

    work: Work
    started: Callable[[], None]
    result: asyncio.Future[Latents]
    job: DenoiseJob | None = None
    leaving: bool = False
    """Whether its last tick is queued; then the job has left its engine, and its result is being copied."""
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
    """A tick that has begun."""

    component: str
    report: TickReport
    begun: float
    """When it began, in seconds of `time.perf_counter`."""
    progress: dict[str, Progress] = field(default_factory=dict)
    """Progress of its watched jobs after it, by job id."""

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
    """Ticks engines while there is work. An instance belongs to one event loop."""

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
            engines: the engine of each component.
            worker: the only thread that uses the engines.
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
        """The number of requests that have entered and not left."""
        return len(self._requests)

    def outstanding(self, component: str | None = None) -> int:
        """Remaining work in rows x ticks x pixels, of one component or of all."""
        requests = (r for r in self._requests.values() if component in (None, r.component))
        return sum(request.job.outstanding_work for request in requests if request.job)

    async def submit(self, work: Work, started: Callable[[], None] = _nothing) -> Latents:
        """Run a stage in ticks that it shares with other requests. Cancelling the call frees its rows at the next tick.

        `started` is called after the first tick with this job.

        Raises:
            OverloadedError: the stage would end after its deadline, because of the work that came before it.
            DenoiseError: a tick failed, and failed again with this job alone.
            RequestError: the stage cannot be run as requested.
        """
        async with self._inside(work, started) as request:
            return await request.result

    async def watch(
        self, work: Work, started: Callable[[], None] = _nothing, previews: bool = False
    ) -> AsyncGenerator[Update | Latents, None]:
        """Run a stage like `submit`, and yield an update for every step; the last item is the result.

        Closing the generator frees the rows at the next tick.
        """
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
        """Keep a job in its engine while the block runs."""
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
        """Refuse the newest job if it would end after its deadline.

        Jobs run oldest first, so the newest one ends when all others have ended.

        Raises:
            OverloadedError: it would end too late.
        """
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
            # In a new context: the loop outlives the request that started it, and must not use its id and trace.
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
        except Exception as error:  # even after a bug in the loop itself no request may wait for ever
            for request in self._requests.values():
                request.settle(error)
            logger.exception("the engine loop failed")

    def _next_component(self) -> str | None:
        """The component of the oldest job; None if no engine has a job."""
        return next((r.component for r in self._requests.values() if r.job and not r.leaving), None)

    async def _begin(self, component: str) -> _Tick:
        """Tick an engine, and record its jobs' progress now: later ticks may advance them before the device is done."""
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
        """Wait until the device has completed a tick, then record its duration and report progress and results."""
        report = tick.report
        if report.mark is not None and not report.mark.passed:
            await self._waiter.run(report.mark.wait)
        end = time.perf_counter()
        seconds, self._last_end = end - max(tick.begun, self._last_end), end  # not the wait for the last tick
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
        """Tell the watchers of jobs in the tick their step, and those of waiting jobs their place in the queue."""
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
    """Remove a job from its engine because its caller has left; its rows are free at the next tick."""
    if job := engine.cancel(job_id):
        logger.info("job cancelled at step %d/%d", job.steps_done, job.steps)
