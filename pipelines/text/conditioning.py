"""Conditioning: what the text says to the UNet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipelines.tensors import TensorBundle


@dataclass(frozen=True)
class EncodedText:
    """What one encoder made of one text."""

    last_hidden_state: torch.Tensor
    """`[1, tokens, width]`, after the final layer norm."""
    penultimate_hidden_state: torch.Tensor
    """`[1, tokens, width]`, before the last layer."""
    pooled: torch.Tensor | None
    """`[1, projection]`, None for an encoder without projection."""


@dataclass(frozen=True)
class Conditioning(TensorBundle):
    """Text embeddings of one stage of one job.

    Rows are `[cond]` without guidance and `[uncond, cond]` with it, in that order.
    """

    prompt_embeds: torch.Tensor
    """`[rows, tokens, width]`."""
    pooled_prompt_embeds: torch.Tensor | None = None
    """`[rows, projection]`, SDXL only."""

    @property
    def rows(self) -> int:
        """1 without guidance, 2 with it."""
        return int(self.prompt_embeds.shape[0])
