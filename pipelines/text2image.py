"""A request from parameters to picture in one process, without Ray. Read this first: deployments do the same."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from config.catalog import Catalog
from config.precision import Precision
from pipelines.acceleration import Acceleration
from pipelines.assembly import (
    CompiledUNet,
    load_controlnets,
    load_engine,
    load_text_encoders,
    load_upscaler,
    load_vae,
)
from pipelines.control.nets import LazyControl
from pipelines.control.types import ControlHint
from pipelines.engine.engine import StepEngine
from pipelines.errors import UncompiledError
from pipelines.pictures.enlarging import enlarged
from pipelines.pictures.masks import canvas_of, read_start
from pipelines.plan import GenerationParams, GenerationPlan, StagePlan
from pipelines.planning import PlanLimits, make_plan
from pipelines.recordings import Capturer, capturer_for
from pipelines.sampling.latents import Latents
from pipelines.weights.loading import Device


@dataclass(frozen=True)
class Picture:
    """A finished picture and the plan that made it."""

    image: Image.Image
    plan: GenerationPlan


@dataclass
class _Work:
    """One request and its state."""

    plan: GenerationPlan
    params: GenerationParams
    latents: Latents | None
    """Of the last stage; before the first, of the picture it starts from, None for a picture from text."""


class Text2Image:
    """Every component of a catalog in this process, loaded when first needed."""

    def __init__(
        self,
        catalog: Catalog,
        device: Device = "cpu",
        limits: PlanLimits | None = None,
        strict: bool = False,
        compiled: Sequence[CompiledUNet] = (),
        acceleration: Acceleration | None = None,
        capturer: Capturer | None = None,
        precision: Precision = "float32",
    ) -> None:
        """Serve `catalog`.

        Args:
            catalog: the models, and where their weights are.
            device: where everything is computed; compiled UNets always run on the CPU.
            limits: what a request may ask for.
            strict: a picture's bytes do not depend on the requests it is drawn beside.
            compiled: UNets on the tvm backend; ControlNets of this process steer them too.
            acceleration: what is done on a GPU; its defaults if None.
            capturer: records passes that come often; by default CUDA graphs on a GPU that has them.
            precision: what UNets and ControlNets on torch compute in on a CPU.
        """
        self._acceleration = acceleration or Acceleration()
        self._capturer = capturer = capturer or capturer_for(device, self._acceleration.graphs)
        self._catalog = catalog
        self._device = device
        self._limits = limits
        self._strict = strict
        self._precision = precision
        self._compiled = {unet.sizes[0].component: unet for unet in compiled}
        self._ids = itertools.count()
        self.text_encoders = functools.cache(functools.partial(load_text_encoders, catalog, device=device))
        self.torch_engine = functools.cache(self._load_engine)
        self.controlnets = functools.cache(
            functools.partial(load_controlnets, catalog, device=device, capturer=capturer, precision=precision)
        )
        self.vae = functools.cache(functools.partial(load_vae, catalog, device=device))
        self.upscaler = functools.cache(functools.partial(load_upscaler, catalog, device=device))
        for component, unet in self._compiled.items():
            unet.engine.control = self._control_of(component)

    def engine(self, stage: StagePlan) -> StepEngine:
        """The engine that runs a stage."""
        compiled = stage.backend == "tvm"
        return self._compiled[stage.component].engine if compiled else self.torch_engine(stage.component)

    def generate(self, params: GenerationParams) -> Picture:
        """One picture."""
        return self.generate_many([params])[0]

    def generate_many(self, requests: Sequence[GenerationParams]) -> list[Picture]:
        """Pictures of several requests, whose jobs share ticks wherever they can; in the order they came."""
        plans = [self._plan(params) for params in requests]
        works = [
            _Work(plan, params, self._encode_image(plan, params)) for plan, params in zip(plans, requests, strict=True)
        ]
        for position in range(max(len(plan.stages) for plan in plans)):
            self._denoise(works, position)
        return [self._decode(work) for work in works]

    def _plan(self, params: GenerationParams) -> GenerationPlan:
        """Everything decided; unless tvm was asked for by name, what is more than is compiled runs on torch."""
        sizes = [size for unet in self._compiled.values() for size in unet.sizes]
        plan = make_plan(params, self._catalog, self._limits, sizes)
        compiled = [stage for stage in plan.stages if stage.backend == "tvm" and params.backend != "tvm"]
        texts = [self.text_encoders(plan.text_encoder).encode(stage) for stage in compiled]
        if any(text.size is not None and text.size.chunks > 1 for text in texts) or any(map(self._misfits, compiled)):
            return make_plan(replace(params, seed=plan.seed), self._catalog, self._limits)
        return plan

    def _misfits(self, stage: StagePlan) -> bool:
        """Whether a stage brings LoRAs that compiled UNets do not take."""
        try:
            self.engine(stage).loras.mixture(stage)
        except UncompiledError:
            return True
        return False

    def _load_engine(self, component: str) -> StepEngine:
        control = self._control_of(component)
        return load_engine(
            self._catalog,
            component,
            self._device,
            strict=self._strict,
            control=control,
            capturer=self._capturer,
            acceleration=self._acceleration,
            precision=self._precision,
        )

    def _control_of(self, unet: str) -> LazyControl | None:
        """What steers a UNet."""
        own = self._catalog.controlnets_of(unet)
        return LazyControl(functools.partial(self.controlnets, own)) if own else None

    def _encode_image(self, plan: GenerationPlan, params: GenerationParams) -> Latents | None:
        if params.image is None and not plan.stages[0].reads_mask:
            return None
        image, canvas = read_start(plan, params.image, params.mask_image)
        return self.vae(plan.vae).begin_start(plan, image, canvas).result()

    def _prepare_hints(self, stage: StagePlan, params: GenerationParams) -> tuple[ControlHint, ...]:
        if not stage.controls:
            return ()
        nets = self.controlnets(self._catalog.controlnets_of(stage.component))
        return nets.prepare([control.image for control in params.controls], stage, params.image, params.mask_image)

    def _enlarge(self, work: _Work, stage: StagePlan) -> None:
        """At the head of a second pass: the picture, larger; latents are interpolated where the job is made."""
        how = stage.enlargement
        if how is None or how.of_latents:
            return
        assert work.latents is not None, "a second pass comes after a first one"
        vae = self.vae(work.plan.vae)
        picture = vae.decode(work.latents)
        if how.component is None:
            larger = enlarged(picture, stage)
        else:
            larger = self.upscaler(how.component).enlarge(picture, stage.width, stage.height)
        work.latents = vae.encode(larger, stage.seed)

    def _denoise(self, works: list[_Work], position: int) -> None:
        """Run the stage at `position` of every request that has one; jobs on the same engine share its ticks."""
        engines: set[StepEngine] = set()
        by_job: dict[str, _Work] = {}
        try:
            for work in works:
                if position < len(work.plan.stages):
                    engine, job_id = self._add(work, work.plan.stages[position])
                    engines.add(engine)
                    by_job[job_id] = work
            for engine in engines:
                while len(engine):
                    report = engine.tick()
                    if report.failed:
                        raise report.failed[0][1]
                    for fetched in report.finished:
                        by_job[fetched.job.id].latents = fetched.result()
        finally:  # a request that failed must not leave the others' jobs to the next call
            for engine in engines:
                engine.clear()

    def _add(self, work: _Work, stage: StagePlan) -> tuple[StepEngine, str]:
        """A job for one stage, in its engine."""
        engine = self.engine(stage)
        conditioning = self.text_encoders(work.plan.text_encoder).encode(stage)
        hints = self._prepare_hints(stage, work.params)
        self._enlarge(work, stage)
        job = engine.prepare(str(next(self._ids)), stage, conditioning, work.latents, hints)
        return engine, engine.add(job).id

    def _decode(self, work: _Work) -> Picture:
        assert work.latents is not None, "every plan has a stage, and every stage ends with latents"
        image = self.vae(work.plan.vae).decode(work.latents)
        canvas = canvas_of(work.plan, work.params.image, work.params.mask_image)
        return Picture(canvas.lay_in(image) if canvas else image, work.plan)
