"""The step engine: one tick = one UNet evaluation.

Between ticks jobs join and leave. A tick selects jobs that can share a forward pass, stacks their rows, predicts once,
guides each job's rows and advances each job's own sampler. Only latent shape and context shape must agree; sampler,
timestep, number of steps, guidance, seed and LoRAs are free per row. Synchronous: the caller decides when and where.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipelines.adapters.layers import Mixture
from pipelines.adapters.store import LoraStore
from pipelines.backends.base import Denoiser, StepBatch
from pipelines.control.rows import take_rows
from pipelines.control.types import ControlBatch, ControlHint, ControlledRows, ControlSource, HintUse
from pipelines.engine.batching import BatchKey, select_rows
from pipelines.engine.checks import check_job
from pipelines.engine.job import DenoiseJob
from pipelines.engine.memory import Retreat
from pipelines.errors import DenoiseError, SdgraphError
from pipelines.families import Family
from pipelines.plan import StagePlan
from pipelines.sampling.latents import Latents, LatentSpace, draw_noise, make_generator
from pipelines.sampling.samplers import make_sampler
from pipelines.text.conditioning import Conditioning
from pipelines.torch_compat import ran_out_of_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TickReport:
    """What a tick did."""

    rows: int = 0
    """UNet batch entries that jobs asked for."""
    padding: int = 0
    """Entries that only filled a batch."""
    seconds: float = 0.0
    """Wall-clock time of the tick."""
    advanced: tuple[DenoiseJob, ...] = ()
    """Jobs that took part, those that left included."""
    finished: tuple[DenoiseJob, ...] = ()
    """Jobs that left with a result."""
    failed: tuple[tuple[DenoiseJob, SdgraphError], ...] = ()
    """Jobs that left with an exception."""


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation of the UNet: whom it was for, and what came of it."""

    jobs: list[DenoiseJob]
    outputs: Sequence[tuple[DenoiseJob, torch.Tensor]] = ()
    """Each job with its rows of the model output; none where the evaluation failed."""
    padding: int = 0
    error: Exception | None = None


def _nobodys(error: Exception) -> bool:
    return False


class StepEngine:
    """Jobs of one component, oldest first. Not thread-safe: one thread calls it, though any may use `loras`."""

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
        rows_that_fit: Callable[[BatchKey], int] | None = None,
    ) -> None:
        """Run jobs on `denoiser`.

        Args:
            denoiser: the UNet.
            family: what else the UNet is told.
            scheduler_config: the model's `scheduler_config.json`, which every sampler starts from.
            space: of the VAE that made and will read the latents.
            loras: loads the LoRAs of a stage; on any thread, so that reading a file does not hold up a tick.
            control: where residuals come from, for jobs that bring a hint.
            max_rows: most rows of a tick; halved for a while when memory runs out.
            strict: evaluate each job on its own, so that its bytes do not depend on its neighbours.
            rows_that_fit: rows of a shape that fit into memory now, asked before every tick; None trusts `max_rows`.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows {max_rows} is out of range: at least 1")
        self.denoiser = denoiser
        self._family = family
        self._scheduler_config = scheduler_config
        self._space = space
        self.loras = loras
        self.control = control
        self.max_rows = max_rows
        self._strict = strict
        self.rows_that_fit = rows_that_fit
        self._retreat = Retreat()
        self.control_lost: Callable[[Exception], bool] = _nobodys
        """Whether an error says that `control` itself is gone: no job's own fault, and no use in trying each alone."""
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

        Raises:
            DenoiseError: something of this job alone would break the batch it joins; see `checks.py`.
            NonFiniteError: its latents or embeddings have values that are not finite numbers.
            InvalidValueError: no sampler can be made of the plan.
        """
        if job_id in self._jobs:
            raise ValueError(f"job {job_id} is already here")
        device, dtype = self.denoiser.device, self.denoiser.dtype
        sampler = make_sampler(plan.sampler, self._scheduler_config, plan.schedule, plan.seed, device)
        generator = make_generator(plan.seed, latents.generator_state if latents else None)
        shape = self._space.shape(plan.width, plan.height)
        if latents is None:
            values = draw_noise(shape, generator, device, dtype) * sampler.init_noise_sigma
        else:
            values = latents.values.to(device, dtype)
            if plan.schedule.strength is not None:
                values = sampler.add_noise(values, draw_noise(tuple(values.shape), generator, device, dtype))
        conditioning = conditioning.to(device, dtype)
        added = self._family.added_conditions(plan, conditioning, self.denoiser.config)
        check_job(plan, values, conditioning, added, hint, shape, self.denoiser.config)
        job = DenoiseJob(job_id, plan, sampler, generator, values, conditioning, added, loras, hint)
        self._jobs[job_id] = job
        return job

    def cancel(self, job_id: str) -> DenoiseJob | None:
        """Drop a job; its rows are free at the next tick. Returns it if it was here."""
        return self._jobs.pop(job_id, None)

    def clear(self) -> None:
        """Drop every job."""
        self._jobs.clear()

    @torch.inference_mode()
    def tick(self) -> TickReport:
        """Evaluate the UNet once and advance the jobs that were in it.

        When memory runs out, the row budget is halved for a while and the tick tried once more with fewer jobs. When
        the evaluation fails otherwise, each of its jobs is evaluated alone once, so that only the guilty one fails;
        when the source of residuals is gone, the jobs it steers fail at once and the others stay for the next tick. An
        exception of a job's own sampler fails that job.
        """
        begin = time.perf_counter()
        ready = [job for job in self._jobs.values() if job.done]  # a slice can be empty: a refiner with nothing left
        together = self._attempt(self._select([job for job in self._jobs.values() if not job.done]))
        if ran_out_of_memory(together.error):
            together = self._attempt(self._with_fewer_rows(together))
        elif together.outputs:
            self._retreat.had_enough(self.max_rows)
        evaluations = [together] if together.error is None else self._apart(together, together.error)
        failed: list[tuple[DenoiseJob, SdgraphError]] = []
        for evaluation in evaluations:
            if evaluation.error is not None:
                failed += [(job, _ours(evaluation.error)) for job in evaluation.jobs]
            for job, output in evaluation.outputs:
                try:
                    job.advance(output)
                except Exception as error:  # the job's own
                    failed.append((job, _ours(error)))
                else:
                    if job.done:
                        ready.append(job)
        # A job cancelled while the tick ran on another thread is no longer here: nobody waits for it.
        left = [job for job in ready if self._jobs.pop(job.id, None) is not None]
        broken = [(job, error) for job, error in failed if self._jobs.pop(job.id, None) is not None]
        advanced = tuple(job for evaluation in evaluations for job in evaluation.jobs)
        return TickReport(
            rows=sum(job.rows for job in advanced),
            padding=sum(evaluation.padding for evaluation in evaluations),
            seconds=time.perf_counter() - begin,
            advanced=advanced,
            finished=tuple(left),
            failed=tuple(broken),
        )

    def _select(self, jobs: list[DenoiseJob]) -> list[DenoiseJob]:
        """The jobs of the next tick: a row budget from memory, `max_rows` at most."""
        budget = self._retreat.limit(self.max_rows)
        if self.rows_that_fit is not None and len(jobs) > 1:  # alone, a job runs whatever the budget
            budget = min(budget, self.rows_that_fit(jobs[0].batch_key))
        return select_rows(jobs, budget)

    def _attempt(self, jobs: list[DenoiseJob]) -> _Evaluation:
        """Evaluate the UNet for these jobs, together or in strict mode one by one."""
        groups = [[job] for job in jobs] if self._strict or not jobs else [jobs]
        outputs: list[tuple[DenoiseJob, torch.Tensor]] = []
        padding = 0
        try:
            for group in groups:
                batch = self._stack(group)
                parts = self.denoiser.predict(batch).split([job.rows for job in group])
                outputs += zip(group, parts, strict=True)
                padding += self.denoiser.padding(batch)
        except Exception as error:
            return _Evaluation(jobs, error=error)
        return _Evaluation(jobs, outputs, padding)

    def _apart(self, together: _Evaluation, error: Exception) -> list[_Evaluation]:
        """What becomes of the jobs of an evaluation that failed: each alone, once."""
        steered = [job for job in together.jobs if job.hint is not None]
        if steered and self.control_lost(error):
            return [_Evaluation(steered, error=error)]
        if len(together.jobs) == 1:
            return [together]
        logger.warning("a tick of %d jobs failed, trying each alone: %s", len(together.jobs), error)
        traceback.clear_frames(error.__traceback__)  # they hold the activations of the pass that failed
        return [self._attempt([job]) for job in together.jobs]

    def _with_fewer_rows(self, evaluation: _Evaluation) -> list[DenoiseJob]:
        """Halve the row budget and free what can be freed; the jobs that fit now. A job alone teaches no budget."""
        budget = sum(job.rows for job in evaluation.jobs)
        if len(evaluation.jobs) > 1:
            budget = self._retreat.halve(budget)
            logger.warning("out of memory: the row budget is %d for a while", budget)
        assert evaluation.error is not None
        traceback.clear_frames(evaluation.error.__traceback__)  # they hold the activations of the pass that failed
        if self.denoiser.device.type == "cuda":
            torch.cuda.empty_cache()
        return select_rows(evaluation.jobs, budget)

    def _stack(self, jobs: list[DenoiseJob]) -> StepBatch:
        """The jobs' rows, and their residuals under way."""
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
        return batch

    def _start_control(self, batch: StepBatch, hints: list[ControlHint | None]) -> ControlledRows:
        """Ask for the residuals of every row that has a hint, in one call, without waiting for them."""
        if self.control is None:
            raise ValueError("a job brought a control hint, but this engine has no ControlNet")
        rows = tuple(row for row, hint in enumerate(hints) if hint is not None)
        own = [hint for hint in hints if hint is not None]
        request = ControlBatch(
            uses=tuple((HintUse(hint.ref),) for hint in own),
            sample=take_rows(batch.sample, rows),
            timesteps=take_rows(batch.timesteps, rows),
            prompt_embeds=take_rows(batch.prompt_embeds, rows),
            **{name: take_rows(tensor, rows) for name, tensor in batch.added_conditions.items()},
        )
        return ControlledRows(rows, self.control.start(request, {hint.id: hint for hint in own}))


def _ours(error: Exception) -> SdgraphError:
    """An error as its job is told of it: one raised on purpose as it is, any other inside a DenoiseError."""
    if isinstance(error, SdgraphError):
        return error
    wrapped = DenoiseError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
