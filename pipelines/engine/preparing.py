"""Prepares a job before its first tick, on any thread: adapters, table, noise, checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

import torch

from pipelines.adapters.store import LoraStore
from pipelines.backends.base import Denoiser
from pipelines.control.types import ControlHint
from pipelines.engine.checks import check_job
from pipelines.engine.courses import Course, KeptPicture, SamplerCourse, TableCourse
from pipelines.engine.guidance import Guidance
from pipelines.engine.job import DenoiseJob
from pipelines.engine.steering import Steering
from pipelines.families import Family
from pipelines.plan import StagePlan
from pipelines.sampling.latents import Latents, LatentSpace, draw_noise, make_generator
from pipelines.sampling.samplers import make_sampler
from pipelines.sampling.table import Table
from pipelines.sampling.tables import SamplerTables
from pipelines.text.conditioning import Conditioning
from pipelines.transfers import pinned

TRAINED_TIMESTEPS = 1000
"""Number of training timesteps if a scheduler's configuration does not say it, as in diffusers."""


def always() -> bool:
    """The default of `wanted`: a caller waits."""
    return True


class JobMaker:
    """Makes the jobs of one engine as diffusers' pipelines prepare their loop. Any thread may use it."""

    def __init__(
        self,
        denoiser: Denoiser,
        family: Family,
        scheduler_config: Mapping[str, Any],
        space: LatentSpace,
        loras: LoraStore,
        tables: SamplerTables,
    ) -> None:
        """Arguments are those of `StepEngine`."""
        self._denoiser = denoiser
        self._family = family
        self._scheduler_config = scheduler_config
        self._space = space
        self._loras = loras
        self._tables = tables

    @torch.inference_mode()
    def make(
        self,
        job_id: str,
        plan: StagePlan,
        conditioning: Conditioning,
        latents: Latents | None,
        hints: Sequence[ControlHint] = (),
        wanted: Callable[[], bool] = always,
    ) -> DenoiseJob:
        """See `StepEngine.prepare`."""
        device, dtype = self._denoiser.device, self._denoiser.dtype
        conditioning = conditioning.to(conditioning.prompt_embeds.device, dtype)
        added = self._family.added_conditions(plan, conditioning, self._denoiser.config)
        shape = self._space.shape(plan.width, plan.height)
        if latents is not None and plan.enlargement is not None and plan.enlargement.of_latents:
            latents = latents.enlarged(plan.enlargement.upscaler, shape)
        begin = torch.zeros(shape, dtype=dtype) if latents is None else latents.values.to("cpu", dtype).contiguous()
        mask = latents.mask.to(dtype) if latents is not None and latents.mask is not None else None
        masked = latents.masked.to(dtype) if latents is not None and latents.masked is not None else None
        check_job(plan, begin, conditioning, added, mask, masked, hints, shape, self._denoiser.config)
        mixture = self._loras.mixture(plan)
        _stop_unless(wanted)
        table = self._tables.get(plan.sampler, plan.schedule, mask is not None and not plan.reads_mask)
        _stop_unless(wanted)
        generator = make_generator(plan.seed, latents.generator_state if latents else None)
        from_text = latents is None or (plan.reads_mask and plan.schedule.strength is None)
        course: Course
        if table is None:
            course = self._by_sampler(plan, from_text, begin, mask, generator)
        else:
            course = self._by_table(table, plan, from_text, begin, mask, generator, wanted)
        embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
        conditioning = Conditioning(pinned(embeds, device), pinned(pooled, device) if pooled is not None else None)
        added = {name: pinned(tensor, device) for name, tensor in added.items()}
        beside = None
        if plan.reads_mask and mask is not None and masked is not None:
            beside = pinned(torch.cat([mask.flatten(), masked.flatten()]).float(), device)
        stays = None if plan.reads_mask else mask
        steering = self._steering(plan, hints, course)
        return DenoiseJob(job_id, plan, course, dtype, conditioning, added, mixture, steering, beside, stays)

    def _by_table(
        self,
        table: Table,
        plan: StagePlan,
        from_text: bool,
        picture: torch.Tensor,
        mask: torch.Tensor | None,
        generator: torch.Generator,
        wanted: Callable[[], bool],
    ) -> TableCourse:
        def noised(picture: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            assert table.noised is not None, "read for a part that has a strength"
            of_picture, of_noise = table.noised
            return of_picture * picture.float() + of_noise * noise.float()

        begin, kept = _begin(plan, from_text, picture, mask, generator, table.init_noise_sigma, noised)
        drawn = []
        for noise in table.draw(begin.shape, self._denoiser.dtype, generator, plan.seed):
            _stop_unless(wanted)
            drawn.append(noise)
        guidance = self._guidance(plan, table.timesteps, table.order)
        return TableCourse(table, begin, drawn, generator.get_state(), guidance, self._denoiser.device, kept)

    def _by_sampler(
        self,
        plan: StagePlan,
        from_text: bool,
        picture: torch.Tensor,
        mask: torch.Tensor | None,
        generator: torch.Generator,
    ) -> SamplerCourse:
        sampler = make_sampler(plan.sampler, self._scheduler_config, plan.schedule, plan.seed)
        sigma = sampler.init_noise_sigma
        begin, kept = _begin(plan, from_text, picture, mask, generator, sigma, sampler.add_noise)
        guidance = self._guidance(plan, sampler.timesteps.tolist(), sampler.order)
        return SamplerCourse(sampler, begin, generator, guidance, kept)

    def _steering(self, plan: StagePlan, hints: Sequence[ControlHint], course: Course) -> Steering:
        """Windows are shares of all ticks of the picture, also of those that are left to a refiner, as in diffusers."""
        ticks = len(course.timesteps)
        if hints and plan.schedule.end is not None and any((use.start, use.end) != (0, 1) for use in plan.controls):
            whole = plan.schedule.model_copy(update={"end": None})
            ticks = len(make_sampler(plan.sampler, self._scheduler_config, whole, plan.seed).timesteps)
        return Steering(tuple(hints), plan.controls, ticks) if hints else Steering()

    def _guidance(self, plan: StagePlan, timesteps: Sequence[float], order: int) -> Guidance:
        trained = self._scheduler_config.get("num_train_timesteps", TRAINED_TIMESTEPS)
        return Guidance.create(plan, timesteps, order, trained)


def _stop_unless(wanted: Callable[[], bool]) -> None:
    if not wanted():
        raise CancelledError("no caller waits for this job any longer")


def _begin(
    plan: StagePlan,
    from_text: bool,
    picture: torch.Tensor,
    mask: torch.Tensor | None,
    generator: torch.Generator,
    init_noise_sigma: float,
    noised: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, KeptPicture | None]:
    """The latents of the first tick, and what stays of a picture that has a mask.

    Draws come in the order of diffusers' text, image and inpainting pipelines. The last one encodes the masked picture
    too, whatever the UNet reads, so one draw of it is passed over; and at strength 1 it begins from noise alone. What
    another stage began goes on from its latents, which are the picture too: what stays of it has no noise any more.
    A UNet for inpainting draws all of its latents: it reads itself what stays.
    """

    def draw() -> torch.Tensor:
        return draw_noise(picture.shape, generator, picture.dtype)

    if from_text:
        begin = draw() * init_noise_sigma
        if plan.reads_mask:
            draw()
        return begin, None
    if plan.schedule.strength is None:
        return picture, None if mask is None else KeptPicture(picture, draw(), mask)
    noise = draw()
    if mask is None:
        return noised(picture, noise), None
    draw()
    filled = picture
    if plan.inpaint is not None and plan.inpaint.fill in ("noise", "nothing"):
        filled = torch.where(mask > 0.5, draw() if plan.inpaint.fill == "noise" else 0.0, picture)
    begin = noise * init_noise_sigma if plan.schedule.strength == 1 else noised(filled, noise)
    return begin, None if plan.reads_mask else KeptPicture(picture, noise, mask)
