"""How many rows are worth their time: a policy over curves, and a measurement by a clock that the tests set."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from config.catalog import Catalog
from pipelines.assembly import load_engine, load_text_encoders
from pipelines.engine.batching import BatchKey
from pipelines.engine.curve import MEASURED, WARM_UP, RowCurves, measure, worthwhile_rows
from pipelines.plan import GenerationParams
from pipelines.planning import make_plan

LAUNCH_BOUND = {2: 10.0, 4: 10.5, 8: 12.0, 16: 20.0}
"""Rows are free until the device is busy; then each costs 1, where the first two cost 5 each."""
BUSY = {2: 10.0, 4: 19.9, 8: 40.0, 16: 80.0}
SMALL, MIDDLE, LARGE = (BatchKey((4, side, side), (77, 8)) for side in (16, 32, 128))


@pytest.mark.parametrize(
    ("curve", "price", "rows"),
    [
        (LAUNCH_BOUND, 0.9, 16),
        (LAUNCH_BOUND, 0.1, 8),
        (LAUNCH_BOUND, 0.01, 2),
        (BUSY, 0.9, 2),
        (BUSY, 1.0, 4),
        (BUSY, 1.1, 16),
        ({2: 10.0, 4: 30.0, 8: 31.0}, 0.9, 2),
        ({2: 10.0, 4: 9.0, 8: 12.0}, 0.9, 8),
        ({1: 10.0}, 0.9, 1),
    ],
    ids=["free", "cheap", "dear", "busy", "just", "any price", "a step that later pays", "noise", "one row"],
)
def test_rows_are_added_while_one_costs_less_than_the_price(
    curve: Mapping[int, float], price: float, rows: int
) -> None:
    assert worthwhile_rows(curve, price) == rows


class Device:
    """Takes as long as it is told; the first evaluations of a shape, which choose algorithms, ten times as long."""

    def __init__(self, seconds: Mapping[int, float], most_rows: int = 64) -> None:
        self.now = 0.0
        self.evaluations: dict[int, int] = {}
        self._seconds, self._most_rows = seconds, most_rows

    def evaluate(self, rows: int) -> None:
        if rows > self._most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.evaluations[rows] = self.evaluations.get(rows, 0) + 1
        warm = self.evaluations[rows] > WARM_UP
        self.now += self._seconds.get(rows, 100.0) * (1 if warm else 10)

    def clock(self) -> float:
        return self.now


def test_a_curve_is_measured_warm_and_within_the_budget() -> None:
    device = Device(LAUNCH_BOUND)
    curve = measure(device.evaluate, 8, device.clock)
    assert curve == {2: 10.0, 4: 10.5, 6: 100.0, 8: 12.0}
    assert device.evaluations == dict.fromkeys((2, 4, 6, 8), WARM_UP + MEASURED)
    assert list(measure(device.evaluate, 1, device.clock)) == [1]


def test_rows_that_do_not_fit_into_memory_are_not_measured() -> None:
    device = Device(LAUNCH_BOUND, most_rows=4)
    assert list(measure(device.evaluate, 16, device.clock)) == [2, 4]
    with pytest.raises(torch.OutOfMemoryError):
        measure(Device({}, most_rows=1).evaluate, 16, device.clock)


def test_a_size_that_was_not_measured_uses_the_nearest_one() -> None:
    devices = {SMALL: Device(LAUNCH_BOUND | {6: 11.0, 12: 15.0}), LARGE: Device(BUSY)}
    curves = RowCurves(lambda key, rows: devices[key].evaluate(rows), 0.9, 16)
    curves.measure([SMALL, LARGE], clock=lambda: sum(device.now for device in devices.values()))
    assert (curves(SMALL), curves(MIDDLE), curves(LARGE)) == (16, 16, 2)
    assert curves(BatchKey((4, 256, 256), (77, 8))) == 2


@pytest.fixture
def small(catalog: Catalog) -> Catalog:
    """Models that draw best at a size that takes little time."""
    data = catalog.model_dump()
    for model in data["models"]:
        model["sizes"] = [{"width": 256, "height": 256}]
    return Catalog.model_validate(data)


@pytest.mark.parametrize("component", ["unet-sd15", "unet-sdxl-base", "refiner-sdxl"])
def test_an_engine_measures_itself_when_it_is_told_a_price(small: Catalog, component: str) -> None:
    """With rows as they come: every shape of a batch is what the UNet takes."""
    engine = load_engine(small, component, "cpu", max_rows=2, row_price=0.9)
    assert engine.rows_that_fit is not None
    width = engine.denoiser.config["cross_attention_dim"]
    assert engine.rows_that_fit(BatchKey((4, 16, 16), (77, width))) == 2


def test_a_tick_takes_no_more_rows_than_are_worth_it(small: Catalog) -> None:
    engine = load_engine(small, "unet-sd15", "cpu", max_rows=8)
    engine.rows_that_fit = lambda key: 2
    texts = load_text_encoders(small, "text-encoder-sd15", "cpu")
    for seed in range(3):
        params = GenerationParams(model_name="SD1.5", prompt="a fox", width=128, height=128, steps=2, seed=seed)
        (stage,) = make_plan(params, small).stages
        engine.add(engine.prepare(str(seed), stage, texts.encode(stage), None))
    assert engine.tick().rows == 2
