"""The denoiser deployment: an engine loop around step engines."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError

from config.catalog import Catalog
from deployments.autoscaling import OUTSTANDING, PACE
from deployments.replicas.base import Runtime, Wakeable, Worker
from deployments.replicas.pace import Pace
from deployments.replicas.remote_control import RemoteControl
from deployments.telemetry.metrics import metrics
from deployments.telemetry.stages import Progress, Stopwatch, Traced, stopwatch
from pipelines.errors import OverloadedError
from pipelines.plan import CompiledSize, GenerationPlan, StagePlan

if TYPE_CHECKING:
    from pipelines.control.nets import ControlNets
    from pipelines.control.types import ControlHint
    from pipelines.engine.engine import StepEngine, TickReport
    from pipelines.engine.job import DenoiseJob
    from pipelines.sampling.latents import Latents
    from pipelines.text.conditioning import Conditioning

logger = logging.getLogger("sdgraph.denoiser")

LONGEST_RETRY_S = 60


@dataclass
class _Waiting:
    """A request whose job is in an engine."""

    component: str
    result: asyncio.Future[Latents]
    watch: Stopwatch
    expires: float
    job: DenoiseJob | None = None
    progress: asyncio.Queue[Progress] | None = None
    previews: bool = False
    position: int | None = None


class DenoiserDeployment(Wakeable):
    """Hosts one UNet, or all of them when components are grouped by role.

    One loop ticks for as long as there are jobs. Engines are touched on the worker's thread alone, so a job that
    arrives during a tick joins after it, and a cancelled one leaves after it.
    """

    def __init__(
        self,
        components: Sequence[str],
        catalog: Catalog,
        runtime: Runtime,
        max_rows: int,
        controlnets: Mapping[str, Any] | None = None,
        strict: bool = False,
        compiled: Path | None = None,
    ) -> None:
        """Load the UNets.

        Args:
            components: ids of the UNets.
            catalog: says what they are.
            runtime: how this process computes.
            max_rows: most rows of a tick; memory may allow fewer.
            controlnets: UNet id -> handle of the deployment of its ControlNets; None hosts them in this process.
            strict: equal bytes whatever the neighbours.
            compiled: run the programs of this folder (backend tvm), of the UNets that have some; None runs torch.
        """
        # torch is a replica's affair: building the graph goes without
        from pipelines.assembly import load_controlnets, load_engine
        from pipelines.control.nets import ColocatedControl

        device = self._device = runtime.apply()
        self._compiled: tuple[CompiledSize, ...] = ()
        if compiled is None:
            self._engines = {c: load_engine(catalog, c, device, max_rows, strict) for c in components}
        else:
            self._engines = self._load_compiled(catalog, components, compiled, max_rows, strict)
        self._colocated: dict[str, ControlNets] = {}
        for component, engine in self._engines.items():
            if controlnets is None and (own := catalog.controlnets_of(component)):
                self._colocated[component] = load_controlnets(catalog, own, device)
                engine.control = ColocatedControl(self._colocated[component])
            elif controlnets and component in controlnets:
                engine.control = RemoteControl(controlnets[component])
        self._worker = Worker()
        self._waiting: dict[str, _Waiting] = {}  # oldest first
        self._loop: asyncio.Task[None] | None = None
        self._pace = Pace()

    def _load_compiled(
        self, catalog: Catalog, components: Sequence[str], folder: Path, max_rows: int, strict: bool
    ) -> dict[str, StepEngine]:
        from pipelines.assembly import load_compiled
        from pipelines.backends.tvm.artifacts import ArtifactCache

        cache = ArtifactCache(folder)
        loaded = {c: load_compiled(catalog, c, cache, max_rows, strict) for c in components}
        self._compiled = tuple(size for unet in loaded.values() if unet for size in unet.sizes)
        return {component: unet.engine for component, unet in loaded.items() if unet}

    async def check_health(self) -> None:
        """Serve asks every few seconds. Gauges are set here: Ray's agent forgets one that is not set again."""
        for component in self._engines:
            of = {"component": component}
            metrics().outstanding.set(self._outstanding(component), of)
            metrics().programs.set(sum(size.component == component for size in self._compiled), of)

    async def device(self) -> str:
        """`cpu` or `cuda`."""
        return self._device

    async def compiled_sizes(self) -> tuple[CompiledSize, ...]:
        """What this replica's programs can draw, with what was measured when it started."""
        return self._compiled

    async def prepare(self, plan: GenerationPlan, photo: bytes) -> Traced[ControlHint]:
        """The control map of a request, where ControlNets live in this process."""
        stage = plan.stages[0]
        nets = self._colocated[stage.component]
        assert stage.control is not None
        with stopwatch("controlnet_prepare", stage.control.component) as watch:
            hint = await self._worker.stage(watch, nets.prepare, photo, stage.control, plan.width, plan.height)
        return watch.trace(hint)

    async def denoise(
        self,
        stage: StagePlan,
        conditioning: Traced[Conditioning],
        latents: Traced[Latents] | None,
        hint: Traced[ControlHint] | None = None,
        expires: float = math.inf,
    ) -> Traced[Latents]:
        """Run one stage, in ticks shared with whoever else is here.

        Args:
            stage: what to do.
            conditioning: what the text says.
            latents: None for a picture from text; else where the stage begins.
            hint: the control map, where the stage has a ControlNet.
            expires: when nobody waits for the picture any more, in seconds of Unix time.

        Raises:
            OverloadedError: the work that is here already leaves too little time.
        """
        with stopwatch("denoise", stage.component) as watch:
            async with self._job(watch, stage, conditioning, latents, hint, expires) as waiting:
                result = await waiting.result
        return watch.trace(result, conditioning, latents, hint)

    async def denoise_watched(
        self,
        stage: StagePlan,
        conditioning: Traced[Conditioning],
        latents: Traced[Latents] | None,
        hint: Traced[ControlHint] | None = None,
        previews: bool = False,
        expires: float = math.inf,
    ) -> AsyncIterator[Progress | Traced[Latents]]:
        """The same, telling its progress on the way; the last item is the result."""
        with stopwatch("denoise", stage.component) as watch:
            async with self._job(watch, stage, conditioning, latents, hint, expires) as waiting:
                progress: asyncio.Queue[Progress] = asyncio.Queue()
                waiting.progress = progress
                waiting.previews = previews
                while not waiting.result.done() or not progress.empty():
                    news = asyncio.ensure_future(progress.get())
                    await asyncio.wait((news, waiting.result), return_when=asyncio.FIRST_COMPLETED)
                    if news.done():
                        yield news.result()
                    news.cancel()
                result = waiting.result.result()
        yield watch.trace(result, conditioning, latents, hint)

    @asynccontextmanager
    async def _job(
        self,
        watch: Stopwatch,
        stage: StagePlan,
        conditioning: Traced[Conditioning],
        latents: Traced[Latents] | None,
        hint: Traced[ControlHint] | None,
        expires: float,
    ) -> AsyncIterator[_Waiting]:
        """A job in its engine for as long as the block; leaving early frees its rows at the next tick."""
        job_id = uuid.uuid4().hex
        engine = self._engines[stage.component]
        waiting = _Waiting(stage.component, asyncio.get_running_loop().create_future(), watch, expires)
        self._waiting[job_id] = waiting
        try:
            # Reading a LoRA from disk must not hold up the ticks of others.
            loras = await asyncio.to_thread(engine.loras.mixture, stage) if stage.loras else ()
            start = latents.value if latents is not None else None
            control = hint.value if hint is not None and stage.control else None
            metrics().cache("lora", stage.component, engine.loras.cache)
            waiting.job = await self._worker.run(engine.add, job_id, stage, conditioning.value, start, loras, control)
            self._refuse_if_late(expires)
            self._ensure_loop()
            yield waiting
        except BaseException:  # cancelled, or failed
            self._worker.submit(_drop, engine, job_id)
            raise
        finally:
            self._waiting.pop(job_id, None)

    def _refuse_if_late(self, expires: float) -> None:
        """Jobs run oldest first, so the newest is done when all is: never, if that is past its deadline."""
        jobs = (waiting.job for waiting in self._waiting.values())
        over = time.time() + self._pace.seconds_for(job for job in jobs if job) - expires
        if over > 0:
            raise _overloaded(over)

    def _shed(self) -> None:
        """Let go of jobs that would not be done in time even if they were in every tick: others can use theirs."""
        for waiting in self._waiting.values():
            if waiting.job and not waiting.job.done:
                over = time.time() + self._pace.least_seconds_for(waiting.job) - waiting.expires
                if over > 0:
                    _settle(waiting.result, _overloaded(over))

    def _ensure_loop(self) -> None:
        if self._loop is None or self._loop.done():
            # A fresh context: the loop outlives the request that started it and must not run under its identity.
            self._loop = asyncio.create_task(self._run(), context=contextvars.Context())

    async def _run(self) -> None:
        try:
            while oldest := next((w for w in self._waiting.values() if w.job), None):
                begin = time.perf_counter()
                report = await self._worker.run(self._engines[oldest.component].tick)
                self._count(oldest.component, report, time.perf_counter() - begin)
                self._shed()
                self._tell(oldest.component, report)
                for job in report.finished:
                    if waiting := self._waiting.pop(job.id, None):
                        _settle(waiting.result, job.result())
                for job, error in report.failed:
                    if waiting := self._waiting.pop(job.id, None):
                        # A ControlNet that died twice is known to the ingress as what it is.
                        cause = error.__cause__
                        _settle(waiting.result, cause if isinstance(cause, RayActorError) else error)
        except Exception as error:  # a fault of the loop itself must not leave anybody waiting for ever
            for waiting in self._waiting.values():
                _settle(waiting.result, error)
            raise

    def _count(self, component: str, report: TickReport, seconds: float) -> None:
        if report.rows:
            metrics().tick(component, report.rows, report.padding, report.seconds)
            self._pace.note(report.advanced, seconds)

    def _outstanding(self, component: str | None = None) -> int:
        """Rows x ticks to come x pixels, of one component or of all."""
        jobs = (w.job for w in self._waiting.values() if component in (None, w.component))
        return sum(job.outstanding_work for job in jobs if job)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands to deployments/autoscaling.py."""
        return {OUTSTANDING: float(self._outstanding()), PACE: self._pace.overall.value}

    def _tell(self, component: str, report: TickReport) -> None:
        """Tell the watchers: step i of n to those who ran, their place to those who wait."""
        ran = {job.id for job in report.advanced}
        for job in report.advanced:
            if waiting := self._waiting.get(job.id):
                waiting.watch.start_work()
            if waiting and waiting.progress is not None:
                preview = job.result() if waiting.previews and not job.done else None
                waiting.progress.put_nowait(Progress(component, job.steps_done, job.steps, latents=preview))
        for position, (job_id, waiting) in enumerate(self._waiting.items()):
            if job_id not in ran and waiting.progress is not None and waiting.position != position:
                waiting.position = position
                waiting.progress.put_nowait(Progress(waiting.component, 0, 0, position))


def _overloaded(over_s: float) -> OverloadedError:
    return OverloadedError(min(math.ceil(over_s), LONGEST_RETRY_S))


def _drop(engine: StepEngine, job_id: str) -> None:
    """Take a job nobody waits for any more out of its engine; its rows are free at the next tick."""
    if job := engine.cancel(job_id):
        logger.info("left at step %d of %d", job.steps_done, job.steps)


def _settle(future: asyncio.Future[Latents], outcome: Latents | BaseException) -> None:
    if future.done():  # cancelled meanwhile
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
