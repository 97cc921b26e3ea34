"""Which jobs share the next tick (ENG-7): pure policy, no tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol, TypeVar


class BatchKey(NamedTuple):
    """What rows must agree on to be stacked. Everything else is free per row."""

    latent_shape: tuple[int, ...]
    context_shape: tuple[int, ...]
    """Tokens and their width."""

    def carries(self, other: BatchKey) -> bool:
        """Whether rows of another key can share a tick: an equal key, or a context that, repeated, fills this one.

        Attention is a weighted mean over the tokens, so a context that is read twice says what it says once.
        """
        tokens, width = self.context_shape
        theirs, their_width = other.context_shape
        return self.latent_shape == other.latent_shape and width == their_width and tokens % theirs == 0


class Batchable(Protocol):
    """The properties of a job that the policy uses."""

    @property
    def batch_key(self) -> BatchKey: ...  # noqa: D102

    @property
    def rows(self) -> int: ...  # noqa: D102


J = TypeVar("J", bound=Batchable)


def select_rows(jobs: Iterable[J], max_rows: int) -> list[J]:
    """Pick the jobs of the next tick, oldest first.

    The oldest job always runs and its key decides; younger jobs that it carries fill the row budget in order: nobody's
    context is made longer than the oldest's, which the budget is for. A job's rows stay together. Since the oldest runs
    at every tick, it ends, the next becomes the oldest, and no shape starves.

    Args:
        jobs: waiting jobs, oldest first.
        max_rows: row budget; the oldest job runs even if it alone exceeds it.
    """
    chosen: list[J] = []
    free = max_rows
    for job in jobs:
        if not chosen or (chosen[0].batch_key.carries(job.batch_key) and job.rows <= free):
            chosen.append(job)
            free -= job.rows
        if free <= 0:
            break
    return chosen
