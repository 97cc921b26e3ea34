"""The step engine: one tick = one UNet evaluation.

Between ticks jobs join and leave. A tick selects jobs that can share a forward pass, stacks their rows, predicts once,
and advances all jobs by one product (`courses.py`). Only latent shape and context shape must agree; sampler, timestep,
number of steps, guidance, seed and LoRAs are free per row. Synchronous: the caller decides when and where.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipelines.adapters.store import LoraStore
from pipelines.backends.base import Denoiser
from pipelines.control.types import ControlHint, ControlSource
from pipelines.engine.batching import BatchKey, select_rows
from pipelines.engine.courses import TickNumbers, advance
from pipelines.engine.job import DenoiseJob, Fetched
from pipelines.engine.memory import RecoveringBudget
from pipelines.engine.preparing import JobMaker, always
from pipelines.engine.stacking import RowStack
from pipelines.errors import DenoiseError, SdgraphError
from pipelines.families import Family
from pipelines.plan import StagePlan
from pipelines.sampling.latents import Latents, LatentSpace
from pipelines.sampling.tables import SamplerTables
from pipelines.text.conditioning import Conditioning
from pipelines.torch_compat import ran_out_of_memory
from pipelines.transfers import Mark

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TickReport:
    """The result of a tick, or of one that is queued on the device."""

    rows: int = 0
    """UNet batch entries that jobs asked for."""
    padding: int = 0
    """Entries that only filled a batch."""
    advanced: tuple[DenoiseJob, ...] = ()
    """Jobs that took part, those that left included."""
    finished: tuple[Fetched, ...] = ()
    """Results of jobs that finished, by id."""
    previews: tuple[Fetched, ...] = ()
    """Latents of watched jobs after this tick, by id."""
    failed: tuple[tuple[DenoiseJob, SdgraphError], ...] = ()
    """Exceptions of jobs that failed, by id."""
    mark: Mark | None = None
    """Passed when the device has finished the tick; None if nothing was evaluated."""


@dataclass
class _Evaluation:
    """One evaluation of the UNet: its jobs and its outcome."""

    jobs: Sequence[DenoiseJob]
    rows: int = 0
    padding: int = 0
    error: Exception | None = None
    """The error of all its jobs; none of them advanced."""
    failed: list[tuple[DenoiseJob, Exception]] = field(default_factory=list)
    """Jobs whose own sampler failed after it."""


def _nobodys(error: Exception) -> bool:
    return False


class StepEngine:
    """Jobs of one component, oldest first. Not thread-safe: one thread calls it, though any may `prepare`."""

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
        tables: SamplerTables | None = None,
    ) -> None:
        """Run jobs on `denoiser`.

        Args:
            denoiser: the UNet.
            family: what else the UNet is told.
            scheduler_config: the model's `scheduler_config.json`, which every sampler starts from.
            space: of the VAE that made and will read the latents.
            loras: loads the LoRAs of a stage.
            control: where residuals come from, for jobs that bring a hint.
            max_rows: most rows of a tick; halved for a while when memory runs out.
            strict: evaluate each job alone, so that its bytes do not depend on other jobs (ENG-6).
            rows_that_fit: rows of a shape that fit into memory now, asked before every tick; None trusts `max_rows`.
            tables: of the samplers over `scheduler_config`; made here if None.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows {max_rows} is out of range: at least 1")
        self.denoiser = denoiser
        self.loras = loras
        self.control = control
        self.max_rows = max_rows
        self._strict = strict
        self.rows_that_fit = rows_that_fit
        self._recovering = RecoveringBudget()
        self.control_lost: Callable[[Exception], bool] = _nobodys
        """Whether an error says that `control` itself is gone: no job's own fault, and no use in trying each alone."""
        tables = tables or SamplerTables(scheduler_config)
        self._maker = JobMaker(denoiser, family, scheduler_config, space, loras, tables)
        self._rows = RowStack(denoiser.dtype)
        self._jobs: dict[str, DenoiseJob] = {}

    def __len__(self) -> int:
        """Jobs in flight."""
        return len(self._jobs)

    def prepare(
        self,
        job_id: str,
        plan: StagePlan,
        conditioning: Conditioning,
        latents: Latents | None,
        hints: Sequence[ControlHint] = (),
        wanted: Callable[[], bool] = always,
    ) -> DenoiseJob:
        """Do what a job needs before its first tick: load its LoRAs, draw its noise, check it. On any thread.

        Args:
            job_id: unique in this engine.
            plan: the stage.
            conditioning: one row, or uncond and cond.
            latents: None begins from noise (text to image); otherwise the encoded picture, noised to the first
                timestep when the schedule has a strength (img2img), or the previous stage's, taken as they are.
            hints: the control maps of the plan's controls, in their order.
            wanted: whether a caller still waits; called between the steps of the preparation.

        Raises:
            DenoiseError: something of this job alone would break the batch it joins; see `checks.py`.
            NonFiniteError: its latents or embeddings have values that are not finite numbers.
            InvalidValueError: no sampler can be made of the plan, or a LoRA does not fit.
            CancelledError: no caller waits any longer.
        """
        return self._maker.make(job_id, plan, conditioning, latents, hints, wanted)

    @torch.inference_mode()
    def add(self, job: DenoiseJob) -> DenoiseJob:
        """Take a prepared job in; it joins at the next tick."""
        if job.id in self._jobs:
            raise ValueError(f"job {job.id} is already here")
        job.send(self.denoiser.device)
        self._jobs[job.id] = job
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

        On a GPU all of this is only queued when it returns; `TickReport.mark` tells when it is done.
        """
        ready = [job for job in self._jobs.values() if job.done]  # a slice can be empty: a refiner with nothing left
        chosen = self._select([job for job in self._jobs.values() if not job.done])
        groups = [[job] for job in chosen] if self._strict else [chosen] if chosen else []
        evaluations = [evaluation for group in groups for evaluation in self._evaluate(group)]
        failed: list[tuple[DenoiseJob, Exception]] = []
        for evaluation in evaluations:
            failed += evaluation.failed
            failed += [(job, evaluation.error) for job in evaluation.jobs if evaluation.error is not None]
        advanced = tuple(job for evaluation in evaluations for job in evaluation.jobs)
        lost = {job.id for job, _ in failed}
        ready += [job for job in advanced if job.done and job.id not in lost]
        # A job cancelled while the tick ran on another thread is no longer here: nobody waits for it.
        left = [job.fetch() for job in ready if self._jobs.pop(job.id, None) is not None]
        seen = [job.fetch() for job in advanced if job.previews and job.id in self._jobs and job.id not in lost]
        broken = [(job, _ours(error)) for job, error in failed if self._jobs.pop(job.id, None) is not None]
        return TickReport(
            rows=sum(evaluation.rows for evaluation in evaluations),
            padding=sum(evaluation.padding for evaluation in evaluations),
            advanced=advanced,
            finished=tuple(left),
            previews=tuple(seen),
            failed=tuple(broken),
            mark=Mark(self.denoiser.device) if evaluations else None,
        )

    def _select(self, jobs: list[DenoiseJob]) -> list[DenoiseJob]:
        """The jobs of the next tick: a row budget from memory, `max_rows` at most."""
        budget = self._recovering.limit(self.max_rows)
        if self.rows_that_fit is not None and len(jobs) > 1:  # alone, a job runs whatever the budget
            budget = min(budget, self.rows_that_fit(jobs[0].batch_key))
        return select_rows(jobs, budget)

    def _evaluate(self, jobs: list[DenoiseJob]) -> list[_Evaluation]:
        """Advance these jobs together, or as many as memory and faults allow."""
        together = self._attempt(jobs)
        if together.error is None:
            self._recovering.had_enough(self.max_rows)
        elif ran_out_of_memory(together.error):
            together = self._attempt(self._with_fewer_rows(together, together.error))
        return [together] if together.error is None else self._apart(together, together.error)

    def _attempt(self, jobs: Sequence[DenoiseJob]) -> _Evaluation:
        """Evaluate the UNet for these jobs and advance them."""
        rows = [job.rows for job in jobs]
        courses = [job.course for job in jobs]
        try:
            numbers = TickNumbers(courses, rows, self.denoiser.device)
            batch = self._rows.stack(jobs, numbers.timesteps, self.control)
            padding = self.denoiser.padding(batch)
            failures = advance(courses, rows, self.denoiser.predict(batch), numbers.weights)  # last: nobody twice
        except Exception as error:
            return _Evaluation(jobs, sum(rows), error=error)
        return _Evaluation(
            jobs, sum(rows), padding, failed=[(jobs[position], error) for position, error in failures.items()]
        )

    def _apart(self, together: _Evaluation, error: Exception) -> list[_Evaluation]:
        """What becomes of the jobs of an evaluation that failed: each alone, once."""
        steered = [job for job in together.jobs if any(job.uses)]
        if steered and self.control_lost(error):
            return [_Evaluation(steered, error=error)]
        if len(together.jobs) == 1:
            return [together]
        logger.warning("a tick of %d jobs failed, trying each alone: %s", len(together.jobs), error)
        traceback.clear_frames(error.__traceback__)  # they hold the activations of the pass that failed
        return [self._attempt([job]) for job in together.jobs]

    def _with_fewer_rows(self, evaluation: _Evaluation, error: Exception) -> list[DenoiseJob]:
        """Halve the row budget, unless one job alone failed, and free memory; returns the jobs that fit now."""
        budget = sum(job.rows for job in evaluation.jobs)
        if len(evaluation.jobs) > 1:
            budget = self._recovering.halve(budget)
            logger.warning("out of memory: the row budget is %d for a while", budget)
        traceback.clear_frames(error.__traceback__)  # they hold the activations of the pass that failed
        if self.denoiser.device.type == "cuda":
            torch.cuda.empty_cache()
        return select_rows(evaluation.jobs, budget)


def _ours(error: Exception) -> SdgraphError:
    """The error that a job reports: one of this project unchanged, any other inside a DenoiseError."""
    if isinstance(error, SdgraphError):
        return error
    wrapped = DenoiseError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
