"""The ingress: one request in, a chain of deployments composed for it, one picture out."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from config.catalog import Catalog
from deployments.access.keys import KeyRing, Loopback
from deployments.access.limits import Allowance, KeyLimits
from deployments.api.app import create_http_app
from deployments.api.errors import cause_of
from deployments.api.schemas import ANYBODY, GeneratedImage, GenerationResponse, Wish
from deployments.ingress.compiled import CompiledSizes
from deployments.ingress.pending import last_of_chain
from deployments.ingress.wake import WELL, Health, Readiness, Waking
from deployments.telemetry.logs import LogFormat, show_logs
from deployments.telemetry.metrics import metrics
from deployments.telemetry.stages import Progress, Span, Traced
from pipelines.errors import BackendError, DeadlineError, OverloadedError, RequestError, UnstartableError
from pipelines.pictures.images import EncodedImage, check_image
from pipelines.plan import SEED_LIMIT, GenerationParams, GenerationPlan, StagePlan
from pipelines.planning import PlanLimits, make_plan

logger = logging.getLogger("sdgraph.ingress")

LAST_STAGE_S = 5.0


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

    def response(self) -> GenerationResponse:
        """The reply of the contract."""
        picture = base64.b64encode(self.image.data).decode()
        image = GeneratedImage(index=0, image=picture, random_seed=self.plan.seed)
        return GenerationResponse(images=[image], inference_time=round(self.seconds, 4))


class Ingress:
    """Composes the graph for each request. Deployments are reached through handles, by component id."""

    def __init__(
        self,
        handles: Mapping[str, Any],
        catalog: Catalog,
        limits: IngressLimits,
        keys_file: Path | None,
        key_limits: KeyLimits,
        readiness: Readiness,
        compiled: Mapping[str, Any] | None = None,
        log_format: LogFormat = "text",
    ) -> None:
        show_logs(log_format)
        self._handles = handles
        self.catalog = catalog
        self.limits = limits
        self.keys = KeyRing(keys_file) if keys_file else Loopback()
        self.allowance = Allowance(key_limits)
        self.readiness = readiness
        self.compiled = CompiledSizes(compiled or {}, handles)
        self._waking = Waking()
        self._health = Health(readiness)

    def __serve_build_asgi_app__(self) -> Any:
        return create_http_app(self)

    async def generate(self, params: GenerationParams, wish: Wish = ANYBODY) -> Generated:
        """Draw one picture, within the caller's deadline or the server's own, whichever is less.

        Raises:
            RequestError: the request cannot be served.
            DeadlineError: it took too long.
            BackendError: backend tvm was asked for by name and failed.
            RateLimitedError: the caller's quota is used up.
            UnstartableError: a deployment it needs keeps failing to start.
        """
        begin = time.perf_counter()
        plan = await self._admit(params, wish)
        async with self._deadline(wish.deadline_s) as expires:
            try:
                image = await self._compose(plan, params, expires)
            except Exception as error:
                plan = self._second_try(params, plan, error)
                image = await self._compose(plan, params, expires)
        return _finished(image, plan, begin)

    async def watch(
        self, params: GenerationParams, previews: bool, wish: Wish = ANYBODY
    ) -> AsyncIterator[Progress | bytes | Generated]:
        """Draw one picture, telling progress on the way: Progress, preview JPEGs, and at last the picture.

        The plan is made before this returns its first item, so that a bad request is refused at once. What goes from
        stage to stage passes through this process, which that of `generate` does not: a watcher costs that.
        """
        begin = time.perf_counter()
        plan = await self._admit(params, wish)
        yield Progress(plan.stages[0].component, 0, 0)
        image: Traced[EncodedImage] | None = None
        async with self._deadline(wish.deadline_s) as expires:
            for first in (True, False):
                try:
                    async for item in self._watch_plan(plan, params, previews, expires):
                        if isinstance(item, Traced):
                            image = item
                        else:
                            yield item
                    break
                except Exception as error:
                    if not first:
                        raise
                    plan = self._second_try(params, plan, error)
        assert image is not None
        yield _finished(image, plan, begin)

    async def _watch_plan(
        self, plan: GenerationPlan, params: GenerationParams, previews: bool, expires: float
    ) -> AsyncIterator[Progress | bytes | Traced[EncodedImage]]:
        text_encoder, vae = self._handles[plan.text_encoder], self._handles[plan.vae]
        latents = await vae.encode.remote(plan, params.image) if params.image is not None else None
        for stage in plan.stages:
            conditioning = await text_encoder.encode.remote(plan.text_encoder, stage)
            hint = await self._hint(plan, stage, params.controlnet_image) if stage.control else None
            denoiser = self._denoiser(stage).options(stream=True)
            items = denoiser.denoise_watched.remote(stage, conditioning, latents, hint, previews, expires)
            async for item in items:
                if isinstance(item, Progress):
                    yield replace(item, latents=None)
                    if item.latents is not None:
                        yield await vae.preview.remote(plan, item.latents)
                else:
                    latents = item
        yield await vae.decode.remote(plan, latents)

    async def generate_series(self, params: GenerationParams, count: int, wish: Wish = ANYBODY) -> list[Generated]:
        """`count` pictures of consecutive seeds; they share ticks."""
        first = (await self._plan(params)).seed
        requests = [replace(params, seed=(first + i) % SEED_LIMIT) for i in range(count)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.generate(request, wish)) for request in requests]
        return [task.result() for task in tasks]

    async def _admit(self, params: GenerationParams, wish: Wish) -> GenerationPlan:
        """Decide, look at the pictures (a damaged one must not fail on a GPU replica after it queued there), charge."""
        plan = await self._plan(params)
        for param, data in (("image", params.image), ("controlnet_image", params.controlnet_image)):
            if data is not None:
                await asyncio.to_thread(check_image, data, param, self.limits.max_image_pixels)
        if wish.key is not None:
            await self.allowance.pixel_steps(wish.key, plan.pixel_steps)
        self._waking.knock(self._visited(plan))
        return plan

    def _visited(self, plan: GenerationPlan) -> Iterator[Any]:
        """The deployments a plan goes through."""
        yield self._handles[plan.text_encoder]
        for stage in plan.stages:
            yield self._denoiser(stage)
            if stage.control:
                yield self._handles[stage.control.component]
        yield self._handles[plan.vae]

    @asynccontextmanager
    async def _deadline(self, asked_s: float) -> AsyncIterator[float]:
        """Raise DeadlineError when the block takes too long for caller or server; yields when UNets must be done."""
        seconds = min(asked_s, self.limits.deadline_s)
        try:
            async with asyncio.timeout(seconds):
                # UNets must be done a little earlier: the picture is decoded and sent after them.
                yield time.time() + seconds - min(seconds / 10, LAST_STAGE_S)
        except TimeoutError:
            raise DeadlineError(f"not finished within {seconds:g} seconds") from None

    async def _plan(self, params: GenerationParams) -> GenerationPlan:
        return make_plan(params, self.catalog, self.limits.plan, await self.compiled.known())

    def _denoiser(self, stage: StagePlan) -> Any:
        handles = self.compiled.handles if stage.backend == "tvm" else self._handles
        return handles[stage.component]

    def _second_try(self, params: GenerationParams, plan: GenerationPlan, error: Exception) -> GenerationPlan:
        """How to go on after the graph failed; the seed is decided, so it is the same picture.

        What ran on tvm and may run on torch does. A replica that died, of whatever kind, is worth another try: Serve
        sends it to another one, or to its successor.

        Raises:
            BackendError: the request asked for tvm by name.
            Exception: `error` itself, if another try would fail like this one.
        """
        cause = cause_of(error)
        if isinstance(cause, RequestError | OverloadedError | UnstartableError | BackPressureError):
            raise error
        compiled = [stage.component for stage in plan.stages if stage.backend == "tvm"]
        named = params.backend.lower() == "tvm"
        died = isinstance(cause, RayActorError)
        if compiled and not (died and named):
            for component in compiled:
                self.compiled.distrust(component)
        if died and (named or not compiled):
            logger.warning("a replica died, trying again: %s", type(cause).__name__)
            metrics().retries.inc(1, {"reason": "replica died"})
            return plan
        if not compiled:
            raise error
        if named:
            raise BackendError(f"backend 'tvm' failed: {cause}. Send backend 'auto' or 'torch'") from error
        logger.warning("backend tvm failed, torch takes over: %s", cause)
        metrics().retries.inc(1, {"reason": "tvm failed"})
        return make_plan(replace(params, seed=plan.seed), self.catalog, self.limits.plan)

    def _hint(self, plan: GenerationPlan, stage: StagePlan, photo: bytes | None) -> Any:
        """The control map under way, None for a stage without ControlNet."""
        return self._handles[stage.control.component].prepare.remote(plan, photo) if stage.control else None

    async def _compose(self, plan: GenerationPlan, params: GenerationParams, expires: float) -> Any:
        """Chain the calls. Responses are handed on un-awaited, so no tensor passes through this process."""
        text_encoder, vae = self._handles[plan.text_encoder], self._handles[plan.vae]
        latents = vae.encode.remote(plan, params.image) if params.image is not None else None
        calls = [latents]
        for stage in plan.stages:
            conditioning = text_encoder.encode.remote(plan.text_encoder, stage)
            hint = self._hint(plan, stage, params.controlnet_image)
            latents = self._denoiser(stage).denoise.remote(stage, conditioning, latents, hint, expires)
            calls += [conditioning, hint, latents]
        image = vae.decode.remote(plan, latents)
        return await last_of_chain(image, calls, lambda: self._health.of(self._visited(plan)))


def _finished(image: Traced[EncodedImage], plan: GenerationPlan, begin: float) -> Generated:
    seconds = time.perf_counter() - begin
    metrics().request_seconds.observe(seconds, {"model": plan.model, "backend": plan.stages[0].backend})
    return Generated(image.value, plan, seconds, image.spans)


async def deployment_states() -> tuple[bool, Mapping[str, str]]:
    """Whether every deployment of this application can serve, and the state of each in Serve's own words."""
    application = serve.get_replica_context().app_name
    deployments = serve.status().applications[application].deployments
    states = {name: f"{d.status.value}: {d.message}".rstrip(": ") for name, d in deployments.items()}
    return all(d.status.value in WELL for d in deployments.values()), states
