"""A job of the engine: one stage of one picture in flight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from pipelines.adapters.layers import Mixture
from pipelines.control.types import HintUse
from pipelines.engine.batching import BatchKey
from pipelines.engine.checks import check_finite
from pipelines.engine.courses import Course
from pipelines.engine.steering import Steering
from pipelines.plan import StagePlan
from pipelines.sampling.latents import Latents
from pipelines.text.conditioning import Conditioning
from pipelines.transfers import Mark, fetch, send


@dataclass(frozen=True)
class UNetConditions:
    """The text embeddings and the further inputs of a job's rows, as the UNet takes them."""

    conditioning: Conditioning
    added: Mapping[str, torch.Tensor]

    def last_row(self) -> UNetConditions:
        """The cond row alone."""
        embeds, pooled = self.conditioning.prompt_embeds, self.conditioning.pooled_prompt_embeds
        alone = Conditioning(embeds[-1:], pooled[-1:] if pooled is not None else None)
        return UNetConditions(alone, {name: tensor[-1:] for name, tensor in self.added.items()})


@dataclass
class DenoiseJob:
    """One stage of one picture in flight. One owner; never shared, never copied."""

    id: str
    """Unique among the jobs of an engine."""
    plan: StagePlan
    course: Course
    """Its way through the schedule; holds the latents."""
    dtype: torch.dtype
    """Of the latents it ends with."""
    conditioning: Conditioning
    added_conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    loras: Mixture = ()
    steering: Steering = field(default_factory=Steering)
    beside: torch.Tensor | None = None
    """`[elements]` float32: channels that a UNet for inpainting reads behind the latents' own at every tick."""
    mask: torch.Tensor | None = None
    """`[1, 1, height, width]` on the host: of a part that stays, for the next stage."""
    previews: bool = False
    """Whether a watcher wants its latents after every tick."""
    _unet_conditions: tuple[UNetConditions, UNetConditions] | None = field(default=None, init=False, repr=False)

    @property
    def rows(self) -> int:
        """UNet batch entries the job contributes to the next tick."""
        return self.conditioning.rows if self.course.guided else 1

    @property
    def unet_conditions(self) -> UNetConditions:
        """The UNet's conditions for the rows of the next tick; the same object while nothing changes."""
        if self._unet_conditions is None:
            every = UNetConditions(self.conditioning, self.added_conditions)
            self._unet_conditions = (every, every.last_row())
        return self._unet_conditions[0] if self.rows == self.conditioning.rows else self._unet_conditions[1]

    @property
    def uses(self) -> tuple[tuple[HintUse, ...], ...]:
        """The control maps of each row of the next tick."""
        return self.steering.uses(self.course.tick, self.rows)

    @cached_property
    def batch_key(self) -> BatchKey:
        """What another job must have in common to share a tick."""
        return BatchKey(self.course.shape[1:], tuple(self.conditioning.prompt_embeds.shape[1:]))

    @property
    def row(self) -> Sequence[torch.Tensor]:
        """What the UNet sees of each row next, float32: flat tensors, one behind the other."""
        own = self.course.model_input().view(-1)
        return [own] if self.beside is None else [own, self.beside]

    @property
    def latents(self) -> torch.Tensor:
        """`[1, channels, height, width]`, as they stand, where the engine computes."""
        return self.course.latents

    @property
    def done(self) -> bool:
        """Whether the slice of the schedule is finished."""
        return self.ticks_left <= 0

    @property
    def steps_done(self) -> int:
        """Sampler steps taken; a step of a second-order sampler is two ticks."""
        return math.ceil(self.course.tick / self.course.order)

    @property
    def steps(self) -> int:
        """Sampler steps of this stage."""
        return math.ceil(len(self.course.timesteps) / self.course.order)

    @property
    def work(self) -> int:
        """What one tick costs: rows x pixels of the picture."""
        return self.rows * self.plan.width * self.plan.height

    @property
    def ticks_left(self) -> int:
        """UNet evaluations to come."""
        return len(self.course.timesteps) - self.course.tick

    @property
    def outstanding_work(self) -> int:
        """What is left to do: the work of all ticks to come."""
        ticks = range(self.course.tick, len(self.course.timesteps))
        rows = sum(self.conditioning.rows if self.course.guided_at(tick) else 1 for tick in ticks)
        return rows * self.plan.width * self.plan.height

    def send(self, device: torch.device) -> None:
        """Move everything the ticks need to `device`, before the first."""
        self.course.send(device)
        self.beside = send(self.beside, device) if self.beside is not None else None
        embeds, pooled = self.conditioning.prompt_embeds, self.conditioning.pooled_prompt_embeds
        self.conditioning = Conditioning(send(embeds, device), send(pooled, device) if pooled is not None else None)
        self.added_conditions = {name: send(tensor, device) for name, tensor in self.added_conditions.items()}
        self._unet_conditions = None

    def fetch(self) -> Fetched:
        """Begin to copy the latents, as they stand, to the host."""
        return Fetched(self, fetch(self.latents), self.course.generator_state, Mark(self.latents.device))


@dataclass(frozen=True)
class Fetched:
    """The latents of a job on their way to the host."""

    job: DenoiseJob
    values: torch.Tensor
    """`[1, channels, height, width]`; there when `mark` is passed."""
    generator_state: torch.Tensor
    mark: Mark

    def result(self) -> Latents:
        """Latents and generator, for the next stage; waits for the device where it is not there yet.

        Raises:
            NonFiniteError: they are no picture. What is not finite stays so, so this is asked once a stage.
        """
        latents = self.preview()
        check_finite(latents.values, self.job.plan, "the latents have")
        return replace(latents, mask=self.job.mask)

    def preview(self) -> Latents:
        """The same before the last tick, whatever the values."""
        self.mark.wait()
        return Latents(self.values.to(self.job.dtype), self.generator_state)
