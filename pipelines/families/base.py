"""The Family protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from pipelines.plan import StagePlan
    from pipelines.text.conditioning import Conditioning, EncodedText, HiddenLayer


class Family(Protocol):
    """How a family of models turns text into conditioning, and the further inputs of its UNets."""

    text_layer: HiddenLayer
    """What its UNets read of a text encoder."""

    applies_latent_statistics: bool
    """Whether its pipelines use the VAE config's `latents_mean` and `latents_std`."""

    upcasts_vae: bool
    """Whether its pipelines compute in float32 with a float16 VAE whose config says `force_upcast`."""

    def embed(self, texts: list[EncodedText]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Join what the encoders of a stage made of one prompt: `[1, tokens, width]`, pooled `[1, width]`."""
        ...

    def added_conditions(
        self, stage: StagePlan, conditioning: Conditioning, unet_config: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Further UNet inputs of a job, `[rows, ...]` each."""
        ...
