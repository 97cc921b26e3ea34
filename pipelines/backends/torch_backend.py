"""The torch backend: diffusers' UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pipelines.adapters.rows import RowAdapters
from pipelines.adapters.slots import BUCKETS
from pipelines.backends.base import StepBatch
from pipelines.backends.halves import UNetHalves
from pipelines.control.buffers import spread

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class TorchDenoiser:
    """A Denoiser over a loaded UNet."""

    def __init__(self, unet: UNet2DConditionModel, strict: bool = False) -> None:
        """Wrap `unet`, in its own device and dtype.

        Args:
            unet: loaded, and neither compiled nor captured yet.
            strict: the last bits of a row depend on nothing but the row.

        Raises:
            WeightsError: the UNet needs an input this graph does not produce.
        """
        self._halves = UNetHalves(unet.eval())
        self.config: Mapping[str, Any] = unet.config
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype
        self.adapters = RowAdapters(unet, buckets=() if strict else BUCKETS)

    @torch.inference_mode()
    def predict(self, batch: StepBatch) -> torch.Tensor:
        """Evaluate the UNet once for all rows; residuals are waited for when it is half done."""
        with self.adapters.active(batch.loras):
            lower = self._halves.lower(batch.sample, batch.timesteps, batch.prompt_embeds, batch.added_conditions)
            residuals = None
            if batch.controlled is not None:
                given = batch.controlled.pending.result().on(self.device, self.dtype)
                residuals = spread(given, batch.controlled.rows, len(batch.sample))
            return self._halves.upper(lower, batch.prompt_embeds, residuals)

    def padding(self, batch: StepBatch) -> int:
        """None: torch evaluates any number of rows."""
        return 0
