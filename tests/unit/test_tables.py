"""The tables of samplers: tick by tick what diffusers' own schedulers do, and nothing that only looks like it.

The proof of linearity: every sampler, on the published configurations and on those that predict v, whole schedules,
from a picture, and both sides of a refiner, through the engine with guidance on a UNet that is not linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from pipelines.adapters.store import LoraStore
from pipelines.backends.base import StepBatch
from pipelines.engine.courses import SamplerCourse, TableCourse
from pipelines.engine.engine import StepEngine
from pipelines.families import FAMILIES
from pipelines.plan import LoraUse, ScheduleSlice, StagePlan, TextPlan
from pipelines.planning import REFINER_SHARE
from pipelines.sampling.base import Sampler
from pipelines.sampling.latents import Latents, LatentSpace
from pipelines.sampling.samplers import SAMPLERS, SamplerSpec
from pipelines.sampling.tables import MOST_TICKS, SamplerTables
from pipelines.text.conditioning import Conditioning
from tests.parity.oracle import SCHEDULERS
from tests.support import published

SEED, GUIDANCE = 3, 5.0
SHAPE = (1, 4, 6, 6)
PICTURE = torch.linspace(-1, 1, 4 * 6 * 6).view(SHAPE)
NEAR = 3e-6
"""Of the largest number of a tick: what float32 leaves open in the order of the same sums."""
ZERO_SNR = "v, trailing, zero SNR"
NEAR_AT_ZERO_SNR = 6e-5
"""Three of diffusers' schedulers are so far off themselves there, run in float32 instead of float64 (DPM 2M 2.3e-5)."""
V = {"prediction_type": "v_prediction"}
CONFIGS: dict[str, dict[str, Any]] = {
    **published.SCHEDULERS,
    ZERO_SNR: published.BETAS
    | V
    | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "skip_prk_steps": False},
    "v, linspace": published.BETAS | V | {"timestep_spacing": "linspace"},
}
WALKS: dict[str, list[ScheduleSlice]] = {
    "whole": [ScheduleSlice(steps=12)],
    "from a picture": [ScheduleSlice(steps=10, strength=0.6)],
    "base and refiner": [ScheduleSlice(steps=9, end=REFINER_SHARE), ScheduleSlice(steps=9, start=REFINER_SHARE)],
}


class Tick(NamedTuple):
    """What a UNet was asked, and the latents that followed."""

    timestep: float
    asked: torch.Tensor
    latents: torch.Tensor


def unet(sample: torch.Tensor, timestep: float, row: int) -> torch.Tensor:
    """Of uncond (0) and cond (1): bounded, mixing channels and places, in no way linear."""
    mixed = sample.flip(1).roll(1, -1) * 0.7 + sample
    return torch.tanh(mixed * (1.0 - 0.3 * row)) + 1e-4 * timestep


class Recorder:
    """That UNet as a `Denoiser`. What it returned is spoilt at its next evaluation, as a captured UNet's would be."""

    config: Mapping[str, Any] = {"in_channels": 4, "cross_attention_dim": 8}

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device("cpu"), dtype
        self.asked: list[tuple[float, torch.Tensor]] = []
        self._returned = torch.empty(0)

    def predict(self, batch: StepBatch) -> torch.Tensor:
        self._returned.fill_(float("nan"))
        self.asked.append((float(batch.timesteps[0]), batch.sample[:1].clone()))
        assert torch.equal(batch.sample[::2], batch.sample[1::2]), "uncond and cond see the same"
        rows = zip(batch.sample.split(1), batch.timesteps.tolist(), batch.prompt_embeds[:, 0, 0].tolist(), strict=True)
        self._returned = torch.cat([unet(sample, t, int(row)) for sample, t, row in rows])
        return self._returned

    def padding(self, batch: StepBatch) -> int:
        return 0


def no_lora(use: LoraUse, base: str) -> Any:
    raise AssertionError("these plans have no LoRA")


def make_engine(config: Mapping[str, Any], unet: Recorder, tables: SamplerTables | None = None) -> StepEngine:
    space = LatentSpace(4, 8, 1.0)
    return StepEngine(unet, FAMILIES["sd"], config, space, LoraStore(no_lora), max_rows=64, tables=tables)


CONDITIONING = Conditioning(torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 1, 8))


def make_plan(sampler: str, part: ScheduleSlice, seed: int = SEED) -> StagePlan:
    return StagePlan(
        component="unet",
        backend="torch",
        sampler=sampler,
        schedule=part,
        guidance_scale=GUIDANCE,
        text=TextPlan(encoders=(0,), prompts=("x",), negative_prompts=("",)),
        width=48,
        height=48,
        seed=seed,
    )


def ours(
    sampler: str, config: Mapping[str, Any], parts: Sequence[ScheduleSlice], course: type = TableCourse
) -> tuple[list[Tick], torch.Tensor | None]:
    """Every tick of the engine, and the generator's state at the end."""
    recorder = Recorder()
    engine = make_engine(config, recorder)
    latents = Latents(PICTURE) if parts[0].strength is not None else None
    ticks: list[Tick] = []
    for part in parts:
        job = engine.add(engine.prepare("job", make_plan(sampler, part), CONDITIONING, latents))
        assert isinstance(job.course, course)
        while len(engine):
            report = engine.tick()
            assert not report.failed
            ticks += [Tick(*recorder.asked[-1], job.latents) for job in report.advanced]
            for fetched in report.finished:
                latents = fetched.result()
    assert latents is not None
    return ticks, latents.generator_state


def theirs(
    sampler: str, config: Mapping[str, Any], parts: Sequence[ScheduleSlice]
) -> tuple[list[Tick], torch.Tensor | None]:
    """The same by diffusers: `get_timesteps` of its SDXL pipeline, and the loops of base and refiner written out."""
    generator = torch.Generator().manual_seed(SEED)
    latents = PICTURE
    ticks: list[Tick] = []
    for part in parts:
        name, own = SCHEDULERS[sampler]
        more = {"noise_sampler_seed": SEED} if name == "DPMSolverSDEScheduler" else {}
        scheduler = getattr(diffusers, name).from_config(dict(config), **own, **more)
        scheduler.set_timesteps(part.steps)
        timesteps = scheduler.timesteps
        if part.strength is not None or part.start is not None:
            pipe: Any = SimpleNamespace(scheduler=scheduler)
            timesteps, _ = StableDiffusionXLImg2ImgPipeline.get_timesteps(
                pipe, part.steps, part.strength, "cpu", denoising_start=part.start
            )
            if part.start is None:
                noise = torch.randn(SHAPE, generator=generator)
                latents = scheduler.add_noise(latents, noise, timesteps[:1])
        else:
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
            latents = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
        if part.end is not None:
            timesteps = [t for t in timesteps if t >= round(1000 - part.end * 1000)]
        extra = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        for timestep in timesteps:
            asked = scheduler.scale_model_input(latents, timestep)
            uncond, cond = (unet(asked, float(timestep), row) for row in (0, 1))
            guided = uncond + GUIDANCE * (cond - uncond)
            latents = scheduler.step(guided, timestep, latents, return_dict=False, **extra)[0]
            ticks.append(Tick(float(timestep), asked, latents))
    return ticks, generator.get_state()


def check_near(tensor: torch.Tensor, expected: torch.Tensor, near: float = NEAR) -> None:
    assert (tensor - expected).abs().max() <= near * expected.abs().max()


OFTEN = ("SD2", "SDXL", ZERO_SNR)


@pytest.mark.parametrize(
    "config", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in CONFIGS]
)
@pytest.mark.parametrize("sampler", sorted(SCHEDULERS))
def test_every_tick_is_diffusers(sampler: str, config: str) -> None:
    near = NEAR_AT_ZERO_SNR if config == ZERO_SNR else NEAR
    for parts in WALKS.values():
        ticks, state = ours(sampler, CONFIGS[config], parts)
        expected, their_state = theirs(sampler, CONFIGS[config], parts)
        assert [tick.timestep for tick in ticks] == pytest.approx([tick.timestep for tick in expected])
        for tick, wanted in zip(ticks, expected, strict=True):
            check_near(tick.asked, wanted.asked, near)
            check_near(tick.latents, wanted.latents, near)
        assert state is not None
        assert their_state is not None
        assert torch.equal(state, their_state), "the next stage draws the same noise"


def test_jobs_of_every_sampler_advance_in_one_product() -> None:
    """All in the same ticks, leaving one by one: each as it is alone."""
    config = published.SCHEDULERS["SDXL"]
    engine = make_engine(config, Recorder())
    part = ScheduleSlice(steps=6)
    for sampler in SCHEDULERS:
        engine.add(engine.prepare(sampler, make_plan(sampler, part), CONDITIONING, None))
    together: dict[str, torch.Tensor] = {}
    while len(engine):
        together |= {fetched.job.id: fetched.result().values for fetched in engine.tick().finished}
    for sampler in SCHEDULERS:
        alone, _ = ours(sampler, config, [part])
        check_near(together[sampler], alone[-1].latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sampler", [name for name in sorted(SCHEDULERS) if "SDE" in name or name.endswith((" a", "M"))]
)
def test_noise_is_drawn_in_the_samplers_own_order_and_format(sampler: str, dtype: torch.dtype) -> None:
    """Half precision draws other numbers from a generator than float32, and some schedulers always draw float32."""
    part = ScheduleSlice(steps=5)
    table = SamplerTables(published.SCHEDULERS["SDXL"]).get(sampler, part)
    assert table is not None
    generator = torch.Generator().manual_seed(SEED)
    drawn = list(table.draw(SHAPE, dtype, generator, SEED))
    with Drawn() as recorded:
        own = torch.Generator().manual_seed(SEED)
        name, settings = SCHEDULERS[sampler]
        more = {"noise_sampler_seed": SEED} if name == "DPMSolverSDEScheduler" else {}
        scheduler = getattr(diffusers, name).from_config(published.SCHEDULERS["SDXL"], **settings, **more)
        scheduler.set_timesteps(part.steps)
        latents = PICTURE.to(dtype)
        extra = {"generator": own} if "generator" in scheduler.step.__code__.co_varnames else {}
        for timestep in scheduler.timesteps:
            output = scheduler.scale_model_input(latents, timestep) * 0.1
            latents = scheduler.step(output, timestep, latents, return_dict=False, **extra)[0]
    if not more:  # a tree's own draws are not its noise
        assert [noise.dtype for noise in drawn] == [noise.dtype for noise in recorded.noise]
        assert all(map(torch.equal, drawn, recorded.noise))
    assert torch.equal(generator.get_state(), own.get_state())


class Drawn(torch.overrides.TorchFunctionMode):
    """Keeps what is drawn of the latents' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.noise: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.randn and tuple(result.shape) == SHAPE:
            self.noise.append(result)
        return result


UNFIT = {
    "clipping": ("DDIM", {"clip_sample": True}),
    "clipping of an SDE": ("DDPM", {"clip_sample": True}),
    "thresholding": ("DPM++ 2M", {"thresholding": True}),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_scheduler_that_is_not_linear_keeps_its_own_steps(what: str) -> None:
    sampler, more = UNFIT[what]
    config = published.SCHEDULERS["SDXL"] | more
    ticks, state = ours(sampler, config, WALKS["whole"], course=SamplerCourse)
    expected, their_state = theirs(sampler, config, WALKS["whole"])
    check_near(ticks[-1].latents, expected[-1].latents)
    assert state is not None
    assert their_state is not None
    assert torch.equal(state, their_state)


def test_a_long_schedule_keeps_its_own_steps() -> None:
    tables = SamplerTables(published.SCHEDULERS["SDXL"])
    assert tables.get("Euler", ScheduleSlice(steps=MOST_TICKS)) is not None
    assert tables.get("Euler", ScheduleSlice(steps=MOST_TICKS + 1)) is None


class Own:
    """A sampler of one's own: each step takes a tenth of the model output away."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], part: ScheduleSlice, seed: int) -> None:
        self.timesteps = torch.arange(part.steps, 0, -1)
        self.kept: Any = None
        self.generator = torch.Generator().manual_seed(seed)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return latents + noise

    def scale_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return latents

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        return latents - 0.1 * model_output


Step = Callable[[Own, torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]


def remembers(own: Own, output: torch.Tensor, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """In a corner where it has to be looked for."""
    before = own.kept["deep"].outputs[0] if own.kept else 0
    own.kept = {"deep": SimpleNamespace(outputs=(output,))}
    return latents - 0.1 * output - 0.05 * before


def remembers_unseen(own: Own, output: torch.Tensor, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    before = own.kept(0) if own.kept else 0
    own.kept = lambda _: output
    return latents - 0.1 * output - 0.05 * before


def draws_twice(own: Own, output: torch.Tensor, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    first, second = (torch.randn(latents.shape, generator=generator, dtype=latents.dtype) for _ in range(2))
    return latents - 0.1 * output + 0.1 * first + 0.1 * second


def draws_a_number(own: Own, output: torch.Tensor, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return latents - 0.1 * output * torch.rand((), generator=generator, dtype=latents.dtype)


def draws_elsewhere(own: Own, output: torch.Tensor, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return latents - 0.1 * output + 0.1 * torch.randn(latents.shape, generator=own.generator, dtype=latents.dtype)


FITTING: dict[str, Step] = {
    "plain": lambda own, output, latents, generator: latents - 0.1 * output,
    "in place": lambda own, output, latents, generator: latents.clone().sub_(output, alpha=0.1),
    "remembers": remembers,
    "draws": lambda own, output, latents, generator: (
        latents - 0.1 * output + torch.randn(latents.shape, generator=generator, dtype=latents.dtype)
    ),
}
MISFIT: dict[str, Step] = {
    "clips what is large": lambda own, output, latents, generator: (latents - 0.1 * output).clamp(-100, 100),
    "cuts off what is small": lambda own, output, latents, generator: torch.where(
        output.abs() < 0.05, latents, latents - 0.1 * output
    ),
    "adds": lambda own, output, latents, generator: latents - 0.1 * output + 1e-3,
    "multiplies": lambda own, output, latents, generator: latents - 0.1 * output * latents,
    "takes the mean of the picture": lambda own, output, latents, generator: (
        latents - 0.1 * (output - output.mean(dim=(2, 3), keepdim=True))
    ),
    "mixes channels": lambda own, output, latents, generator: latents - 0.1 * output.flip(1),
    "treats channels unlike": lambda own, output, latents, generator: (
        latents - output * torch.tensor([0.1, 0.2, 0.1, 0.1], dtype=output.dtype).view(1, 4, 1, 1)
    ),
    "normalises": lambda own, output, latents, generator: latents / (latents.std() + 1) - 0.1 * output,
    "not finite": lambda own, output, latents, generator: latents - float("inf") * output,
    "remembers unseen": remembers_unseen,
    "draws twice": draws_twice,
    "draws a number": draws_a_number,
    "draws elsewhere": draws_elsewhere,
    "fails on the probe": lambda own, output, latents, generator: (
        latents - 0.1 * output + torch.zeros(SHAPE)  # latents of this size alone
    ),
}


@pytest.fixture
def own_sampler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Step], None]:
    """Makes "own" a sampler that steps as it is told."""

    def take(step: Step) -> None:
        def own_step(
            own: Own, output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
        ) -> torch.Tensor:
            return step(own, output, latents, generator)

        monkeypatch.setattr(Own, "step", own_step)
        monkeypatch.setitem(SAMPLERS, "own", SamplerSpec("Own", make=Own))

    return take


def by_itself() -> torch.Tensor:
    """What the sampler draws in a plain loop."""
    generator = torch.Generator().manual_seed(SEED)
    sampler: Sampler = Own({}, WALKS["whole"][0], SEED)
    latents = torch.randn(SHAPE, generator=generator)
    for timestep in sampler.timesteps:
        uncond, cond = (unet(sampler.scale_input(latents, timestep), float(timestep), row) for row in (0, 1))
        latents = sampler.step(uncond + GUIDANCE * (cond - uncond), timestep, latents, generator)
    return latents


@pytest.mark.parametrize("what", FITTING)
def test_a_sampler_of_ones_own_becomes_a_table(own_sampler: Callable[[Step], None], what: str) -> None:
    own_sampler(FITTING[what])
    ticks, _ = ours("own", {}, WALKS["whole"])
    check_near(ticks[-1].latents, by_itself())


@pytest.mark.parametrize("what", MISFIT)
def test_one_that_only_looks_like_a_table_keeps_its_own_steps(own_sampler: Callable[[Step], None], what: str) -> None:
    own_sampler(MISFIT[what])
    assert SamplerTables({}).get("own", WALKS["whole"][0]) is None
    if what != "not finite":
        ticks, _ = ours("own", {}, WALKS["whole"], course=SamplerCourse)
        check_near(ticks[-1].latents, by_itself())


def test_a_table_is_read_once() -> None:
    tables = SamplerTables(published.SCHEDULERS["SDXL"])
    part = ScheduleSlice(steps=7)
    assert tables.get("Euler", part) is tables.get("Euler", ScheduleSlice(steps=7))
    assert tables.get("Euler", part) is not tables.get("Euler", ScheduleSlice(steps=7, end=0.5))


def test_preparing_stops_when_nobody_waits() -> None:
    engine = make_engine(published.SCHEDULERS["SDXL"], Recorder())
    asked: list[bool] = []

    def wanted() -> bool:
        asked.append(len(asked) < 4)
        return asked[-1]

    with pytest.raises(CancelledError):
        engine.prepare("job", make_plan("DPM SDE", ScheduleSlice(steps=20)), CONDITIONING, None, wanted=wanted)
    assert len(asked) == 5, "in the middle of its noise"
    assert len(engine) == 0
