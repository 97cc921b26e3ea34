"""The Denoiser protocol: one UNet evaluation, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipelines.adapters.layers import Mixture
from pipelines.control.types import ControlledRows


@dataclass(frozen=True)
class StepBatch:
    """The stacked rows of one tick."""

    sample: torch.Tensor
    """`[rows, channels, height, width]`, already scaled by each job's sampler."""
    timesteps: torch.Tensor
    """`[rows]` float32; whole numbers below 2^24 are exact in it, so samplers with integer timesteps fit."""
    prompt_embeds: torch.Tensor
    """`[rows, tokens, width]`."""
    added_conditions: Mapping[str, torch.Tensor]
    """`text_embeds` `[rows, projection]` and `time_ids` `[rows, ids]` for SDXL, empty for SD."""
    loras: Sequence[Mixture]
    """The LoRAs of each row, `rows` entries."""
    controlled: ControlledRows | None = None
    """The rows a ControlNet steers, and their residuals under way."""


class Denoiser(Protocol):
    """A UNet on some backend: no guidance, no sampler, no loop inside."""

    config: Mapping[str, Any]
    """The UNet's `config.json`."""
    device: torch.device
    """The device of its rows."""
    dtype: torch.dtype
    """Format of its rows."""

    def predict(self, batch: StepBatch) -> torch.Tensor:
        """Model output of every row, `[rows, channels, height, width]`."""
        ...

    def padding(self, batch: StepBatch) -> int:
        """Rows that `predict` computes beyond those of `batch`, only to fill a compiled batch size."""
        ...
