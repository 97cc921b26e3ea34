"""Composes the calls of one plan, the same for a plain request and for a watched one (GRA-9)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deployments.graph import Call, Graph, Progress, Sealed
from deployments.ingress.health import Health
from deployments.ingress.pending import Pending
from deployments.telemetry.stages import Timed
from pipelines.enlargement import Enlargement
from pipelines.pictures.images import EncodedImage
from pipelines.plan import GenerationParams, GenerationPlan, OutputFormat, StagePlan

if TYPE_CHECKING:
    from pipelines.control.types import ControlHint
    from pipelines.sampling.latents import Latents


@dataclass(frozen=True)
class Watcher:
    """The previews that a watched request wants."""

    previews: int | None = 0
    """Most previews, spread over the first stage's steps from the first one on; None for one of each step."""
    format: OutputFormat = "jpeg"
    """Of previews."""

    def wants_preview(self, stage: int, step: int, steps: int) -> bool:
        """Whether a preview is made of the picture after `step` of `steps` sampler steps of a stage."""
        if self.previews is None:
            return True
        return stage == 0 and step in {1 + i * (steps - 1) // self.previews for i in range(self.previews)}


@dataclass(frozen=True)
class Preview:
    """A small picture of an unfinished one."""

    data: bytes
    format: OutputFormat
    width: int
    height: int
    """Width and height are those of the picture it will be."""


class Composition:
    """One attempt at one plan."""

    def __init__(
        self,
        graph: Graph,
        plan: GenerationPlan,
        params: GenerationParams,
        expires: float,
        watcher: Watcher | None,
        health: Health,
    ) -> None:
        """Compose `plan`.

        Args:
            graph: what is called.
            plan: what was decided.
            params: the pictures that came with the request.
            expires: when UNets must be done, in seconds of Unix time.
            watcher: None for a plain request; then no tensor passes through this process.
            health: asked, while a call takes long, whether what the plan visits can still answer.
        """
        self._graph = graph
        self._plan = plan
        self._params = params
        self._expires = expires
        self._watcher = watcher
        self._health = health

    async def run(self) -> AsyncGenerator[Progress | Preview | Timed[EncodedImage], None]:
        """Yield progress and previews, if the request is watched, and at last the file. Closing cancels all calls."""
        graph, plan, photo, mask = self._graph, self._plan, self._params.image, self._params.mask_image
        visits = graph.visits(plan)
        async with Pending(lambda: self._health.check(visits)) as pending:
            latents: Call[Timed[Latents]] | Sealed[Timed[Latents]] | None = None
            if photo is not None or plan.stages[0].reads_mask:
                latents = pending.add(graph.encode(plan=plan, image=photo, mask=mask))
            texts = [pending.add(graph.encode_text(component=plan.text_encoder, stage=stage)) for stage in plan.stages]
            hints = [self._prepare(stage, pending) for stage in plan.stages]
            for position, (stage, conditioning, maps) in enumerate(zip(plan.stages, texts, hints, strict=True)):
                if latents is not None and stage.enlargement is not None and not stage.enlargement.of_latents:
                    latents = self._enlarge(stage, stage.enlargement, latents, pending)
                if self._watcher is None:
                    assert not isinstance(latents, Sealed)
                    latents = pending.add(
                        graph.denoise(
                            stage=stage, conditioning=conditioning, latents=latents, hints=maps, expires=self._expires
                        )
                    )
                    continue
                watched = graph.denoise_watched(
                    stage=stage,
                    conditioning=conditioning,
                    latents=latents,
                    hints=maps,
                    expires=self._expires,
                    previews=self._watcher.previews != 0,
                )
                async with aclosing(watched) as items:
                    while (item := await pending.wait(anext(items, None))) is not None:
                        if isinstance(item, Sealed):
                            latents = item
                            continue
                        yield replace(item, latents=None, visit=position + 1, visits=len(plan.stages))
                        if item.latents is not None and self._watcher.wants_preview(position, item.step, item.steps):
                            shown = self._watcher.format
                            call = graph.preview(plan=plan, latents=item.latents, file_format=shown)
                            yield Preview(await pending.wait(call), shown, *plan.size)
            assert latents is not None, "a plan has at least one stage, and a stage ends with latents"
            source = photo if mask is not None else None  # it travels only where what was drawn is laid into it
            yield await pending.wait(pending.add(graph.decode(plan=plan, latents=latents, image=source, mask=mask)))

    def _enlarge(
        self,
        stage: StagePlan,
        how: Enlargement,
        latents: Call[Timed[Latents]] | Sealed[Timed[Latents]],
        pending: Pending,
    ) -> Call[Timed[Latents]]:
        """The picture at the head of a second pass, larger: in the VAE's replica, or by a model between two calls."""
        graph, vae = self._graph, self._plan.vae
        if how.component is None:
            return pending.add(graph.enlarge(component=vae, stage=stage, latents=latents))
        pixels = pending.add(graph.pixels(component=vae, latents=latents))
        larger = pending.add(graph.upscale(component=how.component, stage=stage, pixels=pixels))
        return pending.add(graph.encode_pixels(component=vae, stage=stage, pixels=larger))

    def _prepare(self, stage: StagePlan, pending: Pending) -> Call[Timed[tuple[ControlHint, ...]]] | None:
        """The control maps of a stage, None for one without ControlNets."""
        if not stage.controls:
            return None
        params = self._params
        cut = params if stage.inpaint is not None and stage.inpaint.area == "masked" else None
        return pending.add(
            self._graph.prepare(
                component=stage.controls[0].component,
                stage=stage,
                photos=[control.image for control in params.controls],
                image=cut.image if cut else None,
                mask=cut.mask_image if cut else None,
            )
        )
