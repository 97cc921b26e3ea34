"""Classifier-free guidance, row by row."""

from __future__ import annotations

import torch


def guide(model_output: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Combine the rows of one job into one prediction.

    Args:
        model_output: `[1, ...]` of a job without guidance, or `[2, ...]` as uncond, cond.
        guidance_scale: `w` of Ho & Salimans 2022 (arXiv:2207.12598) as diffusers counts it: 1 is the cond row alone.

    Returns:
        `[1, channels, height, width]`.
    """
    if model_output.shape[0] == 1:
        return model_output
    uncond, cond = model_output.chunk(2)
    return uncond + guidance_scale * (cond - uncond)
