"""The ingress: one request in, a chain of deployments composed for it, one picture out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.serve.schema import DeploymentStatus

from config.catalog import Catalog
from deployments.auth import KeyRing, RateLimit
from deployments.http import create_http_app
from deployments.observability import Span
from pipelines.errors import DeadlineError
from pipelines.images import EncodedImage, check_image
from pipelines.plan import SEED_LIMIT, GenerationParams, GenerationPlan
from pipelines.planning import PlanLimits, make_plan

Readiness = Callable[[], Awaitable[tuple[bool, Mapping[str, str]]]]


@dataclass(frozen=True)
class IngressLimits:
    """What the ingress allows, from the settings."""

    plan: PlanLimits
    max_body_bytes: int
    max_image_pixels: int
    deadline_s: float


@dataclass(frozen=True)
class Generated:
    """A finished picture as the HTTP layer needs it."""

    image: EncodedImage
    plan: GenerationPlan
    seconds: float
    spans: tuple[Span, ...]


class Ingress:
    """Composes the graph for each request. Deployments are reached through handles, by component id."""

    def __init__(
        self,
        handles: Mapping[str, Any],
        catalog: Catalog,
        limits: IngressLimits,
        keys: Mapping[str, str],
        rate_limit: str | None,
        readiness: Readiness,
    ) -> None:
        self._handles = handles
        self.catalog = catalog
        self.limits = limits
        self.keys = KeyRing(keys)
        self.rate = RateLimit(rate_limit)
        self.readiness = readiness

    def __serve_build_asgi_app__(self) -> Any:
        return create_http_app(self)

    async def generate(self, params: GenerationParams) -> Generated:
        """Draw one picture.

        Raises:
            RequestError: the request cannot be served.
            DeadlineError: it took too long.
        """
        begin = time.perf_counter()
        plan = make_plan(params, self.catalog, self.limits.plan)
        for param, data in (("image", params.image), ("controlnet_image", params.controlnet_image)):
            if data is not None:
                # At the door and in full: a damaged picture must not fail on a GPU replica after it queued there.
                await asyncio.to_thread(check_image, data, param, self.limits.max_image_pixels)
        try:
            async with asyncio.timeout(self.limits.deadline_s):
                image = await self._compose(plan, params.image, params.controlnet_image)
        except TimeoutError:
            raise DeadlineError(f"not finished within {self.limits.deadline_s:g} seconds") from None
        return Generated(image.value, plan, time.perf_counter() - begin, image.spans)

    async def generate_series(self, params: GenerationParams, count: int) -> list[Generated]:
        """`count` pictures of consecutive seeds; they share ticks."""
        first = make_plan(params, self.catalog, self.limits.plan).seed
        requests = [replace(params, seed=(first + i) % SEED_LIMIT) for i in range(count)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.generate(request)) for request in requests]
        return [task.result() for task in tasks]

    async def _compose(self, plan: GenerationPlan, image: bytes | None, photo: bytes | None) -> Any:
        """Chain the calls. Responses are handed on un-awaited, so no tensor passes through this process."""
        text_encoder, vae = self._handles[plan.text_encoder], self._handles[plan.vae]
        latents = vae.encode.remote(plan, image) if image is not None else None
        for stage in plan.stages:
            conditioning = text_encoder.encode.remote(plan.text_encoder, stage)
            hint = self._handles[stage.control.component].prepare.remote(plan, photo) if stage.control else None
            latents = self._handles[stage.component].denoise.remote(stage, conditioning, latents, hint)
        return await vae.decode.remote(plan, latents)


_SERVING = (DeploymentStatus.HEALTHY, DeploymentStatus.UPSCALING, DeploymentStatus.DOWNSCALING)


async def deployment_states() -> tuple[bool, Mapping[str, str]]:
    """Whether every deployment of this application can serve, and the state of each in Serve's own words."""
    application = serve.get_replica_context().app_name
    deployments = serve.status().applications[application].deployments
    states = {name: f"{d.status.value}: {d.message}".rstrip(": ") for name, d in deployments.items()}
    return all(d.status in _SERVING for d in deployments.values()), states
