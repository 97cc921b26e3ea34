"""Classifier-free guidance, tick by tick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipelines.plan import StagePlan


@dataclass(frozen=True)
class Guidance:
    """How the outputs of one job become one prediction.

    `uncond + scale * (cond - uncond)`, Ho & Salimans 2022 (arXiv:2207.12598) as diffusers counts `scale`: 1 is the cond
    row alone.
    """

    scale: float
    rescale: float
    """Share of the prediction that is scaled back to the deviation of the cond row: section 3.4 of Lin et al. 2023
    (arXiv:2305.08891)."""
    ticks: tuple[bool, ...]
    """Which ticks are guided; at the others the cond row is evaluated alone."""

    @classmethod
    def create(cls, plan: StagePlan, timesteps: Sequence[float], order: int, trained: int) -> Guidance:
        """The guidance of a stage.

        Args:
            plan: its window is in shares of the training timesteps, from the noisiest (Kynkäänniemi et al. 2024,
                arXiv:2404.07724); both ticks of a second-order step follow the first.
            timesteps: of every tick.
            order: ticks of one step.
            trained: number of training timesteps.
        """
        # Open where nothing is asked for: EDM's timesteps are logarithms of noise levels, and some are negative.
        noisiest = trained - plan.guidance_start * trained if plan.guidance_start > 0 else math.inf
        cleanest = trained - plan.guidance_end * trained if plan.guidance_end < 1 else -math.inf
        firsts = (timesteps[tick - tick % order] for tick in range(len(timesteps)))
        inside = tuple(plan.guided and cleanest <= timestep <= noisiest for timestep in firsts)
        return cls(plan.guidance_scale, plan.guidance_rescale, inside)

    def at(self, tick: int) -> bool:
        """Whether a tick is guided; after the last one, as that was."""
        return bool(self.ticks) and self.ticks[min(tick, len(self.ticks) - 1)]

    @property
    def shares(self) -> np.ndarray:
        """Of the uncond and the cond output in the prediction before it is scaled back, `[ticks, 2]`."""
        return np.array([(1.0 - self.scale, self.scale) if guided else (0.0, 1.0) for guided in self.ticks])

    def rescaled(self, output: torch.Tensor) -> torch.Tensor:
        """Both rows `[2, ...]`, uncond and cond, scaled so that the guided prediction is; `output` without rescaling.

        Guidance is linear, so its factor can come first.
        """
        if not self.rescale or output.shape[0] == 1:
            return output
        guided = torch.lerp(output[0], output[1], self.scale)
        factor = self.rescale * (output[1].std() / guided.std()) + (1 - self.rescale)
        return output * factor

    def combine(self, output: torch.Tensor) -> torch.Tensor:
        """One prediction `[1, ...]` of the rows of a job: uncond and cond, or cond alone."""
        if output.shape[0] == 1:
            return output
        uncond, cond = self.rescaled(output).chunk(2)
        return uncond + self.scale * (cond - uncond)
