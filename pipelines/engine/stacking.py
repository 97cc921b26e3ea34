"""The rows of several jobs -> one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from pipelines.backends.base import StepBatch
from pipelines.control.rows import take_rows
from pipelines.control.types import ControlBatch, ControlHint, ControlledRows, ControlSource, HintUse
from pipelines.engine.job import DenoiseJob, UNetConditions


class RowStack:
    """Stacks the rows of a tick. What is the same as at the last tick is not stacked again."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Samples are given in `dtype`, the model's."""
        self._dtype = dtype
        self._conditions: Sequence[UNetConditions] = ()
        self._embeds = torch.empty(0)
        self._added: Mapping[str, torch.Tensor] = {}

    def stack(self, jobs: Sequence[DenoiseJob], timesteps: torch.Tensor, control: ControlSource | None) -> StepBatch:
        """The jobs' rows, and their residuals under way.

        Args:
            jobs: whose batch keys are compatible with the first one's.
            timesteps: of every row, `[rows]`.
            control: where residuals come from.
        """
        sample = torch.cat([part for job in jobs for _ in range(job.rows) for part in job.row])
        self._stack_conditions(jobs)
        channels, height, width = jobs[0].course.shape[1:]
        batch = StepBatch(
            sample=sample.view(len(timesteps), -1, height, width).to(self._dtype),
            timesteps=timesteps,
            prompt_embeds=self._embeds,
            added_conditions=self._added,
            loras=[job.loras for job in jobs for _ in range(job.rows)],
        )
        uses = [own for job in jobs for own in job.uses]
        if not any(uses):
            return batch
        hints = {hint.id: hint for job in jobs for hint in job.steering.hints}
        return replace(batch, controlled=_start(control, batch, channels, uses, hints))

    def _stack_conditions(self, jobs: Sequence[DenoiseJob]) -> None:
        conditions = [job.unet_conditions for job in jobs]
        if len(conditions) == len(self._conditions) and all(
            a is b for a, b in zip(conditions, self._conditions, strict=True)
        ):
            return
        tokens = conditions[0].conditioning.prompt_embeds.shape[1]  # the oldest job's are the most
        self._embeds = torch.cat([_repeated(own.conditioning.prompt_embeds, tokens) for own in conditions])
        self._added = {name: torch.cat([own.added[name] for own in conditions]) for name in conditions[0].added}
        self._conditions = conditions


def _repeated(embeds: torch.Tensor, tokens: int) -> torch.Tensor:
    """A text context repeated to `tokens` tokens, which changes nothing for the UNet."""
    times = tokens // embeds.shape[1]
    return embeds if times == 1 else embeds.repeat(1, times, 1)


def _start(
    control: ControlSource | None,
    batch: StepBatch,
    channels: int,
    uses: Sequence[tuple[HintUse, ...]],
    hints: Mapping[str, ControlHint],
) -> ControlledRows:
    """Request the residuals of every row that some map steers, in one call, without waiting for them.

    A ControlNet sees the first `channels`, of the latents alone, also beside a UNet for inpainting.
    """
    if control is None:
        raise ValueError("a job brought a control map, but this engine has no ControlNet")
    rows = tuple(row for row, own in enumerate(uses) if own)
    request = ControlBatch(
        uses=tuple(uses[row] for row in rows),
        sample=take_rows(batch.sample, rows)[:, :channels],
        timesteps=take_rows(batch.timesteps, rows),
        prompt_embeds=take_rows(batch.prompt_embeds, rows),
        **{name: take_rows(tensor, rows) for name, tensor in batch.added_conditions.items()},
    )
    asked = request.hint_ids
    return ControlledRows(rows, control.start(request, {name: hint for name, hint in hints.items() if name in asked}))
