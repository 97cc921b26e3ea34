"""The autoscaling policy: what it asks for, from what replicas report."""

from __future__ import annotations

from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.autoscaling import OUTSTANDING, PACE, OutstandingWork

MEGAPIXEL = 1024 * 1024


def context(
    replicas: list[tuple[float, float]], inside: float = 0.0, queued: float = 0.0, state: dict[str, Any] | None = None
) -> AutoscalingContext:
    """`replicas`: outstanding work and pace of each that reported, both in megapixel-rows."""
    names = [f"r{i}" for i in range(len(replicas))]

    def series(index: int) -> dict[str, list[TimeStampedValue]]:
        values = zip(names, replicas, strict=True)
        old = TimeStampedValue(0.0, 1e12)
        return {name: [old, TimeStampedValue(1.0, value[index] * MEGAPIXEL)] for name, value in values}

    return AutoscalingContext(
        deployment_id=None,  # type: ignore[arg-type]
        deployment_name="unet",
        app_name=None,
        current_num_replicas=len(replicas),
        target_num_replicas=len(replicas),
        running_replicas=[],
        total_num_requests=inside + queued,
        total_queued_requests=queued,
        aggregated_metrics=None,
        raw_metrics={OUTSTANDING: series(0), PACE: series(1)},  # type: ignore[arg-type]
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(target_ongoing_requests=6),
    )


def test_replicas_follow_outstanding_work_and_not_requests() -> None:
    """Ten pictures of 4 steps, and ten of 50, guided, at a megapixel; a replica does 20 of them a second."""
    policy = OutstandingWork(target_s=10)
    few, _ = policy(context([(10 * 2 * 4, 20)], inside=10))
    many, _ = policy(context([(10 * 2 * 50, 20)], inside=10))
    assert few == 1
    assert many == 5


def test_the_newest_report_counts_and_paces_are_averaged() -> None:
    wanted, state = OutstandingWork(target_s=10)(context([(300, 10), (100, 30)], inside=8))
    assert wanted == 2
    assert state[PACE] == 20 * MEGAPIXEL


def test_requests_in_front_of_the_replicas_are_taken_for_mean_ones() -> None:
    wanted, _ = OutstandingWork(target_s=10)(context([(600, 20)], inside=6, queued=6))
    assert wanted == 6


def test_until_a_tick_was_timed_requests_are_counted() -> None:
    wanted, _ = OutstandingWork()(context([(500, 0)], inside=12, queued=6))
    assert wanted == 3


def test_the_policy_remembers_work_and_throughput() -> None:
    """New replicas that have not ticked yet know nothing of their pace."""
    policy = OutstandingWork(target_s=10)
    _, state = policy(context([(600, 20)], inside=6))
    wanted, _ = policy(context([(0, 0)], queued=6, state=state))
    assert wanted == 3


def test_no_request_means_no_replica_and_one_request_means_one() -> None:
    policy = OutstandingWork()
    _, state = policy(context([(60, 20)], inside=6))
    assert policy(context([(0, 20)], state=state))[0] == 0
    assert policy(context([(0.1, 20)], inside=1, state=state))[0] == 1


def test_serve_takes_it_by_its_name_and_arguments() -> None:
    """As serve_config.yaml names it; the controller gets it by value."""
    policy = AutoscalingPolicy(policy_function="deployments.autoscaling:OutstandingWork", policy_kwargs={"target_s": 7})
    made = cloudpickle.loads(policy.get_serialized_policy_def())(**policy.policy_kwargs)
    assert made(context([(140, 20)], inside=6))[0] == 1


def test_a_target_of_zero_seconds_is_refused() -> None:
    with pytest.raises(ValueError, match="target_s 0"):
        OutstandingWork(target_s=0)
