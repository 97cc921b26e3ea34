"""UNets in bfloat16 on the CPU: as near to float32 as diffusers in bfloat16, with the same noise, alone and in company.

They run on any processor; one that multiplies bfloat16 is only faster. Whatever draws here asks for it by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from config.catalog import Catalog
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image

MODELS = {"SD1.5": (StableDiffusionPipeline, "sd15", 256), "SDXL1.0-base": (StableDiffusionXLPipeline, "sdxl", 512)}
STEPS = 6
IN_COMPANY = 2.0
"""Levels of 255, on average: kernels for other numbers of rows round elsewhere, and bfloat16 has eight bits."""


@pytest.fixture(scope="module")
def rounded(catalog: Catalog) -> Text2Image:
    return Text2Image(catalog, precision="bfloat16")


@pytest.fixture(scope="module")
def exact(catalog: Catalog) -> Text2Image:
    return Text2Image(catalog)


def request(model: str, **fields: Any) -> GenerationParams:
    side = MODELS[model][2]
    common: dict[str, Any] = {"prompt": "a fox", "seed": 3, "steps": STEPS, "sampler": "Euler", "cfg_scale": 5.0}
    return GenerationParams(**(common | {"model_name": model, "width": side, "height": side} | fields))


def values(picture: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(picture, dtype=float)


def diffusers_picture(folder: Path, model: str, dtype: torch.dtype) -> Any:
    pipeline_class, name, side = MODELS[model]
    pipe = pipeline_class.from_pretrained(folder / name, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    generator, size = torch.Generator().manual_seed(3), {"width": side, "height": side}
    return pipe("a fox", num_inference_steps=STEPS, guidance_scale=5.0, generator=generator, **size).images[0]


@pytest.mark.parametrize("model", MODELS)
def test_a_picture_is_as_near_to_float32_as_diffusers_in_bfloat16(
    tiny_models: Path, exact: Text2Image, rounded: Text2Image, model: str
) -> None:
    truth = values(exact.generate(request(model)).image)
    ours = np.abs(values(rounded.generate(request(model)).image) - truth).mean()
    theirs = np.abs(values(diffusers_picture(tiny_models, model, torch.bfloat16)) - truth).mean()
    assert 0 < ours <= theirs


def test_what_is_bfloat16_and_what_is_not(rounded: Text2Image) -> None:
    stage = rounded._plan(request("SD1.5")).stages[0]
    denoiser = rounded.engine(stage).denoiser
    assert isinstance(denoiser, TorchDenoiser)
    assert (denoiser.unet_dtype, denoiser.dtype) == (torch.bfloat16, torch.float32), "latents and noise are float32"
    assert rounded.vae("vae-sd15")._model.dtype == torch.float32
    encoder = rounded.text_encoders("text-encoder-sd15").encode(stage)
    assert encoder.prompt_embeds.dtype == torch.float32


def test_a_picture_in_company_stays_what_it_is_alone(exact: Text2Image, rounded: Text2Image) -> None:
    """Four jobs in shared ticks, one of them with a LoRA: none draws another's picture."""
    requests = [
        request("SD1.5"),
        request("SD1.5", seed=4, sampler="DPM++ 2M"),
        request("SD1.5", seed=5, loras={"Pixel_Art": 0.5}),
        request("SD1.5", seed=6, cfg_scale=1.0),
    ]
    alone = [values(rounded.generate(params).image) for params in requests]
    together = [values(picture.image) for picture in rounded.generate_many(requests)]
    for mine, shared in zip(alone, together, strict=True):
        assert np.abs(mine - shared).mean() <= IN_COMPANY
    with_lora = values(exact.generate(requests[2]).image)
    without = values(exact.generate(request("SD1.5", seed=5)).image)
    assert np.abs(alone[2] - with_lora).mean() < np.abs(without - with_lora).mean(), "the LoRA is drawn"
    assert np.abs(alone[0] - alone[1]).mean() > 4 * IN_COMPANY, "other pictures are other pictures"


def test_controlnets_steer_in_bfloat16_too(exact: Text2Image, rounded: Text2Image, photo: bytes) -> None:
    steered = request("SD1.5", model_name="SD1.5-ControlNet", controlnet_name="canny", controlnet_image=photo)
    truth, plain = values(exact.generate(steered).image), values(exact.generate(request("SD1.5")).image)
    error = np.abs(values(rounded.generate(steered).image) - truth).mean()
    assert 0 < error < np.abs(plain - truth).mean()
