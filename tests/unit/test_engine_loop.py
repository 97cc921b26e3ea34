"""The engine loop of a denoiser replica, without Ray: shared ticks, progress, cancellation, faults."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
import torch

from config.catalog import Catalog
from deployments.replicas.engine_loop import EngineLoop, Update, Work
from deployments.replicas.worker import Worker
from pipelines.assembly import load_engine, load_text_encoders
from pipelines.engine.engine import StepEngine, TickReport
from pipelines.errors import DenoiseError, OverloadedError
from pipelines.plan import GenerationParams
from pipelines.planning import make_plan
from pipelines.sampling.latents import Latents

UNET = "unet-sd15"
LONG = 1000
MakeWork = Callable[..., Work]


class Loop(EngineLoop):
    """A loop over one tiny UNet that keeps its tick reports and tells of each."""

    def __init__(self, engine: StepEngine) -> None:
        self.engine = engine
        self.reports: list[TickReport] = []
        self.ticked = asyncio.Event()
        super().__init__({UNET: engine}, Worker(), on_tick=self._keep, unwrap=lambda error: error.__cause__ or error)

    def _keep(self, component: str, report: TickReport, seconds: float) -> None:
        self.reports.append(report)
        self.ticked.set()

    async def next_tick(self) -> None:
        self.ticked.clear()
        await self.ticked.wait()

    async def empty_engine(self) -> None:
        """Returns when what was dropped has left the engine, on whose thread that happens in turn."""
        await self._worker.run(lambda: None)
        assert len(self.engine) == 0


@pytest.fixture
async def loop(catalog: Catalog) -> Loop:
    return Loop(load_engine(catalog, UNET, "cpu", max_rows=8))


@pytest.fixture(scope="module")
def work(catalog: Catalog) -> MakeWork:
    stack = load_text_encoders(catalog, "text-encoder-sd15", "cpu")

    def make(steps: int, expires: float = math.inf, **changes: Any) -> Work:
        fields = {"prompt": "x", "width": 128, "height": 128, "seed": 1, "sampler": "Euler"} | changes
        (stage,) = make_plan(GenerationParams(model_name="SD1.5", steps=steps, **fields), catalog).stages
        return Work(stage, stack.encode(stage), expires=expires)

    return make


async def test_requests_share_ticks(loop: Loop, work: MakeWork) -> None:
    results = await asyncio.gather(*(loop.submit(work(6, seed=seed)) for seed in range(4)))
    assert len({float(latents.values.sum()) for latents in results}) == 4
    rows = [report.rows for report in loop.reports]
    assert max(rows) >= 6, "four guided jobs bring eight rows; at least three of them met"
    assert sum(rows) == 4 * 6 * 2, "no row was evaluated twice"
    assert len(loop) == 0


async def test_a_watcher_hears_of_every_step_and_then_gets_the_result(loop: Loop, work: MakeWork) -> None:
    started = []
    items = [item async for item in loop.watch(work(4, sampler="Heun"), lambda: started.append(True), previews=True)]
    *updates, result = items
    assert isinstance(result, Latents)
    running = [update for update in updates if isinstance(update, Update) and update.progress.steps]
    assert {update.progress.step for update in running} == {1, 2, 3, 4}
    assert [update.latents is None for update in running] == [False] * (len(running) - 1) + [True]
    assert started
    alone = await loop.submit(work(4, sampler="Heun"))
    assert torch.equal(alone.values, result.values)


async def test_a_watcher_hears_its_place_in_the_queue(loop: Loop, work: MakeWork) -> None:
    """Jobs of another size wait for their turn behind the oldest."""
    first = asyncio.create_task(loop.submit(work(LONG)))
    await loop.next_tick()
    async with aclosing(loop.watch(work(2, width=256))) as items:
        update = await anext(items)
        assert isinstance(update, Update)
        assert (update.progress.steps, update.progress.position) == (0, 1)
    first.cancel()
    await asyncio.wait((first,))
    await loop.empty_engine()


@pytest.mark.parametrize("watched", [False, True], ids=["submitted", "watched"])
async def test_cancelling_a_request_frees_its_rows(loop: Loop, work: MakeWork, watched: bool) -> None:
    if watched:
        async with aclosing(loop.watch(work(LONG))) as items:
            async for item in items:
                if isinstance(item, Update) and item.progress.step == 3:
                    assert loop.outstanding() > 0
                    break
    else:
        task = asyncio.create_task(loop.submit(work(LONG)))
        await loop.next_tick()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert loop.outstanding() == 0, "at once, whatever the engine is doing"
    await loop.empty_engine()
    assert (await loop.submit(work(2))).values.shape == (1, 4, 16, 16)


async def test_a_job_cancelled_before_it_began_leaves_nothing(loop: Loop, work: MakeWork) -> None:
    tasks = [asyncio.create_task(loop.submit(work(3))) for _ in range(3)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (await loop.submit(work(2))).values.isfinite().all()
    assert len(loop) == 0


async def test_a_failed_tick_is_told_to_those_in_it_and_the_next_request_works(loop: Loop, work: MakeWork) -> None:
    tick = loop.engine.tick

    def failing() -> TickReport:
        report = tick()
        error = DenoiseError("no room")
        error.__cause__ = MemoryError("no room")
        loop.engine.cancel(report.advanced[0].id)
        return TickReport(failed=tuple((job, error) for job in report.advanced))

    loop.engine.tick = failing  # type: ignore[method-assign]
    outcomes = await asyncio.gather(*(loop.submit(work(3)) for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [MemoryError] * 3, "unwrapped as the loop was told"
    loop.engine.tick = tick  # type: ignore[method-assign]
    assert (await loop.submit(work(2))).values.isfinite().all()


async def test_an_exception_of_the_loop_itself_reaches_every_request(
    loop: Loop, work: MakeWork, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> TickReport:
        raise RuntimeError("bug")

    tick, loop.engine.tick = loop.engine.tick, broken  # type: ignore[method-assign]
    for outcome in await asyncio.gather(*(loop.submit(work(3)) for _ in range(2)), return_exceptions=True):
        assert isinstance(outcome, RuntimeError)
    assert "the engine loop failed" in caplog.text
    loop.engine.tick = tick  # type: ignore[method-assign]
    assert (await loop.submit(work(2))).values.isfinite().all(), "the next request starts it again"


async def test_a_request_that_would_be_late_is_refused_at_once(loop: Loop, work: MakeWork) -> None:
    """By the throughput of ticks of its own size; a size that was never drawn gets the benefit of the doubt."""
    await loop.submit(work(20))
    with pytest.raises(OverloadedError) as refused:
        await loop.submit(work(LONG, expires=time.time() - 1))
    assert 1 <= refused.value.retry_after <= 60
    assert len(loop) == 0
    assert (await loop.submit(work(2, expires=time.time() + 600))).values.isfinite().all()
    large = loop.submit(work(3, expires=time.time() + 600, width=256, height=256))
    assert (await large).values.shape == (1, 4, 32, 32)


async def test_a_job_that_turns_out_too_slow_gives_its_rows_back(loop: Loop, work: MakeWork) -> None:
    """Nothing was timed when it came; after its first ticks its deadline is out of reach."""
    loop.throughput.least_seconds_for = lambda job: 3600.0  # type: ignore[method-assign]
    with pytest.raises(OverloadedError) as refused:
        await loop.submit(work(LONG, expires=time.time() + 600))
    assert refused.value.retry_after == 60
    await loop.empty_engine()


async def test_outstanding_work_counts_rows_ticks_and_pixels(loop: Loop, work: MakeWork) -> None:
    assert (loop.outstanding(), loop.throughput.overall.value) == (0, 0.0)
    drawing = asyncio.create_task(loop.submit(work(500)))
    await loop.next_tick()
    assert 0 < loop.outstanding(UNET) <= 2 * 499 * 128 * 128
    assert loop.outstanding(UNET) % (2 * 128 * 128) == 0
    assert loop.outstanding("another") == 0
    assert loop.throughput.overall.value > 0
    drawing.cancel()
    await asyncio.wait((drawing,))
    assert loop.outstanding() == 0
    await loop.empty_engine()
