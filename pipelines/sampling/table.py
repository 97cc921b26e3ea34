"""A sampler as a table: the matrix of each tick, and the noise it draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from pipelines.diffusers_compat import brownian_tree
from pipelines.sampling.latents import draw_noise

KEPT_SLOTS = 4
"""Slots that a table for masks has behind its others."""
OUTPUT, NOISE, FIRST_SLOT = 0, 1, 2
"""Columns of a tick's matrix; slot 0 is the latents."""


class Draw(NamedTuple):
    """One draw of noise, as the solver makes it."""

    dtype: torch.dtype | None
    """None is the model's own."""
    between: tuple[torch.Tensor, torch.Tensor] | None = None
    """Noise levels between which a Brownian tree is asked; None draws from the job's generator."""


@dataclass(frozen=True)
class Table:
    """One sampler on one part of a schedule."""

    timesteps: tuple[float, ...]
    """What the UNet is asked at each tick."""
    order: int
    """UNet evaluations of one step."""
    init_noise_sigma: float
    """Standard deviation of the noise that a picture from text begins with."""
    noised: tuple[float, float] | None
    """Weights of latents and noise where img2img begins; None unless the part has a strength."""
    first_input: float
    """What the latents are multiplied by for the first tick."""
    weights: np.ndarray
    """`[ticks, 1 + slots, 2 + slots]` float32: rows are next input and slots, columns are output, noise and slots."""
    draws: tuple[Draw | None, ...]
    """The noise that each tick draws, if any."""
    levels: tuple[float, float] | None
    """Lowest and highest noise level of the Brownian tree, for samplers that ask one."""
    inputs: tuple[float, ...] = ()
    """What the latents are multiplied by for each tick."""
    kept: tuple[tuple[float, float], ...] = ()
    """After each tick, the weights of picture and noise in what stays of a masked picture; read only where asked."""

    @property
    def slots(self) -> int:
        """Tensors of the latents' shape that are remembered between ticks, the latents included (ENG-15)."""
        return len(self.weights[0]) - 1 if len(self.weights) else 1

    def guided(self, shares: np.ndarray) -> np.ndarray:
        """Weights `[ticks, 1 + slots, 3 + slots]` whose first two columns are the uncond and the cond output.

        Guidance is linear too: `shares` `[ticks, 2]` of the two make the prediction of each tick.
        """
        output = self.weights[..., OUTPUT : OUTPUT + 1].astype(np.float64)
        outputs = (output * shares.reshape(-1, 1, 2)).astype(np.float32)
        return np.concatenate([outputs, self.weights[..., NOISE:]], axis=-1)

    def with_kept(self) -> Table:
        """The table with four slots more: picture, its noise, and what stays of it as next input and as latents.

        Behind each tick's product, the last two go over the first two rows wherever the picture stays.
        """
        assert len(self.kept) == len(self.inputs) == len(self.weights), "read for masks"
        ticks, rows, columns = self.weights.shape
        wider = np.zeros((ticks, rows + KEPT_SLOTS, columns + KEPT_SLOTS), dtype=np.float32)
        wider[:, :rows, :columns] = self.weights
        wider[:, rows, columns] = wider[:, rows + 1, columns + 1] = 1
        latents = np.array(self.kept)
        following = np.array([*self.inputs[1:], 0.0])[:, None]
        wider[:, rows + 2, columns : columns + 2] = latents * following
        wider[:, rows + 3, columns : columns + 2] = latents
        return replace(self, weights=wider)

    def draw(
        self, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, seed: int
    ) -> Iterator[torch.Tensor]:
        """The noise of every tick that draws some, in the solver's own order and format: `shape`, on the CPU.

        Args:
            shape: of the latents.
            dtype: of the model.
            generator: the job's own; afterwards it is where the solver would have left it.
            seed: of the job, for the Brownian tree.
        """
        tree = brownian_tree(shape, dtype, self.levels, seed) if self.levels else None
        for draw in filter(None, self.draws):
            if draw.between is not None and tree is not None:
                yield tree(*draw.between)
            else:
                yield draw_noise(shape, generator, draw.dtype or dtype)
