"""The whole walk of a request in one process, without Ray. Read this first: the deployments do the same, a step each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from config.catalog import Catalog
from pipelines.engine import DenoiseJob, JobFactory, StepEngine
from pipelines.families import FAMILIES
from pipelines.images import read_image
from pipelines.latents import Latents, LatentSpace
from pipelines.plan import GenerationParams, GenerationPlan, PlanLimits, StagePlan, make_plan
from pipelines.text_encoders import TextEncoderStack
from pipelines.vae import VAE
from pipelines.weights import Device, load_text_encoders, load_unet, load_vae, read_config


@dataclass(frozen=True)
class Picture:
    """A finished picture and the plan that made it."""

    image: Image.Image
    plan: GenerationPlan


class DenoiserStage:
    """One UNet component, ready to take jobs: its engine and the factory that makes them."""

    def __init__(self, catalog: Catalog, component_id: str, device: Device, max_rows: int = 16) -> None:
        spec = catalog.component(component_id)
        vae = next(m.vae for m in catalog.models if component_id in m.components)
        family = FAMILIES[spec.family]
        space = LatentSpace.from_vae_config(read_config(catalog.component(vae)), family.applies_latent_statistics)
        denoiser = load_unet(spec, device)
        self.engine = StepEngine(denoiser, max_rows)
        self.factory = JobFactory(denoiser, family, read_config(spec, "scheduler"), space)


class Text2Image:
    """Every component of a catalog in this process, loaded when first needed."""

    def __init__(self, catalog: Catalog, device: Device = "cpu", limits: PlanLimits | None = None) -> None:
        self._catalog = catalog
        self._device = device
        self._limits = limits
        self._ids = itertools.count()
        self.text_encoders = functools.cache(self._load_text_encoders)
        self.vae = functools.cache(self._load_vae)
        self.denoiser = functools.cache(self._load_denoiser)

    def _load_text_encoders(self, component_id: str) -> TextEncoderStack:
        return load_text_encoders(self._catalog.component(component_id), self._device)

    def _load_vae(self, component_id: str) -> VAE:
        return load_vae(self._catalog.component(component_id), self._device)

    def _load_denoiser(self, component_id: str) -> DenoiserStage:
        return DenoiserStage(self._catalog, component_id, self._device)

    def generate(self, params: GenerationParams) -> Picture:
        """One picture."""
        return self.generate_many([params])[0]

    def generate_many(self, requests: Sequence[GenerationParams]) -> list[Picture]:
        """Pictures of several requests, whose jobs share ticks wherever they can; in the order they came."""
        plans = [make_plan(params, self._catalog, self._limits) for params in requests]
        latents = [self._encode_image(plan, params) for plan, params in zip(plans, requests, strict=True)]
        for position in range(max(len(plan.stages) for plan in plans)):
            latents = self._denoise(plans, latents, position)
        return [
            Picture(self.vae(plan.vae).decode(result), plan)
            for plan, result in zip(plans, latents, strict=True)
            if result is not None
        ]

    def _encode_image(self, plan: GenerationPlan, params: GenerationParams) -> Latents | None:
        if params.image is None:
            return None
        image = read_image(params.image, "image", plan.width, plan.height)
        return self.vae(plan.vae).encode(image, plan.seed)

    def _denoise(
        self, plans: list[GenerationPlan], latents: list[Latents | None], position: int
    ) -> list[Latents | None]:
        """Run the stage at `position` of every plan that has one."""
        results = list(latents)
        waiting: dict[str, int] = {}
        stages: dict[str, DenoiserStage] = {}
        for index, plan in enumerate(plans):
            if position < len(plan.stages):
                stage = plan.stages[position]
                job = self._start(stage, plan, latents[index])
                stages[stage.component] = self.denoiser(stage.component)
                waiting[job.id] = index
        for denoiser in stages.values():
            while len(denoiser.engine):
                report = denoiser.engine.tick()
                if report.failed:
                    raise report.failed[0][1]
                for finished in report.finished:
                    results[waiting[finished.id]] = finished.result()
        return results

    def _start(self, stage: StagePlan, plan: GenerationPlan, latents: Latents | None) -> DenoiseJob:
        conditioning = self.text_encoders(plan.text_encoder).encode(stage)
        denoiser = self.denoiser(stage.component)
        job = denoiser.factory.start(str(next(self._ids)), stage, conditioning, latents)
        denoiser.engine.add(job)
        return job
