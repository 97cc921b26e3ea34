"""The LoRAs that are loaded for one model: each once, and nobody waits for another's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.adapters.layers import Adapter, Mixture
from pipelines.adapters.store import LoraStore
from pipelines.plan import LoraUse, ScheduleSlice, StagePlan, TextPlan


def stage(name: str) -> StagePlan:
    return StagePlan(
        component="unet",
        backend="torch",
        sampler="Euler",
        schedule=ScheduleSlice(steps=1),
        guidance_scale=1.0,
        text=TextPlan(encoders=(0,), prompts=("",), negative_prompts=None),
        width=64,
        height=64,
        seed=0,
        loras=(LoraUse(name=name, weight=0.5),),
    )


def test_a_slow_file_is_loaded_once_and_holds_up_nobody_else() -> None:
    begun, released, loads = threading.Event(), threading.Event(), list[str]()

    def load(use: LoraUse, base: str) -> Adapter:
        loads.append(use.name)
        if use.name == "slow":
            begun.set()
            assert released.wait(timeout=60)
        return Adapter(use.name, {})

    store = LoraStore(load)
    with ThreadPoolExecutor(4) as threads:
        slow = [threads.submit(store.mixture, stage("slow")) for _ in range(3)]
        assert begun.wait(timeout=60)
        quick: Mixture = threads.submit(store.mixture, stage("quick")).result(timeout=60)
        assert not any(future.done() for future in slow)
        released.set()
        mixtures = [future.result(timeout=60) for future in slow]
    assert quick[0][0].name == "quick"
    assert quick[0][1] == 0.5
    assert sorted(loads) == ["quick", "slow"]
    assert len({mixture[0][0] for mixture in mixtures}) == 1


def test_a_file_that_failed_is_tried_again() -> None:
    fails = [True]

    def load(use: LoraUse, base: str) -> Adapter:
        if fails.pop():
            raise OSError("gone")
        return Adapter(use.name, {})

    store = LoraStore(load)
    with pytest.raises(OSError, match="gone"):
        store.mixture(stage("a"))
    fails.append(False)
    assert store.mixture(stage("a"))[0][0].name == "a"
