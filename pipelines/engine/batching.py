"""Which jobs share the next tick: pure policy, no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol, TypeVar


class BatchKey(NamedTuple):
    """What rows must agree on to be stacked. Everything else is free per row."""

    latent_shape: tuple[int, ...]
    context_shape: tuple[int, ...]


class Batchable(Protocol):
    """What the policy looks at."""

    @property
    def batch_key(self) -> BatchKey: ...  # noqa: D102

    @property
    def rows(self) -> int: ...  # noqa: D102


J = TypeVar("J", bound=Batchable)


def select_rows(jobs: Iterable[J], max_rows: int) -> list[J]:
    """Pick the jobs of the next tick, oldest first.

    The oldest job always runs and its key decides; younger jobs of the same key fill the row budget in order. A job's
    rows stay together. Since the oldest runs at every tick, it ends, the next becomes the oldest, and no shape starves.

    Args:
        jobs: waiting jobs, oldest first.
        max_rows: row budget; the oldest job runs even if it alone exceeds it.
    """
    chosen: list[J] = []
    free = max_rows
    for job in jobs:
        if not chosen or (job.batch_key == chosen[0].batch_key and job.rows <= free):
            chosen.append(job)
            free -= job.rows
        if free <= 0:
            break
    return chosen
