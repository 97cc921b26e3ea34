"""Some rows of a batch, without an index that would have to travel to the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Run:
    """Rows that follow each other in a batch, and where they stand among those that were picked."""

    first: int
    """In the batch."""
    position: int
    """Among the picked rows."""
    count: int

    @property
    def rows(self) -> slice:
        """Of the batch."""
        return slice(self.first, self.first + self.count)

    @property
    def picked(self) -> slice:
        """Of the picked rows."""
        return slice(self.position, self.position + self.count)


def runs_of(rows: Sequence[int], weights: Sequence[Any] | None = None) -> Iterator[Run]:
    """Split rows of a batch where one does not follow the one before it, or has another weight or factor.

    The rows of a job always follow each other, so there are few runs.
    """
    begin = 0
    for position in range(1, len(rows) + 1):
        ends = position == len(rows) or rows[position] != rows[position - 1] + 1
        if ends or (weights is not None and weights[position] != weights[position - 1]):
            yield Run(rows[begin], begin, position - begin)
            begin = position


def take_rows(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """`tensor[rows]`: a view where they follow each other, otherwise a copy in one piece."""
    parts = [tensor[run.rows] for run in runs_of(rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
