"""Residuals of every row of a batch, zero for rows without a control map: adding zero changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipelines.control.rows import runs_of
from pipelines.torch_compat import copy_each, zero_each


class ResidualBuffers:
    """Tensors that stay where they are and are written once a tick, for UNets that read them at fixed addresses."""

    def __init__(self, like: Sequence[torch.Tensor]) -> None:
        """Buffers of the shapes, formats and memory layouts of `like`, `[rows, channels, height, width]` each."""
        self.tensors = tuple(torch.zeros_like(tensor) for tensor in like)

    def write(self, residuals: Sequence[torch.Tensor], rows: Sequence[int]) -> None:
        """Set all rows: row `rows[i]` to row i of each residual, the others to zero."""
        if len(rows) < len(self.tensors[0]):
            zero_each(self.tensors)
        for run in runs_of(rows):
            copy_each([tensor[run.rows] for tensor in self.tensors], [part[run.picked] for part in residuals])


def spread(residuals: Sequence[torch.Tensor], rows: Sequence[int], count: int) -> Sequence[torch.Tensor]:
    """Residuals of all `count` rows of a batch; those of `rows` as they are where these are all."""
    if tuple(rows) == tuple(range(count)):
        return residuals
    buffers = ResidualBuffers([part.new_empty(count, *part.shape[1:]) for part in residuals])
    buffers.write(residuals, rows)
    return buffers.tensors
