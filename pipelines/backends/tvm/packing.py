"""The memory layouts in which kernels read weights. This module uses torch only: packing needs no compiler.

A layout depends on the weight and on the width of the machine's vectors, not on the picture's size or the batch size.
All programs of a model therefore share one packed copy. The exception is a convolution that some sizes compute by
Winograd and others directly: it is packed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipelines.backends.tvm.artifacts import Artifact

# Lavin and Gray, arXiv:1509.09308, F(2x2, 3x3) and F(4x4, 3x3): input, filter and output transforms.
WINOGRAD_BT = {
    2: ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    4: (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
}
WINOGRAD_G = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
}
WINOGRAD_AT = {
    2: ((1, 1, 1, 0), (0, 1, -1, -1)),
    4: ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
}


ALIGNMENT = 64
"""Alignment in bytes that compiled code needs, because it loads whole vectors from the start of a tensor. Tensors that
torch allocates have it; a slice of a batch or a weight mapped from a file may not, and would crash the process."""


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is not contiguous and aligned to `ALIGNMENT` bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


Kind = Literal["plain", "matrix", "conv", "winograd", "matrix16", "conv16", "winograd16"]


@dataclass(frozen=True)
class Layout:
    """The memory layout of a weight."""

    kind: Kind = "plain"
    """`plain`: as in torch. `matrix`: `[1, out / panel, in, panel]`. `conv`: `[out / panel, k, k, in, panel]`.
    `winograd`: `[(m + 2)^2, out / panel, in, panel]`, transformed. Names that end with `16` are the same in bfloat16:
    two neighbours of `in` form one int32, so that this axis has `in / 2` elements."""
    panel: int = 0
    """Number of output channels that are neighbours in memory."""
    tile: int = 0
    """The m of Winograd's F(m x m, 3 x 3); 0 for other kinds."""

    @property
    def halved(self) -> bool:
        """Whether weights in this layout are bfloat16."""
        return self.kind.endswith("16")

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of a packed weight."""
        return torch.int32 if self.halved else torch.float32

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """The packed shape of a weight whose shape in torch is `weight`."""
        if self.kind == "plain":
            return weight
        out, into = weight[0], weight[1] // 2 if self.halved else weight[1]
        match self.kind.removesuffix("16"):
            case "matrix":
                return 1, out // self.panel, into, self.panel
            case "conv":
                return out // self.panel, *weight[2:], into, self.panel
            case _:
                return (self.tile + 2) ** 2, out // self.panel, into, self.panel

    def pack(self, weight: Tensor) -> Tensor:
        """Return the weight in this layout, contiguous. A `plain` one shares the weight's memory if possible."""
        packed = self._pack(weight.detach().float())
        if not self.halved:
            return packed
        *outer, into, panel = packed.shape
        pairs = packed.view(*outer, into // 2, 2, panel).transpose(-1, -2).to(torch.bfloat16)
        return pairs.contiguous().view(torch.int32).squeeze(-1)

    def _pack(self, weight: Tensor) -> Tensor:
        out, into = (weight.shape[0], weight.shape[1]) if weight.ndim > 1 else (weight.shape[0], 0)
        match self.kind.removesuffix("16"):
            case "plain":
                return aligned(weight)
            case "matrix":
                return weight.reshape(1, out // self.panel, self.panel, into).transpose(2, 3).contiguous()
            case "conv":
                taps = weight.shape[-1]
                return weight.view(-1, self.panel, into, taps, taps).permute(0, 3, 4, 2, 1).contiguous()
            case _:
                g = torch.tensor(WINOGRAD_G[self.tile])
                filters = weight.view(out // self.panel, self.panel, into, 9)
                # [(m+2)^2, 9] x [9, ...]: one matrix product
                columns = filters.permute(3, 0, 2, 1).reshape(9, -1)
                return (torch.kron(g, g) @ columns).view(-1, out // self.panel, into, self.panel)


def layouts_of(artifact: Artifact) -> list[tuple[str, Layout]]:
    """Name and layout of each weight that a program takes, in the order of its arguments."""
    return [(name, Layout(kind, panel, tile)) for name, kind, panel, tile in artifact.weights]  # type: ignore[arg-type]
