"""Pictures that are sent to be enlarged: decided, admitted, enlarged by a model's deployment or by Pillow here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from config.catalog import Catalog
from deployments.access.caller import ANONYMOUS, Caller
from deployments.access.limits import UsageLimiter
from deployments.graph import Graph
from deployments.ingress.deadline import Deadline
from deployments.ingress.health import Health
from deployments.ingress.limits import IngressLimits
from deployments.ingress.pending import Pending
from deployments.ingress.wake import Wake
from deployments.ray_compat import cause_of, replica_died
from deployments.telemetry.metrics import metrics
from deployments.telemetry.stages import StageTime, Timed, stopwatch
from pipelines.pictures.enlarging import enlarged_file
from pipelines.pictures.images import EncodedImage, check_image
from pipelines.plan import SourcePicture
from pipelines.upscale import UpscaleParams, UpscalePlan, plan_upscale

logger = logging.getLogger(__name__)

RESIZING_AT_ONCE = 2
"""Pictures that Pillow resizes in an ingress at the same time: each may take some 200 MB."""
Sign = Callable[[EncodedImage, UpscalePlan, bytes], Awaitable[EncodedImage]]


@dataclass(frozen=True)
class Upscaled:
    """A larger picture."""

    image: EncodedImage
    plan: UpscalePlan
    seconds: float
    times: tuple[StageTime, ...]


class Upscaling:
    """Enlarges pictures over the graph."""

    def __init__(
        self,
        *,
        graph: Graph,
        catalog: Callable[[], Catalog],
        usage: UsageLimiter,
        wake: Wake,
        health: Health,
        sign: Sign,
        limits: IngressLimits,
    ) -> None:
        """Know the ingress's parts."""
        self._graph = graph
        self._catalog = catalog
        self._usage = usage
        self._wake = wake
        self._health = health
        self._sign = sign
        self._limits = limits
        self._resizing = asyncio.Semaphore(RESIZING_AT_ONCE)

    async def upscale(self, params: UpscaleParams, caller: Caller = ANONYMOUS) -> Upscaled:
        """Enlarge one picture, within the caller's deadline or the server's own, whichever is less.

        Raises:
            RequestError: the request cannot be served.
            DeadlineError: it took too long.
            RateLimitedError: the caller's quota is used up.
            UnstartableError: the upscaler's deployment keeps failing to start.
        """
        begin = time.perf_counter()
        file = await asyncio.to_thread(check_image, params.image, "image", self._limits.max_image_pixels)
        source = SourcePicture.of(params.image, file.digital_source_type)
        size = (file.width, file.height)
        plan = plan_upscale(params, size, source, file.infotext, self._catalog(), self._limits.max_image_pixels)
        if caller.key is not None:
            await self._usage.pixel_steps(caller.key, plan.pixel_steps)
        deadline = Deadline(min(caller.deadline_s, self._limits.deadline_s))
        drawn = await deadline.bound(self._enlarged(plan, params.image))
        image = await deadline.bound(self._sign(drawn.value, plan, params.image))
        seconds = time.perf_counter() - begin
        backend = "pillow" if plan.component is None else "torch"
        metrics().request_seconds.observe(seconds, {"model": plan.upscaler, "backend": backend})
        return Upscaled(image, plan, seconds, drawn.times)

    async def _enlarged(self, plan: UpscalePlan, image: bytes) -> Timed[EncodedImage]:
        if plan.component is None:
            async with self._resizing:
                with stopwatch("resize", plan.upscaler) as watch:
                    return watch.timed(await asyncio.to_thread(enlarged_file, image, plan))
        self._wake.all_of(plan)
        try:
            return await self._over_the_graph(plan, plan.component, image)
        except Exception as error:
            if not replica_died(cause := cause_of(error)):
                raise
            logger.warning("a replica died, trying again: %s", type(cause).__name__)
            metrics().retries.inc(1, {"reason": "replica died"})
        return await self._over_the_graph(plan, plan.component, image)

    async def _over_the_graph(self, plan: UpscalePlan, component: str, image: bytes) -> Timed[EncodedImage]:
        visits = self._graph.visits(plan)
        async with Pending(lambda: self._health.check(visits)) as pending:
            call = pending.add(self._graph.upscale_file(component=component, plan=plan, image=image))
            return await pending.wait(call)
