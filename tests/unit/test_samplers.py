"""A sampler that is no diffusers class: a plain Euler, written as k-diffusion writes it, through `SamplerSpec.make`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from config.catalog import Catalog
from config.choices import Choices
from pipelines import planning
from pipelines.plan import GenerationParams, ScheduleSlice
from pipelines.sampling.base import MakeSampler, part_of_schedule
from pipelines.sampling.samplers import SAMPLERS, SamplerSpec
from pipelines.text2image import Text2Image


class PlainEuler:
    """Euler's method on the probability-flow ODE: algorithm 2 of Karras et al. 2022 (arXiv:2206.00364), no churn."""

    order = 1

    def __init__(self, config: Mapping[str, Any], part: ScheduleSlice, seed: int) -> None:
        trained = config["num_train_timesteps"]
        betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, trained) ** 2
        alphas = (1 - betas).cumprod(0)
        every = torch.arange(part.steps).flip(0) * (trained // part.steps) + config["steps_offset"]  # "leading"
        sigmas = torch.cat([((1 - alphas) / alphas).sqrt()[every], torch.zeros(1)])
        ticks = part_of_schedule(every, part, self.order, trained)
        self.timesteps = every[ticks]
        self.init_noise_sigma = float((sigmas[0] ** 2 + 1).sqrt())
        self._sigmas = sigmas[ticks.start :].tolist()  # of each tick, and where the last one ends
        self._done = 0

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return latents + self._sigmas[0] * noise

    def scale_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return latents / (self._sigmas[self._done] ** 2 + 1) ** 0.5

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        sigma, target = self._sigmas[self._done : self._done + 2]
        self._done += 1
        return latents + (target - sigma) * model_output  # the model predicts epsilon, which is dx/dsigma


@pytest.fixture
def text2image(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Text2Image:
    """Every component, and one sampler more."""
    make: MakeSampler = PlainEuler
    monkeypatch.setitem(SAMPLERS, "Plain Euler", SamplerSpec("PlainEuler", make=make))
    monkeypatch.setattr(planning, "SAMPLER_CHOICES", Choices("sampler", SAMPLERS))
    return Text2Image(catalog)


def photo() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((128, 128), 90).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("fields", [{}, {"image": photo(), "strength": 0.6}], ids=["from text", "from a picture"])
def test_a_sampler_of_ones_own_draws_what_diffusers_euler_draws(text2image: Text2Image, fields: dict[str, Any]) -> None:
    common = {"model_name": "SD1.5", "prompt": "a red fox", "width": 128, "height": 128, "steps": 6, "seed": 5} | fields
    own, diffusers = text2image.generate_many(
        [GenerationParams(**common, sampler=name) for name in ("Plain Euler", "Euler")]
    )
    assert own.plan.stages[0].sampler == "Plain Euler"
    pixels = np.asarray(diffusers.image).astype(int)
    assert pixels.std() > 10, "a flat picture proves nothing"
    assert np.abs(np.asarray(own.image) - pixels).max() <= 1
