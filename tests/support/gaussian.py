"""A stand-in for a trained UNet that knows the right answer: the best prediction where the data is Gaussian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipelines.backends.base import StepBatch

STD = 0.5
"""Standard deviation of the data, so of the latents that a good sampler ends with."""
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class GaussianDenoiser:
    """A `Denoiser` in closed form; it remembers every timestep it was asked about."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, prediction_type: str) -> None:
        self.config: Mapping[str, Any] = {"in_channels": 4, "cross_attention_dim": 8}
        self.asked: list[float] = []
        self._predicts_v = prediction_type == "v_prediction"
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self._alphas = (1 - betas).cumprod(0)

    def predict(self, batch: StepBatch) -> torch.Tensor:
        self.asked += batch.timesteps.tolist()
        return torch.cat([self.of(row[None], float(t)) for row, t in zip(batch.sample, batch.timesteps, strict=True)])

    def padding(self, batch: StepBatch) -> int:
        return 0

    def of(self, sample: torch.Tensor, timestep: float) -> torch.Tensor:
        """Expectation of what the model predicts, given a noised sample."""
        alpha = float(self._alphas[min(max(int(timestep), 0), 999)])
        variance = alpha * STD**2 + 1 - alpha
        noise, data = (1 - alpha) ** 0.5 * sample / variance, alpha**0.5 * STD**2 * sample / variance
        return alpha**0.5 * noise - (1 - alpha) ** 0.5 * data if self._predicts_v else noise
