"""How fast a denoiser replica works, from the ticks it did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.engine.job import DenoiseJob

NEWEST = 0.1
"""Share of the newest tick in a mean."""
ENOUGH = 3
"""Ticks of a kind that must be timed before anything is judged by them, beside its first one, which warms up."""


class Mean:
    """A mean that forgets."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, value: float) -> None:
        """Take in a value; the first is taken whole."""
        self.value += (value - self.value) * (NEWEST if self.value else 1.0)


class _Kind:
    """Ticks of one UNet at one size."""

    def __init__(self) -> None:
        self.count = 0
        self.work_a_second = Mean()
        self.seconds = Mean()

    @property
    def known(self) -> bool:
        return self.count > ENOUGH


class Pace:
    """Work a second, of all ticks and of each UNet and size: a small picture costs more a pixel than a large one.

    Attributes:
        overall: rows x pixels a second, 0 until a tick was timed.
    """

    def __init__(self) -> None:
        self.overall = Mean()
        self._kinds: defaultdict[tuple[str, int], _Kind] = defaultdict(_Kind)

    def note(self, jobs: Sequence[DenoiseJob], seconds: float) -> None:
        """A tick of these jobs, which share UNet and size, took so long, what came between two ticks included."""
        pace = sum(job.work for job in jobs) / seconds
        self.overall.add(pace)
        kind = self._of(jobs[0])
        kind.count += 1
        if kind.count > 1:
            kind.work_a_second.add(pace)
            kind.seconds.add(seconds)

    def seconds_for(self, jobs: Iterable[DenoiseJob]) -> float:
        """How long until all of these are done; those of a kind that is not known are not counted."""
        return sum(job.outstanding_work / self._of(job).work_a_second.value for job in jobs if self._of(job).known)

    def least_seconds_for(self, job: DenoiseJob) -> float:
        """How long a job needs if it is in every tick; 0 if its kind is not known."""
        kind = self._of(job)
        return kind.seconds.value * job.ticks_left if kind.known else 0.0

    def _of(self, job: DenoiseJob) -> _Kind:
        return self._kinds[job.plan.component, job.plan.width * job.plan.height]
