"""The factors of a LoRA layer -> the shapes its module needs, where other tools read them so too."""

from __future__ import annotations

import torch
from torch import nn


def fit_down(down: torch.Tensor, module: nn.Linear | nn.Conv2d) -> torch.Tensor | None:
    """The down factor as `[rank, in]`, for a convolution `[rank, in, k, k]`; None if it does not fit.

    - A linear layer's may be written as that of a 1x1 convolution, and the other way round (kohya, A1111, ComfyUI).
    - A convolution's may be a matrix of rank x everything else (ComfyUI flattens every factor).
    - A 1x1 factor of a larger convolution goes to every place of the kernel: A1111 adds the product to the weight and
      LyCORIS copies the factor into its own, both by broadcasting.
    """
    rank = down.shape[0]
    if isinstance(module, nn.Linear):
        return down.reshape(rank, -1) if _is(down, (rank, module.in_features)) else None
    wanted = (rank, module.in_channels, *module.kernel_size)
    if tuple(down.shape) == wanted:
        return down
    if down.ndim == 2 and down[0].numel() == torch.Size(wanted[1:]).numel():
        return down.reshape(wanted)
    return down.reshape(rank, -1, 1, 1).expand(wanted).contiguous() if _is(down, wanted[:2]) else None


def fit_up(up: torch.Tensor, rank: int, module: nn.Linear | nn.Conv2d) -> torch.Tensor | None:
    """The up factor as `[out, rank]`, for a convolution `[out, rank, 1, 1]`; None if it does not fit."""
    out = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    if not _is(up, (out, rank)):
        return None
    return up.reshape(out, rank) if isinstance(module, nn.Linear) else up.reshape(out, rank, 1, 1)


def _is(factor: torch.Tensor, wanted: tuple[int, ...]) -> bool:
    """Whether a factor is a matrix of this shape, or the same as a 1x1 convolution."""
    return tuple(factor.shape) in (wanted, (*wanted, 1, 1))
