"""The engine loop of a denoiser replica, without Ray: shared ticks, cancellation, faults."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from config.catalog import Catalog
from deployments.denoiser import DenoiserDeployment
from deployments.observability import Traced
from deployments.replica import Runtime
from pipelines.conditioning import Conditioning
from pipelines.errors import DenoiseError
from pipelines.plan import GenerationParams, StagePlan
from pipelines.planning import make_plan
from pipelines.weights import load_text_encoders


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
    predict = engine._denoiser.predict

    def fail(batch: Any) -> torch.Tensor:
        raise MemoryError("no room")

    engine._denoiser.predict = fail  # type: ignore[method-assign]
    outcomes = await asyncio.gather(*(replica.denoise(*work(3)) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(outcome, DenoiseError) for outcome in outcomes)
    engine._denoiser.predict = predict  # type: ignore[method-assign]
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
