"""Plans through the engine on a stand-in UNet: every sampler, schedule, strength and refiner split ends in latents.

Beside each, diffusers' schedulers in the loop of its own pipelines: the same timesteps, and the same numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.adapters.layers import Adapter
from pipelines.adapters.store import LoraStore
from pipelines.engine.engine import StepEngine
from pipelines.errors import NonFiniteError
from pipelines.families import FAMILIES
from pipelines.plan import LoraUse, ScheduleSlice, StagePlan, TextPlan
from pipelines.planning import REFINER_SHARE
from pipelines.sampling.latents import Latents, LatentSpace
from pipelines.sampling.samplers import SAMPLERS
from pipelines.text.conditioning import Conditioning
from tests.parity.oracle import SCHEDULERS
from tests.support.gaussian import SCHEDULE, STD, GaussianDenoiser

SEED = 3
PICTURE = torch.linspace(-1, 1, 16).view(1, 4, 2, 2)
SPACINGS = ("leading", "trailing", "linspace")


def no_lora(use: LoraUse, base: str) -> Adapter:
    raise AssertionError("these plans have no LoRA")


def config_of(spacing: str, predicts: str, zero_snr: bool = False, skip_prk: bool = True) -> dict[str, Any]:
    more = {"timestep_spacing": spacing, "prediction_type": predicts, "rescale_betas_zero_snr": zero_snr}
    return SCHEDULE | more | {"steps_offset": 1, "skip_prk_steps": skip_prk}


CONFIGS = [
    config_of(spacing, predicts, zero_snr, skip)
    for spacing, predicts, zero_snr, skip in itertools.product(
        SPACINGS, ("epsilon", "v_prediction"), (False, True), (False, True)
    )
    if predicts == "v_prediction" or not zero_snr  # at zero signal-to-noise the noise tells nothing of the picture
]


def slices(steps: int, strength: float | None, refined: bool) -> list[ScheduleSlice]:
    """The stages' parts of the schedule, as `planning.make_plan` cuts them."""
    if not refined:
        return [ScheduleSlice(steps=steps, strength=strength)]
    base = ScheduleSlice(steps=steps, strength=strength, end=REFINER_SHARE)
    return [base, ScheduleSlice(steps=steps, start=REFINER_SHARE)]


def ours(sampler: str, config: dict[str, Any], parts: Sequence[ScheduleSlice]) -> tuple[torch.Tensor, list[float]]:
    """The latents, and the timesteps the UNet was asked about."""
    unet = GaussianDenoiser(config["prediction_type"])
    engine = StepEngine(unet, FAMILIES["sd"], config, LatentSpace(4, 8, 1.0), LoraStore(no_lora))
    latents = Latents(PICTURE) if parts[0].strength is not None else None
    for part in parts:
        plan = StagePlan(
            component="unet",
            backend="torch",
            sampler=sampler,
            schedule=part,
            guidance_scale=1.0,
            text=TextPlan(encoders=(0,), prompts=("x",), negative_prompts=None),
            width=16,
            height=16,
            seed=SEED,
        )
        engine.add(engine.prepare("job", plan, Conditioning(torch.zeros(1, 1, 8)), latents))
        while len(engine):
            report = engine.tick()
            for _, error in report.failed:
                raise error
            assert all(job.latents.shape == PICTURE.shape for job in report.advanced)
            for fetched in report.finished:
                latents = fetched.result()
    assert latents is not None
    return latents.values, unet.asked


def theirs(sampler: str, config: dict[str, Any], parts: Sequence[ScheduleSlice]) -> tuple[torch.Tensor, list[float]]:
    """The same by diffusers: `get_timesteps` of its SDXL pipeline, and the loops of base and refiner written out."""
    unet = GaussianDenoiser(config["prediction_type"])
    generator = torch.Generator().manual_seed(SEED)
    latents = PICTURE
    for part in parts:
        name, own = SCHEDULERS[sampler]
        more: dict[str, Any] = {"noise_sampler_seed": SEED} if name == "DPMSolverSDEScheduler" else {}
        more |= {"skip_prk_steps": True} if name == "PNDMScheduler" and part.steps < 4 else {}
        scheduler = getattr(diffusers, name).from_config(config, **own, **more)
        scheduler.set_timesteps(part.steps)
        timesteps = scheduler.timesteps
        if part.strength is not None or part.start is not None:
            pipe: Any = SimpleNamespace(scheduler=scheduler)
            timesteps, _ = StableDiffusionXLImg2ImgPipeline.get_timesteps(
                pipe, part.steps, part.strength, "cpu", denoising_start=part.start
            )
            if part.start is None:
                noise = torch.randn(PICTURE.shape, generator=generator)
                latents = scheduler.add_noise(latents, noise, timesteps[:1])
        else:
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
            latents = torch.randn(PICTURE.shape, generator=generator) * scheduler.init_noise_sigma
        if part.end is not None:
            timesteps = [t for t in timesteps if t >= round(1000 - part.end * 1000)]
        extra = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
        for timestep in timesteps:
            unet.asked.append(float(timestep))
            output = unet.of(scheduler.scale_model_input(latents, timestep), float(timestep))
            latents = scheduler.step(output, timestep, latents, return_dict=False, **extra)[0]
    return latents, unet.asked


def check(sampler: str, config: dict[str, Any], parts: Sequence[ScheduleSlice]) -> None:
    latents, asked = ours(sampler, config, parts)
    expected, timesteps = theirs(sampler, config, parts)
    assert asked, "something is always left to do"
    assert latents.isfinite().all()
    if -1.0 in timesteps and sampler in ("DDIM", "DDPM", "PNDM"):  # see DiffusersSampler: diffusers draws grey there
        assert asked == [timestep for timestep in timesteps if timestep >= 0]
        return
    assert asked == pytest.approx(timesteps)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    sampler=st.sampled_from(sorted(SCHEDULERS)),
    config=st.sampled_from(CONFIGS),
    steps=st.integers(1, 12) | st.sampled_from([20, 25, 28, 30, 36, 50]),
    strength=st.none() | st.floats(0.02, 1),
    refined=st.booleans(),
)
def test_every_plan_ends_as_diffusers_does(
    sampler: str, config: dict[str, Any], steps: int, strength: float | None, refined: bool
) -> None:
    if strength is not None and int(steps * strength) < 1:
        strength = 1.0  # planning refuses it
    check(sampler, config, slices(steps, strength, refined))


@pytest.mark.parametrize("sampler", sorted(SCHEDULERS))
@pytest.mark.parametrize(("steps", "strength"), [(10, 0.1), (10, 0.2), (30, 0.05), (30, 0.25)])
def test_a_base_left_without_ticks_is_skipped_and_the_refiner_goes_on(
    sampler: str, steps: int, strength: float
) -> None:
    check(sampler, config_of("leading", "epsilon"), slices(steps, strength, refined=True))


@pytest.mark.parametrize("sampler", [name for name in sorted(SCHEDULERS) if "Karras" in name])
@pytest.mark.parametrize("steps", [20, 25, 28, 30, 50])
def test_two_equal_first_timesteps(sampler: str, steps: int) -> None:
    """Karras' noise levels on a schedule that begins at zero signal-to-noise."""
    check(sampler, config_of("leading", "v_prediction", zero_snr=True), slices(steps, None, refined=False))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_pndm_with_fewer_steps_than_its_runge_kutta_start(spacing: str, steps: int) -> None:
    check("PNDM", config_of(spacing, "epsilon", skip_prk=False), slices(steps, None, refined=False))


@pytest.mark.parametrize("sampler", ["DDIM", "DDPM", "PNDM", "Euler", "DPM++ 2M"])
@pytest.mark.parametrize("steps", [61, 103])
def test_a_schedule_that_rounds_to_one_timestep_too_many(sampler: str, steps: int) -> None:
    config = config_of("trailing", "v_prediction")
    check(sampler, config, slices(steps, None, refined=False))
    assert float(ours(sampler, config, slices(steps, None, False))[0].std()) > STD / 2, "not grey"


def test_values_that_are_not_finite_never_become_a_picture() -> None:
    """More steps than the sampler's limit, past planning: equal noise levels, so a division by zero."""
    part = ScheduleSlice(steps=SAMPLERS["DPM 2M"].max_steps + 1)
    with pytest.raises(NonFiniteError, match="sampler 'DPM 2M' with 769 steps: the latents have values that are not"):
        ours("DPM 2M", config_of("trailing", "epsilon"), [part])


@pytest.mark.slow
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", sorted(SCHEDULERS))
def test_every_sampler_draws_at_its_limit(sampler: str, spacing: str) -> None:
    limit = SAMPLERS[sampler].max_steps
    for steps in {limit, limit - 1}:
        latents, _ = ours(sampler, config_of(spacing, "epsilon"), [ScheduleSlice(steps=steps)])
        assert latents.isfinite().all()
