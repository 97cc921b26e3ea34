"""The engine loop of a denoiser replica, without Ray: shared ticks, cancellation, faults."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError

from config.catalog import Catalog
from deployments.replicas.base import Runtime
from deployments.replicas.denoiser import DenoiserDeployment
from deployments.replicas.remote_control import RemoteControl
from deployments.telemetry.stages import Traced
from pipelines.assembly import load_text_encoders
from pipelines.errors import DenoiseError, OverloadedError
from pipelines.plan import GenerationParams, StagePlan
from pipelines.planning import make_plan
from pipelines.text.conditioning import Conditioning


@pytest.fixture
def replica(catalog: Catalog) -> DenoiserDeployment:
    return DenoiserDeployment(["unet-sd15"], catalog, Runtime(device="cpu", torch_threads=2), max_rows=8)


@pytest.fixture(scope="module")
def work(catalog: Catalog) -> Any:
    stack = load_text_encoders(catalog, "text-encoder-sd15", "cpu")

    def make(steps: int, **changes: Any) -> tuple[StagePlan, Traced[Conditioning], None]:
        fields = {"prompt": "x", "width": 128, "height": 128, "seed": 1, "sampler": "Euler"} | changes
        (stage,) = make_plan(GenerationParams(model_name="SD1.5", steps=steps, **fields), catalog).stages
        return stage, Traced(stack.encode(stage)), None

    return make


async def test_requests_share_ticks(replica: DenoiserDeployment, work: Any) -> None:
    engine = replica._engines["unet-sd15"]
    rows: list[int] = []
    tick = engine.tick
    engine.tick = lambda: (report := tick(), rows.append(report.rows))[0]  # type: ignore[method-assign]
    results = await asyncio.gather(*(replica.denoise(*work(6, seed=seed)) for seed in range(4)))
    assert len({float(r.value.values.sum()) for r in results}) == 4
    assert max(rows) >= 6, "four guided jobs bring eight rows; at least three of them met"
    assert sum(rows) == 4 * 6 * 2, "no row was evaluated twice"
    assert not replica._waiting


async def test_cancelling_a_request_frees_its_rows(replica: DenoiserDeployment, work: Any) -> None:
    engine = replica._engines["unet-sd15"]
    long = asyncio.create_task(replica.denoise(*work(1000)))
    while not len(engine):  # noqa: ASYNC110 - the engine lives on another thread and tells nobody
        await asyncio.sleep(0.01)
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    assert (await replica.denoise(*work(2))).value.values.shape == (1, 4, 16, 16)
    assert len(engine) == 0


async def test_cancelled_before_it_began(replica: DenoiserDeployment, work: Any) -> None:
    tasks = [asyncio.create_task(replica.denoise(*work(3))) for _ in range(3)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (await replica.denoise(*work(2))).value.values.isfinite().all()
    assert not replica._waiting


async def test_a_fault_answers_everybody_and_the_next_request_works(replica: DenoiserDeployment, work: Any) -> None:
    engine = replica._engines["unet-sd15"]
    predict = engine.denoiser.predict

    def fail(batch: Any) -> torch.Tensor:
        raise MemoryError("no room")

    engine.denoiser.predict = fail  # type: ignore[method-assign]
    outcomes = await asyncio.gather(*(replica.denoise(*work(3)) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(outcome, DenoiseError) for outcome in outcomes)
    engine.denoiser.predict = predict  # type: ignore[method-assign]
    assert (await replica.denoise(*work(2))).spans[-1].name == "denoise_unet-sd15"


async def test_a_fault_of_the_loop_itself_leaves_nobody_waiting(replica: DenoiserDeployment, work: Any) -> None:
    engine = replica._engines["unet-sd15"]

    def broken() -> None:
        raise RuntimeError("bug")

    engine.tick = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="bug"):
        await asyncio.wait_for(replica.denoise(*work(3)), timeout=10)
    with pytest.raises(RuntimeError, match="bug"):
        await replica._loop  # type: ignore[misc]


async def test_what_cannot_be_in_time_is_refused_at_once(replica: DenoiserDeployment, work: Any) -> None:
    """By the pace of ticks of its own size; a size that was never drawn gets the benefit of the doubt."""
    await replica.denoise(*work(20))
    assert replica._pace.overall.value > 0
    with pytest.raises(OverloadedError) as refused:
        await replica.denoise(*work(1000), None, time.time() + 0.2)
    assert 1 <= refused.value.retry_after <= 60
    assert not replica._waiting
    await replica.denoise(*work(2), None, time.time() + 60)
    large = replica.denoise(*work(3, width=256, height=256), None, time.time() + 60)
    assert (await large).value.values.shape == (1, 4, 32, 32)


async def test_a_job_that_will_not_make_it_gives_its_rows_back(replica: DenoiserDeployment, work: Any) -> None:
    """Nothing was timed when it came; after its first ticks it is clear."""
    engine = replica._engines["unet-sd15"]
    with pytest.raises(OverloadedError):
        await replica.denoise(*work(1000), None, time.time() + 0.5)
    assert (await replica.denoise(*work(2))).value.values.isfinite().all()
    assert len(engine) == 0


async def test_what_autoscaling_hears(replica: DenoiserDeployment, work: Any) -> None:
    assert await replica.record_autoscaling_stats() == {"outstanding_work": 0.0, "work_per_second": 0.0}
    drawing = asyncio.create_task(replica.denoise(*work(500)))
    while not replica._pace.overall.value:  # noqa: ASYNC110 - ticks happen on another thread
        await asyncio.sleep(0.01)
    stats = await replica.record_autoscaling_stats()
    assert 0 < stats["outstanding_work"] <= 2 * 500 * 128 * 128
    assert stats["outstanding_work"] % (2 * 128 * 128) == 0
    assert stats["work_per_second"] > 0
    drawing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await drawing
    assert (await replica.record_autoscaling_stats())["outstanding_work"] == 0
    while len(replica._engines["unet-sd15"]):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


class Control:
    """A handle of a ControlNet deployment whose replica dies so many times."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths
        self.asked: list[int] = []
        self.residuals = SimpleNamespace(remote=self._residuals)

    async def _residuals(self, batch: Any, hints: dict[str, Any]) -> str | None:
        self.asked.append(len(hints))
        if self.deaths:
            self.deaths -= 1
            raise ActorDiedError
        return "residuals" if hints else None


async def test_a_controlnet_that_dies_is_asked_again_and_given_the_maps() -> None:
    handle = Control(deaths=1)
    pending = RemoteControl(handle).start(None, {"map": None})  # type: ignore[arg-type, dict-item]
    assert await asyncio.to_thread(pending.result) == "residuals"
    assert handle.asked == [0, 0, 1], "died; its successor has not got the map; it has"


async def test_a_controlnet_that_dies_twice_is_known_for_what_it_is() -> None:
    pending = RemoteControl(Control(deaths=2)).start(None, {"map": None})  # type: ignore[arg-type, dict-item]
    with pytest.raises(ActorDiedError):
        await asyncio.to_thread(pending.result)
