"""Two autoscaling policies on one trace: Serve's default (requests) and ours (outstanding work). A simulation.

    python -m benchmarks.autoscaling

What is simulated: one denoiser deployment, its replicas' ticks, their start, the queue in front of them, and Serve's
reports (each replica's once a second, requests as a mean over the look-back). What is real: both policies, and Serve's
own code for delays, factors and bounds. Tick times are assumptions of an SDXL UNet on a large card, below; no card was
at hand. A trace of phases, seeded: light pictures (4 unguided steps, 512 px), heavy ones (50 guided steps, 1024 px).
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import json
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from ray.serve import autoscaling_policy
from ray.serve.autoscaling_policy import _apply_autoscaling_config, replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.autoscaling import OUTSTANDING, PACE, OutstandingWork
from deployments.replicas.throughput import MovingAverage
from pipelines.engine.batching import BatchKey, select_rows

MEGAPIXEL = 1024 * 1024
TICK_S, ROW_S = 0.02, 0.03
"""Seconds of a tick: fixed, and for each row of a megapixel."""
START_S = 40.0
"""A replica's start: image there, weights from a volume."""
MAX_ONGOING, MAX_ROWS = 12, 16
LOOK_BACK_S = 30.0
DEADLINE_S = 60.0
LIGHT, HEAVY = (1, 4, 512 * 512), (2, 50, MEGAPIXEL)
PHASES = [  # seconds, light and heavy pictures a second
    (300, 0.5, 0.05),
    (300, 12.0, 0.0),
    (300, 0.5, 0.05),
    (300, 0.0, 0.9),
    (300, 0.5, 0.05),
    (300, 4.0, 0.4),
    (600, 0.2, 0.02),
]

Policy = Callable[[AutoscalingContext], tuple[Any, dict[str, Any]]]


@dataclass
class Picture:
    """A job: its rows, the ticks it has left, its pixels."""

    arrived: float
    rows: int
    ticks: int
    pixels: int
    kind: str

    @property
    def work(self) -> int:
        """Rows x ticks to come x pixels."""
        return self.rows * self.ticks * self.pixels

    @property
    def batch_key(self) -> BatchKey:
        """Pictures of one size share a tick."""
        return BatchKey((self.pixels,), ())


@dataclass
class Replica:
    """One engine loop."""

    ready: float
    jobs: list[Picture] = field(default_factory=list)
    pace: MovingAverage = field(default_factory=MovingAverage)
    ticking: bool = False
    leaving: bool = False

    def batch(self) -> list[Picture]:
        """The jobs of the next tick."""
        return select_rows(self.jobs, MAX_ROWS)


@dataclass(frozen=True)
class _Sample:
    value: float


def trace(seed: int) -> list[Picture]:
    """The pictures of all phases, by arrival."""
    draw, pictures, begin = random.Random(seed), [], 0.0
    for seconds, light, heavy in PHASES:
        for rate, (rows, ticks, pixels), kind in ((light, LIGHT, "light"), (heavy, HEAVY, "heavy")):
            now = begin
            while rate and (now := now + draw.expovariate(rate)) < begin + seconds:
                pictures.append(Picture(now, rows, ticks, pixels, kind))
        begin += seconds
    return sorted(pictures, key=lambda picture: picture.arrived)


class Simulation:
    """One deployment under one policy."""

    def __init__(self, policy: Policy, config: AutoscalingConfig, pictures: list[Picture]) -> None:
        self._decide = _apply_autoscaling_config(policy)
        self._config = config
        self._replicas = [Replica(0.0)]
        self._queue: deque[Picture] = deque()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order: Iterator[int] = itertools.count()
        self._now = 0.0
        self._state: dict[str, Any] = {}
        self._past: deque[tuple[int, int]] = deque(maxlen=int(LOOK_BACK_S))
        self.latencies: dict[str, list[float]] = {"light": [], "heavy": []}
        self.replica_seconds = 0.0
        self.most = 1
        self._end = sum(phase[0] for phase in PHASES)
        for picture in pictures:
            self._at(picture.arrived, functools.partial(self._arrive, picture))
        self._at(1.0, self._control)

    def run(self) -> None:
        """Until the last picture is drawn."""
        with patch.object(autoscaling_policy.time, "time", lambda: self._now):
            while self._events:
                self._now, _, event = heapq.heappop(self._events)
                event()

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))

    def _arrive(self, picture: Picture) -> None:
        self._queue.append(picture)
        self._route()

    def _route(self) -> None:
        while self._queue:
            free = [r for r in self._replicas if r.ready <= self._now and not r.leaving and len(r.jobs) < MAX_ONGOING]
            if not free:
                return
            chosen = min(free, key=lambda r: len(r.jobs))  # Serve's router goes by requests
            chosen.jobs.append(self._queue.popleft())
            self._tick(chosen)

    def _tick(self, replica: Replica) -> None:
        if replica.ticking or not replica.jobs:
            return
        replica.ticking = True
        batch = replica.batch()
        work = sum(job.rows * job.pixels for job in batch)
        seconds = TICK_S + ROW_S * work / MEGAPIXEL

        def done() -> None:
            replica.ticking = False
            replica.pace.add(work / seconds)
            for job in batch:
                job.ticks -= 1
                if not job.ticks:
                    replica.jobs.remove(job)
                    self.latencies[job.kind].append(self._now - job.arrived)
            if replica.leaving and not replica.jobs:
                self._replicas.remove(replica)
            self._tick(replica)
            self._route()

        self._at(self._now + seconds, done)

    def _control(self) -> None:
        """Once a second: reports, decision, replicas."""
        self.replica_seconds += len(self._replicas)
        staying = [r for r in self._replicas if not r.leaving]
        running = [r for r in staying if r.ready <= self._now]
        inside = sum(len(r.jobs) for r in self._replicas)
        self._past.append((inside + len(self._queue), len(self._queue)))
        names = {f"r{i}": r for i, r in enumerate(running)}
        context = AutoscalingContext(
            deployment_id=None,
            deployment_name="unet",
            app_name=None,
            current_num_replicas=len(running),
            target_num_replicas=len(staying),
            running_replicas=[],
            total_num_requests=statistics.fmean(total for total, _ in self._past),
            total_queued_requests=statistics.fmean(queued for _, queued in self._past),
            aggregated_metrics=None,
            raw_metrics={
                OUTSTANDING: {n: [_Sample(sum(job.work for job in r.jobs))] for n, r in names.items()},
                PACE: {n: [_Sample(r.pace.value)] for n, r in names.items()},
            },
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=dict(self._state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self._now,
            config=self._config,
        )
        wanted, self._state = self._decide(context)
        wanted = max(self._config.min_replicas, min(self._config.max_replicas, wanted))
        for _ in range(wanted - len(staying)):
            replica = Replica(self._now + START_S)
            self._replicas.append(replica)
            self._at(replica.ready, self._route)
        for replica in sorted(staying, key=lambda r: (r.ready <= self._now, len(r.jobs)))[: len(staying) - wanted]:
            replica.leaving = True
            if not replica.jobs:
                self._replicas.remove(replica)
        self.most = max(self.most, len(self._replicas))
        self._route()
        if self._now < self._end or self._queue or any(r.jobs for r in self._replicas):
            self._at(self._now + 1.0, self._control)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def measure(policy: Policy, seed: int, target: float) -> dict[str, Any]:
    config = AutoscalingConfig(
        min_replicas=1,
        max_replicas=8,
        target_ongoing_requests=target,
        upscale_delay_s=15,
        downscale_delay_s=120,
        look_back_period_s=LOOK_BACK_S,
    )
    pictures = trace(seed)
    simulation = Simulation(policy, config, pictures)
    simulation.run()
    everyone = [taken for values in simulation.latencies.values() for taken in values]
    assert len(everyone) == len(pictures)
    return {
        "gpu_hours": round(simulation.replica_seconds / 3600, 2),
        "most_replicas": simulation.most,
        "in_time": round(sum(taken <= DEADLINE_S for taken in everyone) / len(everyone), 4),
        **{
            f"{kind}_{name}_s": round(percentile(values, share), 1)
            for kind, values in simulation.latencies.items()
            for name, share in (("p50", 0.5), ("p95", 0.95))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    policies: dict[str, tuple[Callable[[], Policy], float]] = {
        f"requests, target {target}": (lambda: replica_queue_length_autoscaling_policy, target)
        for target in (2, 3, 6, 9)
    }
    policies |= {
        f"outstanding work, {seconds} s": (functools.partial(OutstandingWork, target_s=seconds), 6)
        for seconds in (3, 5, 8, 12)
    }
    results = {}
    for name, (make, target) in policies.items():
        runs = [measure(make(), seed, target) for seed in range(options.seeds)]
        results[name] = {key: round(statistics.fmean(run[key] for run in runs), 3) for key in runs[0]}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
