"""The engine: joining, leaving, cancelling, and faults that reach only whom they concern. Real tiny UNets."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel

from config.catalog import ROOT, Catalog
from pipelines.assembly import load_engine, load_text_encoders
from pipelines.backends.base import StepBatch
from pipelines.control.annotators import Annotators
from pipelines.control.nets import ColocatedControl, ControlNets
from pipelines.control.types import ControlBatch, ControlHint
from pipelines.control_plan import ControlUse
from pipelines.engine.courses import SamplerCourse
from pipelines.engine.engine import StepEngine
from pipelines.engine.job import DenoiseJob
from pipelines.engine.memory import RecoveringBudget
from pipelines.engine.steering import Steering
from pipelines.plan import GenerationParams
from pipelines.planning import make_plan
from pipelines.sampling.latents import Latents
from pipelines.sampling.tables import MOST_TICKS
from pipelines.text.encoders import TextEncoderStack


@pytest.fixture(scope="module")
def encoders(catalog: Catalog) -> TextEncoderStack:
    return load_text_encoders(catalog, "text-encoder-sd15", "cpu")


@pytest.fixture
def engine(catalog: Catalog) -> StepEngine:
    return load_engine(catalog, "unet-sd15", "cpu", max_rows=4)


class Recorder:
    """Counts the rows of every evaluation, and can be told to fail."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.rows: list[int] = []
        self.fail = False
        self.config, self.device, self.dtype = inner.config, inner.device, inner.dtype

    def predict(self, batch: StepBatch) -> torch.Tensor:
        if self.fail:
            raise ArithmeticError("broken")
        self.rows.append(len(batch.sample))
        output: torch.Tensor = self.inner.predict(batch)
        return output

    def padding(self, batch: StepBatch) -> int:
        return 1  # as if a program for one row more had run


@pytest.fixture
def recorder(engine: StepEngine) -> Recorder:
    engine.denoiser = recorder = Recorder(engine.denoiser)
    return recorder


def add(
    engine: StepEngine,
    encoders: TextEncoderStack,
    catalog: Catalog,
    name: str,
    latents: Latents | None = None,
    **fields: Any,
) -> DenoiseJob:
    request = {"model_name": "SD1.5", "prompt": name, "width": 128, "height": 128, "steps": 4, "seed": 1}
    (stage,) = make_plan(GenerationParams(**(request | {"sampler": "Euler"} | fields)), catalog).stages
    return engine.add(engine.prepare(name, stage, encoders.encode(stage), latents))


def finish(engine: StepEngine) -> dict[str, torch.Tensor]:
    done: dict[str, torch.Tensor] = {}
    while len(engine):
        done |= {fetched.job.id: fetched.result().values for fetched in engine.tick().finished}
    return done


def test_jobs_join_and_leave_between_ticks(
    engine: StepEngine, recorder: Recorder, encoders: TextEncoderStack, catalog: Catalog
) -> None:
    add(engine, encoders, catalog, "first", steps=3)
    engine.tick()
    add(engine, encoders, catalog, "second", steps=3, cfg_scale=1.0)
    finished = [[fetched.job.id for fetched in engine.tick().finished] for _ in range(3)]
    assert recorder.rows == [2, 3, 3, 1]
    assert finished == [[], ["first"], ["second"]]


def test_rows_of_neighbours_do_not_leak(engine: StepEngine, encoders: TextEncoderStack, catalog: Catalog) -> None:
    add(engine, encoders, catalog, "alone")
    alone = finish(engine)["alone"]
    add(engine, encoders, catalog, "alone")
    add(engine, encoders, catalog, "other", seed=9, cfg_scale=9.0)
    together = finish(engine)
    torch.testing.assert_close(together["alone"], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(together["other"], alone, atol=1e-2)


def test_the_row_budget_holds(
    engine: StepEngine, recorder: Recorder, encoders: TextEncoderStack, catalog: Catalog
) -> None:
    for name in "abc":
        add(engine, encoders, catalog, name)
    assert set(finish(engine)) == set("abc")
    assert max(recorder.rows) == 4


def test_shapes_do_not_mix_and_none_starves(
    engine: StepEngine, recorder: Recorder, encoders: TextEncoderStack, catalog: Catalog
) -> None:
    add(engine, encoders, catalog, "wide", width=192)
    add(engine, encoders, catalog, "square")
    add(engine, encoders, catalog, "wide too", width=192)
    assert list(finish(engine)) == ["wide", "wide too", "square"]
    assert recorder.rows == [4] * 4 + [2] * 4


def test_a_report_tells_rows_and_padding(
    engine: StepEngine, recorder: Recorder, encoders: TextEncoderStack, catalog: Catalog
) -> None:
    add(engine, encoders, catalog, "guided")
    add(engine, encoders, catalog, "plain", cfg_scale=1.0)
    report = engine.tick()
    assert (report.rows, report.padding) == (3, 1)
    recorder.fail = True
    assert engine.tick().padding == 0


def test_clearing_drops_every_job(engine: StepEngine, encoders: TextEncoderStack, catalog: Catalog) -> None:
    for name in "ab":
        add(engine, encoders, catalog, name)
    engine.clear()
    assert len(engine) == 0
    assert engine.tick().rows == 0


def test_a_cancelled_job_frees_its_rows_at_the_next_tick(
    engine: StepEngine, recorder: Recorder, encoders: TextEncoderStack, catalog: Catalog
) -> None:
    add(engine, encoders, catalog, "kept")
    add(engine, encoders, catalog, "dropped")
    engine.tick()
    assert engine.cancel("dropped")
    assert not engine.cancel("dropped")
    assert list(finish(engine)) == ["kept"]
    assert recorder.rows == [4, 2, 2, 2]


def test_an_evaluation_that_fails_for_each_alone_reaches_the_jobs_in_it_and_no_other(
    engine: StepEngine, recorder: Recorder, encoders: TextEncoderStack, catalog: Catalog
) -> None:
    for name in "abc":
        add(engine, encoders, catalog, name)
    recorder.fail = True
    report = engine.tick()
    assert [job.id for job, _ in report.failed] == ["a", "b"]
    assert "ArithmeticError: broken" in str(report.failed[0][1])
    recorder.fail = False
    assert list(finish(engine)) == ["c"]


def test_a_failing_sampler_reaches_its_own_job(
    engine: StepEngine, encoders: TextEncoderStack, catalog: Catalog
) -> None:
    broken = add(engine, encoders, catalog, "broken", steps=MOST_TICKS + 1)
    add(engine, encoders, catalog, "sound")
    assert isinstance(broken.course, SamplerCourse), "too long for a table"
    broken.course.sampler.step = None  # type: ignore[assignment, method-assign]
    report = engine.tick()
    assert [job.id for job, _ in report.failed] == ["broken"]
    assert list(finish(engine)) == ["sound"]


def test_an_empty_slice_passes_the_latents_on(engine: StepEngine, encoders: TextEncoderStack, catalog: Catalog) -> None:
    """A refiner can be left with nothing to do: one step, all of it above its share."""
    fields = {"model_name": "SD1.5", "prompt": "x", "steps": 1, "sampler": "Euler", "width": 128, "height": 128}
    (stage,) = make_plan(GenerationParams(**fields), catalog).stages
    stage = stage.model_copy(update={"schedule": stage.schedule.model_copy(update={"start": 0.9999})})
    latents = Latents(torch.ones(1, 4, 16, 16))
    engine.add(engine.prepare("idle", stage, encoders.encode(stage), latents))
    report = engine.tick()
    assert report.rows == 0
    torch.testing.assert_close(report.finished[0].result().values, latents.values)


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["torch", "cuDNN", "cuBLAS", "CPU"])
def test_running_out_of_memory_halves_the_budget_and_retries_once(
    engine: StepEngine,
    recorder: Recorder,
    encoders: TextEncoderStack,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    engine.max_rows = 8
    for name in "abcd":
        add(engine, encoders, catalog, name, steps=2)
    whole = recorder.predict

    def small_memory(batch: StepBatch) -> torch.Tensor:
        if len(batch.sample) > 4:
            raise error
        return whole(batch)

    monkeypatch.setattr(recorder, "predict", small_memory)
    assert set(finish(engine)) == set("abcd")
    assert recorder.rows == [4, 4, 4, 4]


def test_the_budget_grows_back_when_memory_was_enough_for_a_while(
    engine: StepEngine,
    recorder: Recorder,
    encoders: TextEncoderStack,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine.max_rows, engine._recovering = 8, RecoveringBudget(grow_after=2)
    for name in "abcd":
        add(engine, encoders, catalog, name, steps=4)
    whole, failures = recorder.predict, [torch.OutOfMemoryError("a neighbour's spike")]

    def fails_once(batch: StepBatch) -> torch.Tensor:
        if failures:
            raise failures.pop()
        return whole(batch)

    monkeypatch.setattr(recorder, "predict", fails_once)
    rows = [engine.tick().rows for _ in range(5)]
    assert rows == [4, 4, 4, 8, 4], "the retry, two ticks of half the rows, all, and the two jobs that are left"


def test_a_retry_begins_without_the_activations_of_the_pass_that_failed(
    engine: StepEngine,
    recorder: Recorder,
    encoders: TextEncoderStack,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(engine, encoders, catalog, "a", steps=1)
    whole, held = recorder.predict, []

    def fails_once(batch: StepBatch) -> torch.Tensor:
        if not held:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("no room")
        assert held[0]() is None
        return whole(batch)

    monkeypatch.setattr(recorder, "predict", fails_once)
    assert list(finish(engine)) == ["a"]


def test_little_memory_makes_small_ticks_but_everybody_finishes(
    engine: StepEngine, recorder: Recorder, encoders: TextEncoderStack, catalog: Catalog
) -> None:
    engine.max_rows, engine.rows_that_fit = 16, lambda _: 4
    for name in "abc":
        add(engine, encoders, catalog, name, steps=2)
    assert set(finish(engine)) == set("abc")
    assert recorder.rows == [4, 4, 2, 2]


def test_a_job_that_never_fits_fails_alone(
    engine: StepEngine,
    recorder: Recorder,
    encoders: TextEncoderStack,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(engine, encoders, catalog, "huge")
    monkeypatch.setattr(recorder, "predict", lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    assert "no room" in str(engine.tick().failed[0][1])
    assert len(engine) == 0
    monkeypatch.undo()
    for name in "ab":
        add(engine, encoders, catalog, name, steps=1)
    assert engine.tick().rows == 4, "the others still share their ticks"


@pytest.mark.slow
def test_strict_gives_equal_bytes_whatever_the_neighbours(encoders: TextEncoderStack, catalog: Catalog) -> None:
    engine = load_engine(catalog, "unet-sd15", "cpu", strict=True)
    samplers = ["Euler", "DPM++ 2M SDE Karras", "Heun", "DDIM"]
    for trial in range(20):
        fields: dict[str, Any] = {
            "seed": trial,
            "steps": 3,
            "sampler": samplers[trial % 4],
            "cfg_scale": 1.0 + trial % 3,
        }
        add(engine, encoders, catalog, "it", **fields)
        alone = finish(engine)["it"]
        for neighbour in range(3):
            add(engine, encoders, catalog, f"before {neighbour}", seed=100 + neighbour, steps=4)
        add(engine, encoders, catalog, "it", **fields)
        for neighbour in range(4):
            add(engine, encoders, catalog, f"after {neighbour}", seed=200 + neighbour, steps=2, cfg_scale=1.0)
        assert torch.equal(finish(engine)["it"], alone)


def steered(hint_id: str) -> Steering:
    """By one map, all the way."""
    hint = ControlHint(hint_id, "net", None, torch.rand(1, 3, 128, 128))
    return Steering((hint,), (ControlUse(name="canny", component="net", mode=None, preprocess=False),), ticks=100)


class CountingControl:
    """A ControlNet of zeros that counts its calls and rows; what a source answers is not under test here."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def start(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> Any:
        self.rows.append(len(batch.sample))
        assert batch.hint_ids == set(hints)
        model = ControlNetModel.from_pretrained(ROOT / "models/tiny/controlnet-sd15-canny")
        nets = ControlNets({"net": model}, Annotators(Catalog.load("tiny"), "cpu"))
        return ColocatedControl(nets).start(batch, hints)


def test_a_tick_of_controlled_and_plain_rows_makes_one_controlnet_call(
    engine: StepEngine, recorder: Recorder, encoders: TextEncoderStack, catalog: Catalog
) -> None:
    engine.max_rows = 16
    engine.control = counting = CountingControl()
    for index in range(5):
        job = add(engine, encoders, catalog, str(index), cfg_scale=1.0, steps=2)
        if index < 3:
            job.steering = steered(f"hint {index}")
    finish(engine)
    assert recorder.rows == [5, 5]
    assert counting.rows == [3, 3]


def test_a_tick_outside_the_windows_of_all_maps_asks_no_controlnet(
    engine: StepEngine, encoders: TextEncoderStack, catalog: Catalog
) -> None:
    """Of four ticks the first map steers two, the second the last one, as a guess: of one row."""
    engine.control = counting = CountingControl()
    windows = [{"end": 0.5}, {"start": 0.75, "guess": True}]
    job = add(engine, encoders, catalog, "a", cfg_scale=5.0, steps=4)
    hints = tuple(ControlHint(name, "net", None, torch.rand(1, 3, 128, 128)) for name in "ab")
    uses = tuple(ControlUse(name="canny", component="net", mode=None, **window) for window in windows)
    job.steering = Steering(hints, uses, ticks=4)
    finish(engine)
    assert counting.rows == [2, 2, 1]


class Broken:
    """A ControlNet that is gone."""

    def __init__(self) -> None:
        self.calls = 0

    def start(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> Any:
        self.calls += 1
        raise ConnectionError("the ControlNet is gone")


def test_a_lost_controlnet_fails_the_jobs_it_steers_at_once_and_no_other(
    engine: StepEngine, recorder: Recorder, encoders: TextEncoderStack, catalog: Catalog
) -> None:
    engine.max_rows, engine.control = 16, (broken := Broken())
    engine.control_lost = lambda error: isinstance(error, ConnectionError)
    for name in "abc":
        job = add(engine, encoders, catalog, name)
        if name != "c":
            job.steering = steered(name)
    report = engine.tick()
    assert [job.id for job, _ in report.failed] == ["a", "b"]
    assert "the ControlNet is gone" in str(report.failed[0][1])
    assert broken.calls == 1
    assert list(finish(engine)) == ["c"]


def test_an_id_is_taken_once(engine: StepEngine, encoders: TextEncoderStack, catalog: Catalog) -> None:
    add(engine, encoders, catalog, "a")
    with pytest.raises(ValueError, match="already here"):
        add(engine, encoders, catalog, "a")


def test_tensor_bundles_travel_as_numpy() -> None:
    latents = Latents(torch.randn(1, 4, 8, 8).to(torch.float16), torch.Generator().get_state())
    wire = pickle.dumps(latents, protocol=5)
    assert b"torch._utils" not in wire
    back = pickle.loads(wire)
    assert torch.equal(back.values, latents.values)
    assert torch.equal(back.generator_state, latents.generator_state)
    assert pickle.loads(pickle.dumps(Latents(torch.ones(1, dtype=torch.bfloat16)))).values.dtype is torch.float32
