"""The torch backend: diffusers' UNet2DConditionModel in eager mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from pipelines.adapters.rows import RowAdapters
from pipelines.adapters.slots import BUCKETS
from pipelines.backends.base import StepBatch
from pipelines.control.binding import LateBinding
from pipelines.errors import WeightsError

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
        if unet.config.time_cond_proj_dim is not None:
            raise WeightsError("this UNet takes the guidance scale as an input (LCM-distilled); it is not supported")
        self._unet = unet.eval()
        self.config: Mapping[str, Any] = unet.config
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype
        self.adapters = RowAdapters(unet, buckets=() if strict else BUCKETS)
        self._late_binding = LateBinding(unet)

    @torch.inference_mode()
    def predict(self, batch: StepBatch) -> torch.Tensor:
        """Evaluate the UNet once for all rows."""
        with self.adapters.active(batch.loras), self._late_binding.bound(batch.controlled):
            output = self._unet(
                batch.sample,
                batch.timesteps,
                encoder_hidden_states=batch.prompt_embeds,
                added_cond_kwargs=dict(batch.added_conditions) or None,
                return_dict=False,
            )
        return cast(torch.Tensor, output[0])

    def padding(self, batch: StepBatch) -> int:
        """None: torch evaluates any number of rows."""
        return 0
