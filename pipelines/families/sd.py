"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pipelines.text.conditioning import HiddenLayer

if TYPE_CHECKING:
    from pipelines.plan import StagePlan
    from pipelines.text.conditioning import Conditioning, EncodedText


class SDFamily:
    """One text encoder, its last hidden state after the final layer norm; nothing added."""

    text_layer = HiddenLayer(from_end=1, normed=True)
    applies_latent_statistics = False
    upcasts_vae = False

    def embed(self, texts: list[EncodedText]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The hidden state of the only encoder."""
        (text,) = texts
        return text.hidden_state, None

    def added_conditions(
        self, stage: StagePlan, conditioning: Conditioning, unet_config: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Nothing: an SD UNet is told the timestep and the text alone."""
        return {}
