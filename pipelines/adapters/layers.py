"""What an adapter is: for each module of one model, what it adds to that module's output.

An adapter is never merged into weights. Each row of a batch carries its own mixture, so that users of different
adapters share a tick, nothing has to be reloaded, and nothing drifts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class LoraLayer:
    """The low-rank pair of one module: W x + weight * scale * B A x, Hu et al. 2021 (arXiv:2106.09685) equation 3."""

    down: torch.Tensor
    """A: `[rank, in]`, or `[rank, in, k, k]` for a convolution."""
    up: torch.Tensor
    """B: `[out, rank]`, or `[out, rank, 1, 1]`."""
    scale: float
    """Alpha / rank."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it holds."""
        return self.down, self.up

    def addition(self, module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """What the layer adds to the output of `module` for `rows`, before the mixture's weight."""
        if isinstance(module, nn.Conv2d):
            hidden = nn.functional.conv2d(rows, self.down, stride=module.stride, padding=module.padding)
            return nn.functional.conv2d(hidden, self.up) * self.scale
        return nn.functional.linear(nn.functional.linear(rows, self.down), self.up) * self.scale


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter on one model: module name -> layer. Known by identity, so that what is loaded twice is two."""

    name: str
    """Public name and file, for messages."""
    layers: Mapping[str, LoraLayer]
    slot_ranks: int = 0
    """Ranks it takes in the slots of a model; 0 for one that has to go by hooks."""

    @property
    def nbytes(self) -> int:
        """Bytes its tensors hold."""
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer.tensors)


Mixture = tuple[tuple[Adapter, float], ...]
"""The adapters of one row with their weights."""
