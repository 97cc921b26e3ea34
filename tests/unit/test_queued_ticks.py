"""The engine loop where a tick is only queued when it returns: a device whose ends the tests decide, real ticks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from config.catalog import Catalog
from deployments.replicas.engine_loop import EngineLoop, Update, Work
from deployments.replicas.worker import Worker
from pipelines.assembly import load_engine, load_text_encoders
from pipelines.engine.engine import StepEngine, TickReport
from pipelines.errors import NonFiniteError
from pipelines.plan import GenerationParams
from pipelines.planning import make_plan
from pipelines.transfers import Mark

UNET = "unet-sd15"


class LateMark:
    """A mark that is passed when somebody waited for it."""

    def __init__(self, device: Device, number: int) -> None:
        self._device, self.number, self.passed = device, number, False

    def wait(self) -> None:
        self._device.on_wait(self.number)
        self._device.clock = max(self._device.clock, self._device.begins[self.number]) + self._device.seconds
        self.passed = True


class Device:
    """Ticks of an engine, each of which ends when it is waited for; with a clock of its own."""

    def __init__(self, engine: StepEngine) -> None:
        self._tick = engine.tick
        engine.tick = self.tick  # type: ignore[method-assign]
        self.marks: list[LateMark] = []
        self.begins: list[float] = []
        self.running: list[int] = []
        """Ticks that had not ended when the next one began."""
        self.on_wait: Callable[[int], object] = lambda number: None
        self.clock, self.seconds = 100.0, 10.0

    def tick(self) -> TickReport:
        self.running.append(sum(not mark.passed for mark in self.marks))
        self.begins.append(self.clock)
        report = self._tick()
        if report.mark is None:
            return report
        self.marks.append(LateMark(self, len(self.marks)))
        return replace(report, mark=cast(Mark, self.marks[-1]))


@pytest.fixture
def engine(catalog: Catalog) -> StepEngine:
    return load_engine(catalog, UNET, "cpu", max_rows=8)


@pytest.fixture
def device(engine: StepEngine) -> Device:
    return Device(engine)


@pytest.fixture
async def loop(engine: StepEngine, device: Device) -> EngineLoop:
    return EngineLoop({UNET: engine}, Worker())


@pytest.fixture(scope="module")
def work(catalog: Catalog) -> Callable[..., Work]:
    stack = load_text_encoders(catalog, "text-encoder-sd15", "cpu")

    def make(steps: int, **changes: Any) -> Work:
        fields = {"prompt": "x", "width": 128, "height": 128, "seed": 1, "sampler": "Euler"} | changes
        (stage,) = make_plan(GenerationParams(model_name="SD1.5", steps=steps, **fields), catalog).stages
        return Work(stage, stack.encode(stage))

    return make


async def test_one_tick_is_queued_behind_the_one_that_runs_and_no_further(
    loop: EngineLoop, device: Device, work: Callable[..., Work]
) -> None:
    await loop.submit(work(6))
    assert device.running == [0, 1, 1, 1, 1, 1]
    assert len(loop) == 0


async def test_a_result_is_told_when_its_last_tick_is_over(
    loop: EngineLoop, device: Device, work: Callable[..., Work]
) -> None:
    task = asyncio.create_task(loop.submit(work(3)))
    done: list[bool] = []
    device.on_wait = lambda number: done.append(task.done())
    assert (await task).values.isfinite().all()
    assert done == [False] * 3


async def test_a_step_is_told_when_it_is_over_with_the_latents_of_that_step(
    loop: EngineLoop, device: Device, work: Callable[..., Work]
) -> None:
    """The job is further by then."""
    ended: list[int] = []
    device.on_wait = ended.append
    steps, previews = [], []
    async with aclosing(loop.watch(work(4), previews=True)) as items:
        async for item in items:
            if isinstance(item, Update) and item.progress.steps:
                assert len(ended) >= item.progress.step
                steps.append(item.progress.step)
                previews.append(item.latents)
    assert steps == [1, 2, 3, 4]
    (*seen, last) = previews
    assert last is None
    values = [float(latents.values.std()) for latents in seen if latents is not None]
    assert len(set(values)) == 3


async def test_a_job_added_during_the_last_tick_runs(
    loop: EngineLoop, device: Device, work: Callable[..., Work]
) -> None:
    running, later = asyncio.get_running_loop(), []

    def come(number: int) -> None:
        if number == 1:
            came = threading.Event()
            running.call_soon_threadsafe(
                lambda: (later.append(asyncio.create_task(loop.submit(work(2, seed=2)))), came.set())
            )
            came.wait()

    device.on_wait = come
    await loop.submit(work(2))
    assert (await later[0]).values.isfinite().all()
    assert len(loop) == 0


async def test_a_tick_takes_from_the_end_of_the_one_before_to_its_own(
    engine: StepEngine, device: Device, work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the moment that queueing it took."""
    monkeypatch.setattr(time, "perf_counter", lambda: device.clock)
    seconds: list[float] = []
    loop = EngineLoop({UNET: engine}, Worker(), on_tick=lambda component, report, taken: seconds.append(taken))
    await loop.submit(work(5))
    assert seconds == [10.0] * 5
    assert loop.throughput.overall.value == pytest.approx(2 * 128 * 128 / 10)


async def test_the_preparation_of_a_cancelled_request_stops(
    loop: EngineLoop, engine: StepEngine, work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, begun, gone = engine.prepare, asyncio.Event(), threading.Event()
    running = asyncio.get_running_loop()
    outcome = running.create_future()

    def slow(*args: Any) -> Any:
        running.call_soon_threadsafe(begun.set)
        gone.wait()
        try:
            return prepare(*args)
        except BaseException as error:
            running.call_soon_threadsafe(outcome.set_result, type(error).__name__)
            raise

    monkeypatch.setattr(engine, "prepare", slow)
    task = asyncio.create_task(loop.submit(work(2)))
    await begun.wait()
    task.cancel()
    await asyncio.wait((task,))
    gone.set()
    assert await outcome == "CancelledError"
    assert (await loop.submit(work(2, seed=2))).values.isfinite().all()
    assert len(engine) == 0


async def test_values_that_are_not_finite_are_told_to_their_request(
    loop: EngineLoop, engine: StepEngine, work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = engine.denoiser.predict
    monkeypatch.setattr(engine.denoiser, "predict", lambda batch: predict(batch) / torch.zeros(()))
    with pytest.raises(NonFiniteError, match="the latents have values that are not finite"):
        await loop.submit(work(2))
    monkeypatch.undo()


async def test_a_device_that_fails_while_it_runs_leaves_nobody_waiting(
    loop: EngineLoop, device: Device, work: Callable[..., Work], caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA tells of a fault when it is asked next."""

    def fail(number: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device.on_wait = fail
    outcomes = await asyncio.gather(*(loop.submit(work(3, seed=seed)) for seed in range(2)), return_exceptions=True)
    assert ["illegal memory access" in str(outcome) for outcome in outcomes] == [True, True]
    assert "the engine loop failed" in caplog.text
