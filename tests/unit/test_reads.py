"""Files on a volume that hangs: each takes one thread, and other requests do not wait."""

from __future__ import annotations

import asyncio
import threading

import pytest

from config.catalog import Catalog
from deployments.replicas.engine_loop import EngineLoop, Work
from deployments.replicas.reads import READING_THREADS, Reads
from deployments.replicas.worker import Worker
from pipelines.adapters.layers import Adapter
from pipelines.adapters.store import LoraStore
from pipelines.assembly import load_engine, load_text_encoders
from pipelines.cache import LruCache
from pipelines.errors import WeightsError
from pipelines.loads import Loads, Needed
from pipelines.plan import GenerationParams, LoraUse
from pipelines.planning import make_plan


class Volume:
    """Files with a text each, whose reading can be held up."""

    def __init__(self, kept: int = 100) -> None:
        self.answers = threading.Event()
        self.asked: list[str] = []
        self.loads: Loads[str, threading.Event] = Loads(self._read, LruCache(kept))

    def _read(self, name: str) -> threading.Event:
        self.asked.append(name)
        if name.startswith("gone"):
            raise WeightsError(name)
        if not name.startswith("quick"):
            assert self.answers.wait(60)
        return threading.Event()  # anything that can be told from its like

    def needed(self, *names: str) -> list[Needed]:
        return [Needed(self.loads, name) for name in names]


async def test_many_who_wait_for_a_file_take_one_thread() -> None:
    volume, reads = Volume(), Reads(Worker())
    waiting = [asyncio.create_task(reads.all(volume.needed("slow"))) for _ in range(2 * READING_THREADS)]
    quick = await reads.all(volume.needed("quick"))
    assert len(quick) == 1
    assert not any(task.done() for task in waiting)
    volume.answers.set()
    found = await asyncio.gather(*waiting)
    assert len({id(held[0]) for held in found}) == 1
    assert sorted(volume.asked) == ["quick", "slow"]


async def test_loaded_files_need_no_thread() -> None:
    volume, reads = Volume(), Reads(Worker())
    (before,) = await reads.all(volume.needed("quick"))
    waiting = [asyncio.create_task(reads.all(volume.needed(f"slow {i}"))) for i in range(READING_THREADS)]
    await asyncio.sleep(0)
    assert await reads.all(volume.needed("quick")) == [before]
    volume.answers.set()
    await asyncio.gather(*waiting)


async def test_a_cancelled_request_does_not_stop_a_read_and_a_failure_reaches_all() -> None:
    volume, reads = Volume(), Reads(Worker())
    leaving = asyncio.create_task(reads.all(volume.needed("slow")))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    volume.answers.set()
    await reads.all(volume.needed("slow"))
    assert volume.asked == ["slow"]
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(WeightsError):
            await reads.all(volume.needed("gone", "slow"))
    assert volume.asked == ["slow", "gone", "gone"]


async def test_what_is_held_is_found_after_it_left_the_cache() -> None:
    volume, reads = Volume(kept=1), Reads(Worker())
    held = await reads.all(volume.needed("quick 1", "quick 2"))
    assert [volume.loads.get(name) for name in ("quick 1", "quick 2")] == held
    assert len(volume.asked) == 2


async def test_loras_that_do_not_come_hold_up_no_other_request(catalog: Catalog) -> None:
    """More of them than threads prepare jobs."""
    engine = load_engine(catalog, "unet-sd15", "cpu")
    stack = load_text_encoders(catalog, "text-encoder-sd15", "cpu")
    answers = threading.Event()

    def load(use: LoraUse, base: str) -> Adapter:
        assert answers.wait(60)
        return Adapter(use.name, {})

    engine.loras = LoraStore(load)
    engine._maker._loras = engine.loras
    fields = {"prompt": "x", "width": 128, "height": 128, "seed": 1, "sampler": "Euler", "steps": 2}
    (stage,) = make_plan(GenerationParams(model_name="SD1.5", **fields), catalog).stages  # type: ignore[arg-type]
    text = stack.encode(stage)
    loop = EngineLoop({"unet-sd15": engine}, Worker())
    slow = [stage.model_copy(update={"loras": (LoraUse(name=str(i), weight=1),)}) for i in range(8)]
    waiting = [asyncio.create_task(loop.submit(Work(one, text))) for one in slow]
    plain = await loop.submit(Work(stage, text))
    assert not any(task.done() for task in waiting)
    answers.set()
    for latents in await asyncio.gather(*waiting):
        assert latents.values.shape == plain.values.shape
