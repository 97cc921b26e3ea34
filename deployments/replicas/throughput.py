"""The throughput of a denoiser replica, measured from its ticks (ENG-9)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.engine.job import DenoiseJob

NEWEST_SHARE = 0.1
"""Weight of the newest tick in a moving average, between 0 and 1."""
ENOUGH_TICKS = 3
"""Number of ticks of a kind that must be timed before they are used; the first tick is not timed, it warms up."""


class MovingAverage:
    """An exponential moving average."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, value: float) -> None:
        """Add a value. The average of one value is that value."""
        self.value += (value - self.value) * (NEWEST_SHARE if self.value else 1.0)


class _TickKind:
    """Ticks of one UNet at one picture size."""

    def __init__(self) -> None:
        self.count = 0
        self.work_per_second = MovingAverage()
        self.seconds = MovingAverage()

    @property
    def known(self) -> bool:
        return self.count > ENOUGH_TICKS


class Throughput:
    """Work per second, overall and for each UNet and size: small pictures cost more per pixel than large ones."""

    def __init__(self) -> None:
        self.overall = MovingAverage()
        """Rows x pixels per second; 0 until a tick has been timed."""
        self._kinds: defaultdict[tuple[str, int], _TickKind] = defaultdict(_TickKind)

    def record(self, jobs: Sequence[DenoiseJob], seconds: float) -> None:
        """Record the seconds of a tick, without waiting for the one before; its jobs share UNet and size."""
        work_per_second = sum(job.work for job in jobs) / seconds
        self.overall.add(work_per_second)
        kind = self._kind_of(jobs[0])
        kind.count += 1
        if kind.count > 1:
            kind.work_per_second.add(work_per_second)
            kind.seconds.add(seconds)

    def seconds_for(self, jobs: Iterable[DenoiseJob]) -> float:
        """Seconds until all of these jobs are done; jobs of a kind that has not been timed yet count as 0."""
        kinds = ((job, self._kind_of(job)) for job in jobs)
        return sum(job.outstanding_work / kind.work_per_second.value for job, kind in kinds if kind.known)

    def least_seconds_for(self, job: DenoiseJob) -> float:
        """Seconds that a job needs if it is in every tick; 0 if its kind has not been timed yet."""
        kind = self._kind_of(job)
        return kind.seconds.value * job.ticks_left if kind.known else 0.0

    def _kind_of(self, job: DenoiseJob) -> _TickKind:
        return self._kinds[job.plan.component, job.plan.width * job.plan.height]
