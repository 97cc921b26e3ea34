"""The slope that benchmarks.load reports, and how sure it is of it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.growth import blocks, growth

SECONDS = np.arange(0, 3600, 15.0)


def samples(slope_an_hour: float, seed: int = 0) -> list[tuple[float, float]]:
    values = 400 + slope_an_hour * SECONDS / 3600 + np.random.default_rng(seed).normal(0, 2, len(SECONDS))
    return list(zip(SECONDS.tolist(), values.tolist(), strict=True))


def test_the_interval_holds_the_slope_19_times_in_20() -> None:
    found = [growth(samples(20, seed), warm_up=600) for seed in range(200)]
    held = [abs(one["an_hour"] - 20) <= one["plus_minus"] for one in found]
    assert 0.9 < sum(held) / len(held) < 0.99
    assert max(one["plus_minus"] for one in found) < 5
    assert found[0]["last"] - found[0]["first"] == pytest.approx(20 * 3000 / 3600 * 0.9, abs=4)


def test_what_happens_before_the_warm_up_does_not_count() -> None:
    later = [(at, value if at > 600 else value - 300) for at, value in samples(0)]
    assert abs(growth(later, warm_up=615)["an_hour"]) < 5


def test_a_short_run_is_refused() -> None:
    with pytest.raises(ValueError, match="run longer"):
        blocks(samples(0)[:19])
