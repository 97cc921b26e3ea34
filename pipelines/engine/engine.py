"""The step engine: one tick = one UNet evaluation.

Between ticks jobs join and leave. A tick selects jobs that can share a forward pass, stacks their rows, predicts once,
guides each job's rows and advances each job's own sampler. Only latent shape and context shape must agree; sampler,
timestep, number of steps, guidance, seed and LoRAs are free per row. Synchronous: the caller decides when and where.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipelines.adapters.rows import Mixture
from pipelines.adapters.store import LoraStore
from pipelines.backends.base import Denoiser, StepBatch
from pipelines.control.types import ControlBatch, ControlHint, ControlledRows, ControlSource
from pipelines.engine.batching import BatchKey, select_rows
from pipelines.engine.guidance import guide
from pipelines.errors import DenoiseError
from pipelines.families import Family
from pipelines.plan import StagePlan
from pipelines.sampling.base import Sampler
from pipelines.sampling.latents import Latents, LatentSpace, draw_noise, make_generator
from pipelines.sampling.samplers import make_sampler
from pipelines.text.conditioning import Conditioning

logger = logging.getLogger("sdgraph.engine")


@dataclass
class DenoiseJob:
    """One stage of one picture in flight. One owner; never shared, never copied.

    Attributes:
        id: unique among the jobs of an engine.
        latents: `[1, channels, height, width]`.
        tick: how many UNet evaluations are done.
    """

    id: str
    plan: StagePlan
    sampler: Sampler
    generator: torch.Generator
    latents: torch.Tensor
    conditioning: Conditioning
    added_conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    loras: Mixture = ()
    hint: ControlHint | None = None
    tick: int = 0

    @property
    def rows(self) -> int:
        """UNet batch entries the job contributes to a tick."""
        return self.conditioning.rows

    @property
    def batch_key(self) -> BatchKey:
        """What another job must share to ride in the same tick."""
        return BatchKey(tuple(self.latents.shape[1:]), tuple(self.conditioning.prompt_embeds.shape[1:]))

    @property
    def done(self) -> bool:
        """Whether the slice of the schedule is finished."""
        return self.ticks_left <= 0

    @property
    def steps_done(self) -> int:
        """Sampler steps taken; a step of a second-order sampler is two ticks."""
        return math.ceil(self.tick / self.sampler.order)

    @property
    def steps(self) -> int:
        """Sampler steps of this stage."""
        return math.ceil(len(self.sampler.timesteps) / self.sampler.order)

    @property
    def work(self) -> int:
        """What one tick costs: rows x pixels of the picture."""
        return self.rows * self.plan.width * self.plan.height

    @property
    def ticks_left(self) -> int:
        """UNet evaluations to come."""
        return len(self.sampler.timesteps) - self.tick

    @property
    def outstanding_work(self) -> int:
        """What is left to do: work of a tick x ticks to come."""
        return self.work * self.ticks_left

    @property
    def timestep(self) -> torch.Tensor:
        """What the UNet is asked next, a scalar."""
        return self.sampler.timesteps[self.tick]

    def model_input(self) -> torch.Tensor:
        """The latents as the UNet sees them, `[1, channels, height, width]`."""
        return self.sampler.scale_input(self.latents, self.timestep)

    def advance(self, model_output: torch.Tensor) -> None:
        """Guide the job's rows `[rows, channels, height, width]` and take the sampler's step."""
        guided = guide(model_output, self.plan.guidance_scale)
        self.latents = self.sampler.step(guided, self.timestep, self.latents, self.generator)
        self.tick += 1

    def result(self) -> Latents:
        """Latents and generator, for the next stage."""
        return Latents(self.latents, self.generator.get_state())


@dataclass(frozen=True)
class TickReport:
    """What a tick did.

    Attributes:
        rows: UNet batch entries that jobs asked for.
        padding: entries that only filled a batch.
        seconds: what it took.
        advanced: jobs that took part, those that left included.
        finished: jobs that left with a result.
        failed: jobs that left with an exception.
    """

    rows: int = 0
    padding: int = 0
    seconds: float = 0.0
    advanced: tuple[DenoiseJob, ...] = ()
    finished: tuple[DenoiseJob, ...] = ()
    failed: tuple[tuple[DenoiseJob, DenoiseError], ...] = ()


class StepEngine:
    """Jobs of one component, oldest first. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        denoiser: Denoiser,
        family: Family,
        scheduler_config: Mapping[str, Any],
        space: LatentSpace,
        loras: LoraStore,
        control: ControlSource | None = None,
        max_rows: int = 16,
        strict: bool = False,
        fits: Callable[[BatchKey], int] | None = None,
    ) -> None:
        """Run jobs on `denoiser`.

        Args:
            denoiser: the UNet.
            family: what else the UNet is told.
            scheduler_config: the model's `scheduler_config.json`, which every sampler starts from.
            space: of the VAE that made and will read the latents.
            loras: where jobs' LoRAs come from; safe to ask from any thread.
            control: where residuals come from, for jobs that bring a hint.
            max_rows: most rows of a tick; halved when memory runs out.
            strict: evaluate each job on its own, so that its bytes do not depend on its neighbours.
            fits: how many rows of a shape fit into memory now, asked before every tick; None trusts `max_rows`.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows {max_rows}: at least 1")
        self._denoiser = denoiser
        self._family = family
        self._scheduler_config = scheduler_config
        self._space = space
        self.loras = loras
        self.control = control
        self._max_rows = max_rows
        self._strict = strict
        self._fits = fits
        self._jobs: dict[str, DenoiseJob] = {}

    def __len__(self) -> int:
        """Jobs in flight."""
        return len(self._jobs)

    @torch.inference_mode()
    def add(
        self,
        job_id: str,
        plan: StagePlan,
        conditioning: Conditioning,
        latents: Latents | None,
        loras: Mixture = (),
        hint: ControlHint | None = None,
    ) -> DenoiseJob:
        """Prepare a job as diffusers' pipelines prepare their loop; it joins at the next tick.

        Args:
            job_id: unique in this engine.
            plan: the stage.
            conditioning: one row, or uncond and cond.
            latents: None begins from noise (text to image); otherwise the encoded picture, noised to the first
                timestep when the schedule has a strength (img2img), or the previous stage's, taken as they are.
            loras: what `self.loras.mixture(plan)` gave, on whatever thread it was loaded.
            hint: the control map, where the plan has a ControlNet.
        """
        if job_id in self._jobs:
            raise ValueError(f"job {job_id} is already here")
        device, dtype = self._denoiser.device, self._denoiser.dtype
        sampler = make_sampler(plan.sampler, self._scheduler_config, plan.schedule, plan.seed, device)
        generator = make_generator(plan.seed, latents.generator_state if latents else None)
        if latents is None:
            shape = self._space.shape(plan.width, plan.height)
            values = draw_noise(shape, generator, device, dtype) * sampler.init_noise_sigma
        else:
            values = latents.values.to(device, dtype)
            if plan.schedule.strength is not None:
                values = sampler.add_noise(values, draw_noise(tuple(values.shape), generator, device, dtype))
        conditioning = conditioning.to(device, dtype)
        added = self._family.added_conditions(plan, conditioning, self._denoiser.config)
        job = DenoiseJob(job_id, plan, sampler, generator, values, conditioning, added, loras, hint)
        self._jobs[job_id] = job
        return job

    def cancel(self, job_id: str) -> DenoiseJob | None:
        """Drop a job; its rows are free at the next tick. Returns it if it was here."""
        return self._jobs.pop(job_id, None)

    @torch.inference_mode()
    def tick(self) -> TickReport:
        """Evaluate the UNet once and advance the jobs that were in it.

        An exception of the evaluation fails every job of this tick; one of a job's own sampler fails that job alone.
        When memory runs out, the row budget is halved for good and the tick tried once more with fewer jobs.
        """
        begin, evaluated = time.perf_counter(), self._denoiser.rows_evaluated
        ready = [job for job in self._jobs.values() if job.done]  # a slice can be empty: a refiner with nothing left
        selected = self._select([job for job in self._jobs.values() if not job.done])
        failed: list[tuple[DenoiseJob, DenoiseError]] = []
        if selected:
            try:
                try:
                    outputs = self._predict(selected)
                except (torch.OutOfMemoryError, MemoryError):
                    selected = self._retreat(selected)
                    outputs = self._predict(selected)
            except Exception as error:  # whatever it is, it belongs to the jobs in the batch
                failed = [(job, _denoise_error(error)) for job in selected]
                outputs = []
            for job, output in zip(selected, outputs, strict=False):
                try:
                    job.advance(output)
                except Exception as error:  # the job's own
                    failed.append((job, _denoise_error(error)))
                else:
                    if job.done:
                        ready.append(job)
        # A job cancelled while the tick ran on another thread is no longer here: nobody waits for it.
        left = [job for job in ready if self._jobs.pop(job.id, None) is not None]
        broken = [(job, error) for job, error in failed if self._jobs.pop(job.id, None) is not None]
        rows = sum(job.rows for job in selected)
        padding = max(0, self._denoiser.rows_evaluated - evaluated - rows)
        seconds = time.perf_counter() - begin
        return TickReport(rows, padding, seconds, tuple(selected), tuple(left), tuple(broken))

    def _select(self, jobs: list[DenoiseJob]) -> list[DenoiseJob]:
        """The jobs of the next tick: a row budget from memory, `max_rows` at most."""
        budget = self._max_rows
        if self._fits is not None and len(jobs) > 1:  # alone, a job runs whatever the budget
            budget = min(budget, self._fits(jobs[0].batch_key))
        return select_rows(jobs, budget)

    def _retreat(self, jobs: list[DenoiseJob]) -> list[DenoiseJob]:
        """Halve the row budget and free what can be freed; the jobs that fit now."""
        self._max_rows = max(1, sum(job.rows for job in jobs) // 2)
        logger.warning("out of memory: the row budget is %d from now on", self._max_rows)
        if self._denoiser.device.type == "cuda":
            torch.cuda.empty_cache()
        return select_rows(jobs, self._max_rows)

    def _predict(self, jobs: list[DenoiseJob]) -> list[torch.Tensor]:
        """Each job's rows of the model output."""
        if self._strict:
            return [self._evaluate([job])[0] for job in jobs]
        return self._evaluate(jobs)

    def _evaluate(self, jobs: list[DenoiseJob]) -> list[torch.Tensor]:
        """Stack the jobs' rows, evaluate once, and hand each job its rows back."""
        rows = [job.rows for job in jobs]
        batch = StepBatch(
            sample=torch.cat([job.model_input().expand(job.rows, -1, -1, -1) for job in jobs]),
            timesteps=torch.cat([job.timestep.reshape(1).float().expand(job.rows) for job in jobs]),
            prompt_embeds=torch.cat([job.conditioning.prompt_embeds for job in jobs]),
            added_conditions={
                name: torch.cat([job.added_conditions[name] for job in jobs]) for name in jobs[0].added_conditions
            },
            loras=[job.loras for job in jobs for _ in range(job.rows)],
        )
        hints = [job.hint for job in jobs for _ in range(job.rows)]
        if any(hints):
            batch = replace(batch, controlled=self._start_control(batch, hints))
        return list(self._denoiser.predict(batch).split(rows))

    def _start_control(self, batch: StepBatch, hints: list[ControlHint | None]) -> ControlledRows:
        """Ask for the residuals of every row that has a hint, in one call, without waiting for them."""
        if self.control is None:
            raise ValueError("a job brought a control hint, but this engine has no ControlNet")
        rows = tuple(row for row, hint in enumerate(hints) if hint is not None)
        index = torch.tensor(rows, device=batch.sample.device)
        own = [hint for hint in hints if hint is not None]
        request = ControlBatch(
            hints=tuple(hint.ref for hint in own),
            sample=batch.sample[index],
            timesteps=batch.timesteps[index],
            prompt_embeds=batch.prompt_embeds[index],
            **{name: tensor[index] for name, tensor in batch.added_conditions.items()},
        )
        return ControlledRows(rows, self.control.start(request, {hint.id: hint for hint in own}))


def _denoise_error(error: Exception) -> DenoiseError:
    wrapped = DenoiseError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
