"""What does not die but hangs: nothing is lost, pictures are the same."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.serve.conftest import Eventful, send_all
from tests.support.live import replicas, wait_for, wait_until_whole

pytestmark = pytest.mark.slow

Recovered = Callable[[str, float], None]


@pytest.mark.parametrize("deployment", ["unet-sdxl-base-torch", "ingress"])
def test_a_replica_that_hangs_is_replaced_and_costs_no_picture(
    url: str, eventful: Eventful, deployment: str, recovered: Recovered
) -> None:
    """SIGSTOP: its connections stay open, it answers nothing, health checks included."""
    victims = replicas(deployment)
    since = 0.0

    def hang() -> None:
        nonlocal since
        since = time.monotonic()
        for victim in victims:
            victim.suspend()

    try:
        pictures = send_all(url, eventful.bodies, after=3, then=hang)
        recovered(f"{deployment} stopped under load, all pictures there", since)
        # Ray kills a process that does not stop by itself some seconds after it gave it up.
        wait_for(lambda: not any(victim.is_running() for victim in victims))
        wait_until_whole(url)
    finally:
        for victim in victims:
            if victim.is_running():
                victim.kill()
    for expected, drawn in zip(eventful.pictures, pictures, strict=True):
        assert np.abs(expected - drawn).max() <= 1
