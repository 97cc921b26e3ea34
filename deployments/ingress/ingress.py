"""The ingress: it plans and admits a request, runs it over the graph, and retries it once if need be (GRA-3)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ray.serve.exceptions import BackPressureError

from config.catalog import Catalog
from deployments.access.caller import ANONYMOUS, Caller
from deployments.access.caller_state import CallerState
from deployments.access.keys import KeyRing, Loopback
from deployments.access.limits import KeyLimits, UsageLimiter
from deployments.graph import Graph, Progress
from deployments.ingress.annotating import Annotating
from deployments.ingress.compiled import CompiledSizes
from deployments.ingress.compose import Composition, Preview, Watcher
from deployments.ingress.deadline import Deadline
from deployments.ingress.health import Health, Readiness
from deployments.ingress.library import LibraryWatch
from deployments.ingress.limits import IngressLimits as IngressLimits
from deployments.ingress.limits import LinkStore as LinkStore
from deployments.ingress.limits import SigningFiles as SigningFiles
from deployments.ingress.links import PictureLinks
from deployments.ingress.upscaling import Upscaling
from deployments.ingress.wake import Wake
from deployments.ray_compat import cause_of, replica_died
from deployments.telemetry.logs import LogFormat, show_logs
from deployments.telemetry.metrics import metrics
from deployments.telemetry.stages import StageTime, Timed
from pipelines.acceleration import Acceleration
from pipelines.errors import (
    BackendError,
    DeadlineError,
    OverloadedError,
    RequestError,
    UncompiledError,
    UnstartableError,
)
from pipelines.pictures.images import EncodedImage, check_image
from pipelines.pictures.masks import check_mask
from pipelines.pictures.signing import ContentSigner
from pipelines.plan import SEED_LIMIT, GenerationParams, GenerationPlan, SourcePicture
from pipelines.planning import make_plan
from pipelines.upscale import UpscalePlan

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHANGES_BEFORE_A_PLAN = 2
"""How often a request is planned anew because the library changed meanwhile."""
DECODING_SHARE, MOST_DECODING_S = 0.1, 5.0
"""UNets must be done this share of the time before the deadline, but never more than these seconds before it: after
them the picture is decoded and sent."""


@dataclass(frozen=True)
class Generated:
    """A finished picture."""

    image: EncodedImage
    plan: GenerationPlan
    seconds: float
    """From admission to the finished file."""
    times: tuple[StageTime, ...]


@dataclass(frozen=True)
class Restarted:
    """A replica failed and the request starts again: steps count from 1. The picture is the same (API-8)."""

    stage: str
    """The component that begins."""


Watched = Progress | Restarted | Preview | Generated
"""The items of a watched request: progress, a restart, previews, and at last the picture."""


class Ingress:
    """Draws pictures over the graph. Speaks no HTTP: `deployments/api` does."""

    def __init__(
        self,
        *,
        graph: Graph,
        catalog: Catalog,
        limits: IngressLimits,
        keys_file: Path | None,
        key_limits: KeyLimits,
        readiness: Readiness,
        log_format: LogFormat = "text",
        signing: SigningFiles | None = None,
        links: LinkStore | None = None,
        acceleration: Acceleration | None = None,
        compiles_on_demand: bool = False,
    ) -> None:
        show_logs(log_format)
        self.acceleration = acceleration or Acceleration()
        self.library = LibraryWatch(catalog)
        self.limits = limits
        self.keys = KeyRing(keys_file) if keys_file else Loopback()
        self.usage = UsageLimiter(key_limits)
        self.caller_state = CallerState(key_limits.store)
        self.readiness = readiness
        self.compiled = CompiledSizes(graph, compiles_on_demand)
        self.annotating = Annotating(graph, limits.max_image_pixels, limits.deadline_s)
        self._graph = graph
        self._wake = Wake(graph)
        self._health = Health(readiness)
        self.upscaling = Upscaling(
            graph=graph,
            catalog=lambda: self.catalog,
            usage=self.usage,
            wake=self._wake,
            health=self._health,
            sign=self._signed,
            limits=limits,
        )
        self.links = PictureLinks(links) if links else None
        self._signer = None
        if signing is not None:
            self._signer = ContentSigner(signing.certificates, signing.private_key, signing.timestamp_url)
        self._signing_thread = ThreadPoolExecutor(1, "signing")

    @property
    def catalog(self) -> Catalog:
        """The catalog as it is now, including new files of the library."""
        return self.library.catalog

    async def generate(self, params: GenerationParams, caller: Caller = ANONYMOUS) -> Generated:
        """Draw one picture, within the caller's deadline or the server's own, whichever is less.

        Raises:
            RequestError: the request cannot be served.
            DeadlineError: it took too long.
            OverloadedError: the queue is too long to finish in time.
            BackendError: backend tvm was asked for by name and failed.
            RateLimitedError: the caller's quota is used up.
            UnstartableError: a deployment it needs keeps failing to start.
        """
        async with aclosing(self._draw(params, caller, None)) as items:
            last = [item async for item in items][-1]
        assert isinstance(last, Generated)
        return last

    def watch(
        self, params: GenerationParams, watcher: Watcher, caller: Caller = ANONYMOUS
    ) -> AsyncGenerator[Watched, None]:
        """Draw one picture and yield its progress; closing the generator cancels the work.

        The request is decided and admitted before the first item, so a bad one is refused at once. What goes from
        stage to stage passes through this process, sealed, which that of `generate` does not: a watcher costs that.
        """
        return self._draw(params, caller, watcher)

    async def generate_series(
        self, params: GenerationParams, count: int, caller: Caller = ANONYMOUS
    ) -> list[Generated]:
        """`count` pictures of consecutive seeds; they share ticks."""
        if count == 1:
            return [await self.generate(params, caller)]
        requests = await self._series(params, count)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.generate(request, caller)) for request in requests]
        return [task.result() for task in tasks]

    async def watch_series(
        self, params: GenerationParams, count: int, watcher: Watcher, caller: Caller = ANONYMOUS
    ) -> AsyncGenerator[tuple[int, Watched], None]:
        """The same as a stream; each item has the picture's position. A picture that fails ends all."""
        told: asyncio.Queue[tuple[int, Watched] | Exception | None] = asyncio.Queue()

        async def watch(index: int, request: GenerationParams) -> None:
            try:
                async with aclosing(self.watch(request, watcher, caller)) as items:
                    async for item in items:
                        told.put_nowait((index, item))
                told.put_nowait(None)
            except Exception as error:
                told.put_nowait(error)

        requests = await self._series(params, count)
        tasks = [asyncio.create_task(watch(*numbered)) for numbered in enumerate(requests)]
        try:
            while count:
                match await told.get():
                    case None:
                        count -= 1
                    case Exception() as error:
                        raise error
                    case tuple() as item:
                        yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _series(self, params: GenerationParams, count: int) -> list[GenerationParams]:
        if count == 1:
            return [params]
        first = (await self._plan(params)).seed
        return [replace(params, seed=(first + i) % SEED_LIMIT) for i in range(count)]

    async def _draw(
        self, params: GenerationParams, caller: Caller, watcher: Watcher | None
    ) -> AsyncGenerator[Watched, None]:
        """Admit, compose, and compose once more where that helps; the last item is the picture."""
        begin = time.perf_counter()
        deadline = Deadline(min(caller.deadline_s, self.limits.deadline_s))
        unets_done_by = _unets_done_by(deadline.seconds)
        plan = await deadline.bound(self._admit(params, caller))
        yield Progress(plan.stages[0].component, 0, 0)
        image: Timed[EncodedImage] | None = None
        for first in (True, False):
            composition = Composition(self._graph, plan, params, unets_done_by, watcher, self._health)
            try:
                async with aclosing(composition.run()) as items:
                    while (item := await deadline.bound(anext(items, None))) is not None:
                        if isinstance(item, Timed):
                            image = item
                        else:
                            yield item
                break
            except Exception as error:
                if not first:
                    raise
                plan = self._second_try(params, plan, error)
                yield Restarted(plan.stages[0].component)
        assert image is not None
        file = await deadline.bound(self._signed(image.value, plan, params.image))
        seconds = time.perf_counter() - begin
        metrics().request_seconds.observe(seconds, {"model": plan.model, "backend": plan.stages[0].backend})
        yield Generated(file, plan, seconds, image.times)

    async def _signed(
        self, file: EncodedImage, plan: GenerationPlan | UpscalePlan, source: bytes | None
    ) -> EncodedImage:
        """The file with content credentials, where the operator has a certificate."""
        if self._signer is None:
            return file
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._signing_thread, self._signer.sign, file, plan, source)

    async def _admit(self, params: GenerationParams, caller: Caller) -> GenerationPlan:
        """Decide; check the pictures, which must not fail on a GPU replica after they queued there; charge; wake."""
        plan = await self._plan(params)
        if params.backend.lower() == "auto":
            self.compiled.want_what_lacks(plan)
        for param, data in params.pictures:
            file = await asyncio.to_thread(check_image, data, param, self.limits.max_image_pixels)
            if param == "image":
                source = SourcePicture.of(data, file.digital_source_type)
                plan = plan.model_copy(update={"source": source})
        if params.image is not None and params.mask_image is not None:
            await asyncio.to_thread(check_mask, params.image, params.mask_image)
        if caller.key is not None:
            await self.usage.pixel_steps(caller.key, plan.pixel_steps)
        self._wake.all_of(plan)
        return plan

    async def _plan(self, params: GenerationParams) -> GenerationPlan:
        compiled = await self.compiled.available_sizes()
        if "<" in f"{params.prompt}{params.negative_prompt}{params.prompt_2}{params.negative_prompt_2}":
            await self.library.changed()  # what no embedding is called is text, and no error would tell of a new one
        for _ in range(CHANGES_BEFORE_A_PLAN):
            try:
                plan = make_plan(params, self.catalog, self.limits.plan, compiled)
            except RequestError:  # it may name what is new in the library
                if not await self.library.changed():
                    raise
            else:
                if await self.library.holds(plan):
                    return plan
                await self.library.refresh()
        return make_plan(params, self.catalog, self.limits.plan, compiled)

    def _second_try(self, params: GenerationParams, plan: GenerationPlan, error: Exception) -> GenerationPlan:
        """How to go on after the graph failed; the seed is decided, so it is the same picture.

        What ran on tvm and may run on torch does, also where only the request was more than is compiled. A replica that
        died, of whatever kind, is worth another try: Serve sends it to another one, or to its successor.

        Raises:
            BackendError: the request asked for tvm by name.
            Exception: `error` itself, if another try would fail like this one.
        """
        cause = cause_of(error)
        named = params.backend.lower() == "tvm"
        if isinstance(cause, UncompiledError) and not named:
            logger.info("torch takes over: %s", cause)
            return self._on_torch(params, plan)
        if isinstance(cause, RequestError | DeadlineError | OverloadedError | UnstartableError | BackPressureError):
            raise error
        compiled = [stage.component for stage in plan.stages if stage.backend == "tvm"]
        died = replica_died(cause)
        if compiled and not (died and named):
            for component in compiled:
                self.compiled.quarantine(component)
        if died and (named or not compiled):
            logger.warning("a replica died, trying again: %s", type(cause).__name__)
            metrics().retries.inc(1, {"reason": "replica died"})
            return plan
        if not compiled:
            raise error
        if named:
            raise BackendError(f"backend 'tvm' failed: {cause}. Send backend 'auto' or 'torch'") from error
        logger.warning("backend tvm failed, so torch takes over: %s", cause)
        metrics().retries.inc(1, {"reason": "tvm failed"})
        return self._on_torch(params, plan)

    def _on_torch(self, params: GenerationParams, plan: GenerationPlan) -> GenerationPlan:
        """The same picture, with nothing compiled."""
        again = make_plan(replace(params, seed=plan.seed), self.catalog, self.limits.plan)
        return again.model_copy(update={"source": plan.source})


def _unets_done_by(seconds: float) -> float:
    """When UNets must be done so that a request is finished in so many seconds, in seconds of Unix time."""
    return time.time() + seconds - min(seconds * DECODING_SHARE, MOST_DECODING_S)
