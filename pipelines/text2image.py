"""The whole walk of a request in one process, without Ray. Read this first: deployments do the same, a step each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from config.catalog import Catalog
from pipelines.assembly import CompiledUNet, load_controlnets, load_engine, load_text_encoders, load_vae
from pipelines.control.nets import ColocatedControl
from pipelines.control.types import ControlHint
from pipelines.engine.engine import StepEngine
from pipelines.pictures.images import read_image
from pipelines.plan import GenerationParams, GenerationPlan, StagePlan
from pipelines.planning import PlanLimits, make_plan
from pipelines.sampling.latents import Latents
from pipelines.weights.loading import Device


@dataclass(frozen=True)
class Picture:
    """A finished picture and the plan that made it."""

    image: Image.Image
    plan: GenerationPlan


class Text2Image:
    """Every component of a catalog in this process, loaded when first needed."""

    def __init__(
        self,
        catalog: Catalog,
        device: Device = "cpu",
        limits: PlanLimits | None = None,
        strict: bool = False,
        compiled: Sequence[CompiledUNet] = (),
    ) -> None:
        self._catalog = catalog
        self._limits = limits
        self._compiled = {unet.sizes[0].component: unet for unet in compiled}
        self._ids = itertools.count()
        self.text_encoders = functools.cache(functools.partial(load_text_encoders, catalog, device=device))
        self.torch_engine = functools.cache(functools.partial(load_engine, catalog, device=device, strict=strict))
        self.controlnets = functools.cache(functools.partial(load_controlnets, catalog, device=device))
        self.vae = functools.cache(functools.partial(load_vae, catalog, device=device))

    def engine(self, stage: StagePlan) -> StepEngine:
        """The engine that runs a stage."""
        compiled = stage.backend == "tvm"
        return self._compiled[stage.component].engine if compiled else self.torch_engine(stage.component)

    def generate(self, params: GenerationParams) -> Picture:
        """One picture."""
        return self.generate_many([params])[0]

    def generate_many(self, requests: Sequence[GenerationParams]) -> list[Picture]:
        """Pictures of several requests, whose jobs share ticks wherever they can; in the order they came."""
        sizes = [size for unet in self._compiled.values() for size in unet.sizes]
        plans = [make_plan(params, self._catalog, self._limits, sizes) for params in requests]
        latents = [self._encode_image(plan, params) for plan, params in zip(plans, requests, strict=True)]
        hints = [self._prepare_hint(plan, params) for plan, params in zip(plans, requests, strict=True)]
        for position in range(max(len(plan.stages) for plan in plans)):
            latents = self._denoise(plans, latents, hints, position)
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

    def _prepare_hint(self, plan: GenerationPlan, params: GenerationParams) -> ControlHint | None:
        first = plan.stages[0]
        if first.control is None or params.controlnet_image is None:
            return None
        nets = self.controlnets(self._catalog.controlnets_of(first.component))
        self.engine(first).control = ColocatedControl(nets)
        return nets.prepare(params.controlnet_image, first.control, plan.width, plan.height)

    def _denoise(
        self,
        plans: list[GenerationPlan],
        latents: list[Latents | None],
        hints: list[ControlHint | None],
        position: int,
    ) -> list[Latents | None]:
        """Run the stage at `position` of every plan that has one."""
        results = list(latents)
        waiting: dict[str, int] = {}
        engines: set[StepEngine] = set()
        for index, plan in enumerate(plans):
            if position < len(plan.stages):
                stage = plan.stages[position]
                conditioning = self.text_encoders(plan.text_encoder).encode(stage)
                engine = self.engine(stage)
                loras = engine.loras.mixture(stage)
                hint = hints[index] if stage.control else None
                job = engine.add(str(next(self._ids)), stage, conditioning, latents[index], loras, hint)
                engines.add(engine)
                waiting[job.id] = index
        for engine in engines:
            while len(engine):
                report = engine.tick()
                if report.failed:
                    raise report.failed[0][1]
                for finished in report.finished:
                    results[waiting[finished.id]] = finished.result()
        return results
