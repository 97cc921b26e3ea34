"""SDXL, its refiner, and what is distilled from it (SSD, turbo)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pipelines.errors import WeightsError
from pipelines.text.conditioning import HiddenLayer

if TYPE_CHECKING:
    from pipelines.plan import StagePlan
    from pipelines.text.conditioning import Conditioning, EncodedText

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""Defaults of StableDiffusionXLImg2ImgPipeline, which the refiner was trained around."""


class SDXLFamily:
    """Penultimate hidden states of one or two encoders side by side, the last one's pooled state, and time ids."""

    text_layer = HiddenLayer(from_end=2, normed=False)
    applies_latent_statistics = True
    upcasts_vae = True

    def embed(self, texts: list[EncodedText]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Concatenate the hidden states; pooled is the last encoder's."""
        return torch.cat([t.hidden_state for t in texts], dim=-1), texts[-1].pooled

    def added_conditions(
        self, stage: StagePlan, conditioning: Conditioning, unet_config: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """`text_embeds` `[rows, projection]` and `time_ids` `[rows, 5 or 6]`.

        How many time ids the UNet takes follows from its config: six are (original height, width, crop top, left,
        target height, width); five, the refiner's, end in an aesthetic score instead of the target size.

        Raises:
            WeightsError: the UNet takes neither five nor six.
        """
        pooled = conditioning.pooled_prompt_embeds
        if pooled is None:
            raise WeightsError("an SDXL UNet needs pooled embeddings; its last text encoder gives none")
        ids_width = unet_config["projection_class_embeddings_input_dim"] - pooled.shape[-1]
        count = ids_width / unet_config["addition_time_embed_dim"]
        size, crop = (stage.height, stage.width), (0, 0)
        cond: tuple[float, ...]
        uncond: tuple[float, ...]
        if count == 6:
            cond = uncond = (*size, *crop, *size)
        elif count == 5:
            cond = (*size, *crop, AESTHETIC_SCORE)
            uncond = (*size, *crop, NEGATIVE_AESTHETIC_SCORE)
        else:
            raise WeightsError(f"component {stage.component} takes {count:g} time ids; SDXL has 6 and its refiner 5")
        rows = [uncond, cond][-conditioning.rows :]
        return {"text_embeds": pooled, "time_ids": torch.tensor(rows, dtype=pooled.dtype, device=pooled.device)}
