"""Time and memory of one UNet: plain and recorded passes, diffusers' loop, our engine, LoRAs, ControlNets, compiled."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel

from benchmarks.gpu.facts import Facts, relative_error
from benchmarks.gpu.networks import SCHEDULER, Case, denoiser_of
from pipelines.acceleration import Acceleration
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.engine.curve import worthwhile_rows
from pipelines.engine.engine import StepEngine
from pipelines.recordings import EAGER_PASSES, ROWS, Capturer, capturer_for

DEFAULT = "DPM++ 2M SDE Heun Karras"
EIGHT = [DEFAULT, "Euler a", "Heun", "DDIM", "UniPC 2M", "LMS", "DPM++ 2M", "DPM2 a"]
ROW_PRICE = 0.9


def measure_unet(facts: Facts, name: str) -> None:
    """Everything about one UNet but compiled blocks."""
    case = Case(facts, name)
    unet = case.unet()
    capturer = capturer_for(facts.device.type, graphs=True)
    plain = denoiser_of(unet)
    recorded = denoiser_of(unet, capturer)  # the last one made over a UNet is the one that takes LoRAs
    _passes(facts, case, plain, recorded)
    _kernels(facts, case, plain)
    _diffusers(facts, case, plain, unet)
    engine = case.engine(recorded)
    for samplers in (["Euler a"], ["Euler"], [DEFAULT] * 4, [DEFAULT] * 8, EIGHT):
        case.fill(engine, samplers)
        facts.tell(f"{name} engine", jobs=len(samplers), samplers=sorted(set(samplers)), **_ticks(facts, engine))
    _waits(facts, case, engine)
    for attention_only in (True, False):
        mixture = case.lora(unet, recorded, 16, attention_only)
        case.fill(engine, ["Euler a"], mixture)
        layers = len(mixture[0][0].layers)
        facts.tell(f"{name} engine with a LoRA of rank 16", layers=layers, **_ticks(facts, engine))
    engine.control = case.control(unet, capturer)
    for jobs in (1, 4):
        case.fill(engine, ["Euler a"] * jobs, hints=case.hints(jobs))
        facts.tell(f"{name} engine with a colocated ControlNet", jobs=jobs, **_ticks(facts, engine))
    nets = engine.control.nets
    facts.tell(
        f"{name} recordings",
        of_the_unet=recorded.captured,
        of_the_controlnet=nets.captured,
        failed=recorded.failed_captures + nets.failed_captures,
    )
    last = denoiser_of(case.unet(), capturer, Acceleration(channels_last=True))
    _compare(facts, case, plain, last, f"{name} channels_last, recorded")


def measure_compiled(facts: Facts, name: str) -> None:
    """Blocks under torch.compile, recorded."""
    case = Case(facts, name)
    plain = denoiser_of(case.unet())
    capturer = capturer_for(facts.device.type, graphs=True)
    for layout in (False, True):
        acceleration = Acceleration(compiled_blocks=not facts.dry, channels_last=layout)
        compiled = denoiser_of(case.unet(), capturer, acceleration)
        begin = time.monotonic()
        compiled.predict(case.batch(compiled, 2))
        facts.sync()
        first = round(time.monotonic() - begin, 1)
        _compare(facts, case, plain, compiled, f"{name} compiled blocks, recorded", channels_last=layout, first_s=first)


def _passes(facts: Facts, case: Case, plain: TorchDenoiser, recorded: TorchDenoiser) -> None:
    """Passes by rows, as they come and recorded, and what recordings take of memory."""
    curve = {}
    for rows in ROWS[: 3 if facts.dry else None]:
        batch = case.batch(plain, rows)
        expected = plain.predict(batch)
        eager = facts.ms(lambda batch=batch: plain.predict(batch), 5)  # type: ignore[misc]
        before = facts.mib()
        for _ in range(EAGER_PASSES + 1):
            got = recorded.predict(batch)
        error = relative_error(got, expected)
        replayed = facts.ms(lambda batch=batch: recorded.predict(batch))  # type: ignore[misc]
        facts.tell(
            f"{case.name} pass",
            rows=rows,
            eager_ms=eager,
            recorded_ms=replayed,
            relative_error=error,
            recordings=recorded.captured,
            grown_mib=facts.mib() - before,
        )
        if rows > 1:
            curve[rows] = replayed / 1000
    facts.tell(f"{case.name} rows that are worth their time", price=ROW_PRICE, rows=worthwhile_rows(curve, ROW_PRICE))


def _kernels(facts: Facts, case: Case, plain: TorchDenoiser) -> None:
    """How busy two rows keep the device, and which kernels take the time."""
    if facts.dry:
        return
    from torch.profiler import ProfilerActivity, profile

    batch = case.batch(plain, 2)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        plain.predict(batch)
        facts.sync()
    busy = [event for event in profiled.events() if event.device_type.name == "CUDA"]
    top = sorted(profiled.key_averages(), key=lambda entry: -entry.self_device_time_total)[:8]
    facts.tell(
        f"{case.name} kernels of two rows",
        kernels=len(busy),
        busy_ms=round(sum(event.device_time for event in busy) / 1000, 2),
        top=[(entry.key[:60], entry.count, round(entry.self_device_time_total / 1000, 2)) for entry in top],
    )


def _diffusers(facts: Facts, case: Case, plain: TorchDenoiser, unet: UNet2DConditionModel) -> None:
    """Milliseconds a step of diffusers' own loop, guided, Euler a."""
    batch = case.batch(plain, 2)
    embeds = {"prompt_embeds": batch.prompt_embeds[1:], "negative_prompt_embeds": batch.prompt_embeds[:1]}
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": unet}
    parts["scheduler"] = diffusers.EulerAncestralDiscreteScheduler.from_config(SCHEDULER)
    if case.pooled:
        pooled = batch.added_conditions["text_embeds"]
        embeds |= {"pooled_prompt_embeds": pooled[1:], "negative_pooled_prompt_embeds": pooled[:1]}
        pipe = diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    steps = 3 if facts.dry else 20

    def draw() -> object:
        generator = torch.Generator().manual_seed(1)
        size = {"height": case.side, "width": case.side, "num_inference_steps": steps, "guidance_scale": 5.0}
        return pipe(**embeds, **size, generator=generator, output_type="latent")

    facts.tell(f"{case.name} diffusers' own loop, Euler a", ms_a_step=round(facts.ms(draw, 3, 1) / steps, 2))


def _ticks(facts: Facts, engine: StepEngine, count: int = 8) -> dict[str, float]:
    """Milliseconds of a tick: with a wait after each, and queued one behind the other as a replica does."""
    for _ in range(EAGER_PASSES + 3):
        _tick(engine)
    count = 1 if facts.dry else count
    waited = facts.ms(lambda: _tick(engine), count, 0)
    facts.sync()
    begin = time.perf_counter()
    for _ in range(count):
        _tick(engine)
    facts.sync()
    return {"tick_ms": waited, "queued_tick_ms": round(1000 * (time.perf_counter() - begin) / count, 3)}


def _tick(engine: StepEngine) -> None:
    report = engine.tick()
    if report.failed:
        raise report.failed[0][1]


def _waits(facts: Facts, case: Case, engine: StepEngine) -> None:
    """Calls of one tick of four jobs that torch says make the host wait."""
    if facts.dry:
        return
    case.fill(engine, [DEFAULT] * 4)
    for _ in range(EAGER_PASSES + 2):
        _tick(engine)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _tick(engine)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
    facts.tell(f"{case.name} synchronising calls of a tick of 4 jobs", count=len(said), first=said[:1])


def _compare(
    facts: Facts,
    case: Case,
    plain: TorchDenoiser,
    other: TorchDenoiser,
    what: str,
    rows: Sequence[int] = (2, 8),
    **more: Any,
) -> None:
    """Passes of two or more rows, and how far they are from the plain ones."""
    for count in rows:
        batch = case.batch(plain, count)
        expected = plain.predict(batch)
        for _ in range(EAGER_PASSES + 1):
            got = other.predict(batch)
        error = relative_error(got, expected)
        taken = facts.ms(lambda batch=batch: other.predict(batch))  # type: ignore[misc]
        facts.tell(what, rows=count, ms=taken, relative_error=error, recordings=other.captured, **more)
        more = {}


def out_of_memory(facts: Facts) -> None:
    """Whether a tick that does not fit comes back with fewer rows, as it comes and over recordings."""
    if facts.dry:
        return
    case = Case(facts, "sdxl")
    capturer: Capturer | None = capturer_for(facts.device.type, graphs=True)
    total = torch.cuda.get_device_properties(0).total_memory
    for recorded in (False, True):
        engine = case.engine(denoiser_of(case.unet(), capturer if recorded else None))
        case.fill(engine, ["Euler"])
        for _ in range(EAGER_PASSES + 2):
            _tick(engine)
        case.fill(engine, ["Euler"] * 8)
        facts.clean()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1.5 * 2**30) / total)
        try:
            report = engine.tick()
            error = str(report.failed[0][1])[:160] if report.failed else None
            facts.tell(
                "out of memory",
                recorded=recorded,
                advanced=len(report.advanced),
                failed=len(report.failed),
                error=error,
            )
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            engine.clear()
        del engine
        facts.clean()
