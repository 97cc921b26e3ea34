"""Conditioning: what the text says to the UNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipelines.tensors import TensorBundle


@dataclass(frozen=True)
class EncodedText:
    """What one encoder made of one text.

    Attributes:
        last_hidden_state: `[1, tokens, width]`, after the final layer norm.
        penultimate_hidden_state: `[1, tokens, width]`, before the last layer.
        pooled: `[1, projection]`, None for an encoder without projection.
    """

    last_hidden_state: torch.Tensor
    penultimate_hidden_state: torch.Tensor
    pooled: torch.Tensor | None


@dataclass(frozen=True)
class Conditioning(TensorBundle):
    """Text embeddings of one stage of one job.

    Rows are `[cond]` without guidance and `[uncond, cond]` with it, in that order.

    Attributes:
        prompt_embeds: `[rows, tokens, width]`.
        pooled_prompt_embeds: `[rows, projection]`, SDXL only.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """1 without guidance, 2 with it."""
        return int(self.prompt_embeds.shape[0])
