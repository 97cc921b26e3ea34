"""Autoscaling of denoisers by outstanding work: ten 4-step pictures are not ten 50-step ones.

Serve's default policy divides the number of requests by a target. This one divides the work that is left, rows x ticks
to come x pixels, by what a replica gets done in a given time. `serve_config.yaml` names it; benchmarks/autoscaling.py
compares the two. Serve applies delays, factors and bounds of `autoscaling_config` to what a policy asks for, and starts
the first replica of a sleeping deployment itself.

Serve pickles this module by value into its controller: it imports nothing of ours.
"""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

OUTSTANDING = "outstanding_work"
"""Metric of a denoiser replica: rows x remaining ticks x pixels of its jobs."""
PACE = "work_per_second"
"""Metric of its throughput: rows x pixels a second in its last ticks; 0 until the first."""


class OutstandingWork:
    """Asks for as many replicas as finish the outstanding work in `target_s` seconds (ENG-10)."""

    def __init__(self, target_s: float = 3.0) -> None:
        """Aim at an empty deployment after `target_s` seconds without further requests."""
        if target_s <= 0:
            raise ValueError(f"target_s {target_s}: above 0")
        self._target_s = target_s

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, a fraction, and what to remember: work of a request and pace, for when nothing is known.

        Requests that wait in front of all replicas have told nobody of their work: each is taken for a mean one. Until
        a first tick was timed, requests are counted as the default policy does.
        """
        remembered = dict(context.policy_state)
        running = context.current_num_replicas
        if running == 0:
            return context.target_num_replicas, remembered
        work, pace = _newest(context, OUTSTANDING), [value for value in _newest(context, PACE) if value > 0]
        if pace:
            remembered[PACE] = sum(pace) / len(pace)
        queued = max(0.0, context.total_queued_requests or 0.0)
        inside = max(0.0, context.total_num_requests - queued)
        if sum(work) > 0 and inside >= 1:
            remembered[OUTSTANDING] = sum(work) / inside
        if not remembered.get(PACE):
            return context.total_num_requests / context.config.get_target_ongoing_requests(), remembered
        outstanding = sum(work) + queued * remembered.get(OUTSTANDING, 0.0)
        wanted = outstanding / (remembered[PACE] * self._target_s)
        # A busy replica counts as a whole one; an idle one does not, so that its deployment can scale to zero.
        return max(wanted, 1.0) if context.total_num_requests > 0 else math.ceil(wanted), remembered


def _newest(context: AutoscalingContext, name: str) -> list[float]:
    """What each replica reported last; a mean over the past would run after a burst."""
    reported = (context.raw_metrics or {}).get(name, {})
    return [series[-1].value for series in reported.values() if series]
