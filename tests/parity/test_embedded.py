"""The shipped models in the graph's engine and in diffusers' own pipelines: the same picture."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from config.catalog import ROOT, Catalog
from pipelines.control.annotators import canny
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.parity.test_pictures import assert_same

MODELS = ROOT / "models"
SD = ("sd15", StableDiffusionPipeline, 512)
XL = ("sdxl", StableDiffusionXLPipeline, 1024)
PIPELINES: dict[str, tuple[tuple[str, Any, int], str | None]] = {
    "SD1.5": (SD, None),
    "SD2": (SD, None),
    "SDXL1.0-base": (XL, None),
    "SSD": (XL, "ssd"),
    "SDXL-turbo": (XL, "sdxl-turbo"),
}


@pytest.fixture(scope="module")
def text2image() -> Text2Image:
    return Text2Image(Catalog.load("embedded"))


def pipeline(kind: tuple[str, Any, int], **parts: Any) -> Any:
    folder, pipeline_class, _ = kind
    pipe = pipeline_class.from_pretrained(MODELS / folder, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++", solver_type="heun", use_karras_sigmas=True
    )
    return pipe


def draw(pipe: Any, side: int, **arguments: Any) -> np.ndarray:
    common = {"num_inference_steps": 8, "guidance_scale": 5.0, "width": side, "height": side}
    made = pipe("a cat in the snow", generator=torch.Generator().manual_seed(3), **(common | arguments))
    return np.asarray(made.images[0])


@pytest.mark.parametrize("model", PIPELINES)
def test_shipped_weights_draw_what_diffusers_draws(text2image: Text2Image, model: str) -> None:
    kind, unet = PIPELINES[model]
    parts = {"unet": UNet2DConditionModel.from_pretrained(MODELS / unet / "unet").float()} if unet else {}
    pipe, changes = pipeline(kind, **parts), {}
    if model == "SDXL-turbo":
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        changes = {"num_inference_steps": 4, "guidance_scale": 0.0}
    steps = {} if changes else {"steps": 8}
    params = GenerationParams(model_name=model, prompt="a cat in the snow", seed=3, **steps)
    assert_same(text2image.generate(params).image, draw(pipe, kind[2], **changes))


@pytest.mark.parametrize("model", ["SD1.5-ControlNet", "SDXL-ControlNet"])
def test_the_shipped_controlnets(text2image: Text2Image, photo: bytes, model: str) -> None:
    kind: tuple[str, Any, int] = ("sd15", StableDiffusionControlNetPipeline, 512)
    if model.startswith("SDXL"):
        kind = ("sdxl", StableDiffusionXLControlNetPipeline, 1024)
    net = ControlNetModel.from_pretrained(MODELS / f"controlnet-canny-{kind[0]}").float()
    image = Image.open(io.BytesIO(photo)).convert("RGB").resize((kind[2], kind[2]), Image.Resampling.LANCZOS)
    expected = draw(pipeline(kind, controlnet=net), kind[2], image=canny(image))
    control = {"controlnet_name": "canny", "controlnet_image": photo}
    params = GenerationParams(model_name=model, prompt="a cat in the snow", seed=3, steps=8, **control)
    assert_same(text2image.generate(params).image, expected)


@pytest.mark.parametrize("model", ["SD1.5", "SDXL1.0-base"])
def test_the_shipped_lora(text2image: Text2Image, model: str) -> None:
    kind = PIPELINES[model][0]
    pipe = pipeline(kind)
    pipe.load_lora_weights(MODELS / f"lora-pixel-art-{kind[0]}")
    expected = draw(pipe, kind[2], cross_attention_kwargs={"scale": 0.8})
    params = GenerationParams(model_name=model, prompt="a cat in the snow", seed=3, steps=8, loras={"Pixel_Art": 0.8})
    assert_same(text2image.generate(params).image, expected)


def test_the_shipped_refiner_leaves_the_picture_whole(text2image: Text2Image) -> None:
    """Its parity is proved on tiny models; the trained one must not spoil what the base drew."""
    fields: dict[str, Any] = {"model_name": "SDXL1.0-base", "prompt": "a cat in the snow", "seed": 3}
    base, refined = (
        np.asarray(text2image.generate(GenerationParams(**fields, enable_refiner=on)).image).astype(int)
        for on in (False, True)
    )
    assert 0 < np.abs(base - refined).mean() < 12
