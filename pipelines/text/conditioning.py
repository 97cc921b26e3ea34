"""Conditioning: the embeddings of a text, as the UNet reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipelines.tensors import TensorBundle


@dataclass(frozen=True)
class HiddenLayer:
    """Which hidden state of a text tower the UNets of a family read."""

    from_end: int
    """1 is what the last layer gives, 2 what the one before it gives."""
    normed: bool
    """Whether the tower's final layer norm is applied to it."""


@dataclass(frozen=True)
class EncodedText:
    """What one encoder made of one text."""

    hidden_state: torch.Tensor
    """`[1, tokens, width]`, of the layer that the family's UNets read."""
    pooled: torch.Tensor | None
    """`[1, projection]`, None for an encoder without projection."""


@dataclass(frozen=True)
class PromptSize:
    """How long the longest text of a stage is."""

    tokens: int
    """Of the whole text, start and end included."""
    context: int
    """Tokens that a text encoder reads at once, start and end included."""
    chunks: int
    """Passes that every text of the stage is read in."""

    @property
    def cut(self) -> bool:
        """Whether the longest text was not read to its end."""
        return self.tokens - 2 > self.chunks * (self.context - 2)

    def __str__(self) -> str:
        return f"{self.tokens}/{self.context} chunks={self.chunks}" + " cut" * self.cut


@dataclass(frozen=True)
class Conditioning(TensorBundle):
    """Text embeddings of one stage of one job.

    Rows are `[cond]` without guidance and `[uncond, cond]` with it, in that order.
    """

    prompt_embeds: torch.Tensor
    """`[rows, tokens, width]`; the tokens of all chunks, one after the other."""
    pooled_prompt_embeds: torch.Tensor | None = None
    """`[rows, projection]`, SDXL only; of the first chunk."""
    size: PromptSize | None = None
    """For people to read; None where nobody counted."""

    @property
    def rows(self) -> int:
        """1 without guidance, 2 with it."""
        return int(self.prompt_embeds.shape[0])
