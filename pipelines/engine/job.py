"""A job of the engine: one stage of one picture in flight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from pipelines.adapters.layers import Mixture
from pipelines.control.types import ControlHint
from pipelines.engine.batching import BatchKey
from pipelines.engine.checks import check_finite
from pipelines.engine.guidance import guide
from pipelines.plan import StagePlan
from pipelines.sampling.base import Sampler
from pipelines.sampling.latents import Latents
from pipelines.text.conditioning import Conditioning


@dataclass
class DenoiseJob:
    """One stage of one picture in flight. One owner; never shared, never copied."""

    id: str
    """Unique among the jobs of an engine."""
    plan: StagePlan
    sampler: Sampler
    generator: torch.Generator
    latents: torch.Tensor
    """`[1, channels, height, width]`."""
    conditioning: Conditioning
    added_conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)
    loras: Mixture = ()
    hint: ControlHint | None = None
    tick: int = 0
    """How many UNet evaluations are done."""

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
        """Guide the job's rows `[rows, channels, height, width]` and take the sampler's step.

        Raises:
            NonFiniteError: the stage ends with latents that are no picture.
        """
        guided = guide(model_output, self.plan.guidance_scale)
        self.latents = self.sampler.step(guided, self.timestep, self.latents, self.generator)
        self.tick += 1
        if self.done:  # once a stage: what is not finite stays so, and on a GPU the question waits for the device
            check_finite(self.latents, self.plan, "the latents have")

    def result(self) -> Latents:
        """Latents and generator, for the next stage."""
        return Latents(self.latents, self.generator.get_state())
