"""The Denoiser protocol: one UNet evaluation, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipelines.adapters.rows import Mixture
from pipelines.control.types import ControlledRows


@dataclass(frozen=True)
class StepBatch:
    """The stacked rows of one tick.

    Attributes:
        sample: `[rows, channels, height, width]`, already scaled by each job's sampler.
        timesteps: `[rows]` float32; whole numbers below 2^24 are exact in it, so samplers with integer timesteps fit.
        prompt_embeds: `[rows, tokens, width]`.
        added_conditions: `text_embeds` `[rows, projection]` and `time_ids` `[rows, ids]` for SDXL, empty for SD.
        loras: the LoRAs of each row, `rows` entries.
        controlled: the rows a ControlNet steers, and their residuals under way.
    """

    sample: torch.Tensor
    timesteps: torch.Tensor
    prompt_embeds: torch.Tensor
    added_conditions: Mapping[str, torch.Tensor]
    loras: Sequence[Mixture]
    controlled: ControlledRows | None = None


class Denoiser(Protocol):
    """A UNet on some backend: no guidance, no sampler, no loop inside.

    Attributes:
        config: the UNet's `config.json`.
        device: where its rows live.
        dtype: format of its rows.
    """

    config: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype

    def predict(self, batch: StepBatch) -> torch.Tensor:
        """Model output of every row, `[rows, channels, height, width]`."""
        ...

    def padding(self, batch: StepBatch) -> int:
        """Rows that `predict` computes beyond those of `batch`, only to fill a compiled batch size."""
        ...
