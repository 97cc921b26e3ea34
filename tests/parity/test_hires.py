"""A second pass equals two calls of diffusers' pipelines, one after the other, alone and among other requests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from config.catalog import Catalog
from config.upscalers import LATENT_METHODS
from pipelines.enlargement import HiresParams
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.parity import oracle
from tests.support.upscalers import FILE, X4, by_spandrel, with_upscalers

FIRST = {"SD1.5": (128, 192), "SDXL1.0-base": (256, 128)}
PICTURES = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}
HIRES: dict[str, Any] = {"scale": 2, "steps": 3, "strength": 0.6, "upscaler": "latent"}
WHOLE = 5
"""Steps of the schedule of which strength 0.6 leaves HIRES' three."""


@pytest.fixture(scope="module")
def text2image(catalog: Catalog, tiny_models: Path) -> Text2Image:
    return Text2Image(with_upscalers(catalog, tiny_models))


def fields(model: str, **changes: Any) -> dict[str, Any]:
    width, height = FIRST[model]
    base = {"model_name": model, "prompt": "a fox", "negative_prompt": "fog", "width": width, "height": height}
    return base | {"seed": 5, "steps": 3, "cfg_scale": 4.0, "sampler": "Euler a", "hires": HIRES} | changes


def ours(text2image: Text2Image, *requests: dict[str, Any]) -> list[np.ndarray]:
    params = [GenerationParams(**r | {"hires": HiresParams(**r["hires"]) if r["hires"] else None}) for r in requests]
    return [np.asarray(picture.image).astype(int) for picture in text2image.generate_many(params)]


def expected(request: dict[str, Any], whole: int = WHOLE, scale: float = 2, **first: Any) -> np.ndarray:
    """The picture of diffusers' text pipeline, enlarged by torch or Pillow, through its image pipeline."""
    request = dict(request)
    hires, refined = request.pop("hires"), request.pop("enable_refiner", False)
    folder, text_class, image_class = oracle.PIPELINES[request["model_name"]]
    shared = {"guidance_scale": request["cfg_scale"], "prompt": request["prompt"]}
    shared["negative_prompt"] = request["negative_prompt"]
    size = (round(request["width"] * scale), round(request["height"] * scale))

    def scheduled(folder: str, pipeline: Any) -> Any:
        return oracle._scheduled(oracle.pipeline(folder, pipeline), request["sampler"], request["seed"])

    latent = hires["upscaler"] in LATENT_METHODS
    if request.get("image"):
        picture = Image.open(io.BytesIO(request["image"])).convert("RGB")
        picture = picture.resize((request["width"], request["height"]), Image.Resampling.LANCZOS)
        first |= {"image": picture, "strength": request["strength"]}
    else:
        first |= {"width": request["width"], "height": request["height"]}
    pipe = scheduled(folder, image_class if request.get("image") else text_class)
    drawn = pipe(
        **shared | first,
        num_inference_steps=request["steps"],
        generator=torch.Generator().manual_seed(request["seed"]),
        output_type="latent" if latent else "pil",
    ).images
    if latent:
        mode, antialias = LATENT_METHODS[hires["upscaler"]]
        ratio = drawn.shape[-1] / request["width"]
        shape = (round(size[1] * ratio), round(size[0] * ratio))
        image = torch.nn.functional.interpolate(drawn, shape, mode=mode, antialias=antialias)
    elif hires["upscaler"] == X4:  # larger than it need be, so Lanczos comes after
        larger = by_spandrel(oracle.TINY / "upscaler-x4" / FILE, drawn[0])
        image = larger.resize(size, Image.Resampling.LANCZOS)
    else:
        image = drawn[0].resize(size, PICTURES[hires["upscaler"]])
    generator = torch.Generator().manual_seed(request["seed"])
    second = {"num_inference_steps": whole, "generator": generator} | shared
    ending = {"denoising_end": 0.8, "output_type": "latent"} if refined else {}
    result = scheduled(folder, image_class)(image=image, strength=hires["strength"], **second | ending).images
    if refined:
        refiner = scheduled("sdxl-refiner", StableDiffusionXLImg2ImgPipeline)
        result = refiner(image=result, denoising_start=0.8, **second).images
    return np.asarray(result[0]).astype(int)


def check(drawn: np.ndarray, wanted: np.ndarray, upscaler: str = "latent") -> None:
    """Within 1/255. A picture between the passes is rounded to 8 bits, by diffusers too: where a last bit decides
    which way, the second pass begins 1/255 apart, which untrained weights can make more at single pixels.
    """
    assert drawn.shape == wanted.shape
    apart = np.abs(drawn - wanted)
    if upscaler in LATENT_METHODS:
        assert apart.max() <= 1
    else:
        assert apart.max() <= 4
        assert (apart > 1).mean() < 1e-3


def test_latents_a_picture_and_a_model(text2image: Text2Image) -> None:
    """Beside those of the tests below; `tests/unit/test_second_pass.py` has every interpolation."""
    ways = [("SD1.5", "latent-bicubic-antialiased"), ("SD1.5", "nearest"), ("SD1.5", X4), ("SDXL1.0-base", X4)]
    requests = [fields(model, hires=HIRES | {"upscaler": upscaler}) for model, upscaler in ways]
    for request, picture in zip(requests, ours(text2image, *requests), strict=True):
        check(picture, expected(request), request["hires"]["upscaler"])


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_the_refiner_draws_in_the_second_pass_alone(text2image: Text2Image, upscaler: str) -> None:
    request = fields("SDXL1.0-base", enable_refiner=True, hires=HIRES | {"upscaler": upscaler})
    check(ours(text2image, request)[0], expected(request), request["hires"]["upscaler"])


def test_after_a_sent_picture(text2image: Text2Image, photo: bytes) -> None:
    request = fields("SD1.5", image=photo, strength=0.7, hires=HIRES | {"upscaler": "lanczos"})
    check(ours(text2image, request)[0], expected(request), request["hires"]["upscaler"])


def test_different_requests_share_ticks(text2image: Text2Image) -> None:
    """Each picture is the one that it would be alone; some have no second pass, and all sizes differ."""
    requests = [
        fields("SD1.5", seed=1),
        fields("SD1.5", seed=2, sampler="Heun", hires=HIRES | {"upscaler": "lanczos"}),
        fields("SD1.5", seed=3, sampler="DPM++ 2M SDE Karras", hires=HIRES | {"upscaler": "latent-nearest"}),
        fields("SD1.5", seed=4, width=256, height=384, hires=None),
        fields("SD1.5", seed=5, sampler="DDIM", cfg_scale=1.0, hires=HIRES | {"scale": 1.5}),
        fields("SD1.5", seed=6, steps=4, hires=HIRES | {"steps": None, "strength": 1.0}),
        fields("SDXL1.0-base", seed=7, steps=3, sampler="UniPC 2M"),
    ]
    drawn = ours(text2image, *requests)
    for request, picture in zip(requests, drawn, strict=True):
        if request["hires"] is None:
            plain = {name: value for name, value in request.items() if name != "hires"}
            check(picture, oracle.draw(**plain).astype(int))
        else:
            whole = 4 if request["hires"]["steps"] is None else WHOLE
            check(picture, expected(request, whole, request["hires"]["scale"]), request["hires"]["upscaler"])


def test_a_controlnet_steers_both_passes_by_a_map_of_each_size(
    text2image: Text2Image, tiny_models: Path, photo: bytes
) -> None:
    hires = HIRES | {"upscaler": "lanczos"}
    steered = {"controlnet_name": "canny", "controlnet_image": photo, "controlnet_preprocess": False}
    request = fields("SD1.5", hires=hires, sampler="Euler") | steered | {"model_name": "SD1.5-ControlNet"}
    sent = Image.open(io.BytesIO(photo)).convert("RGB")
    net = ControlNetModel.from_pretrained(tiny_models / "controlnet-sd15-canny")
    base = oracle.pipeline(*oracle.PIPELINES["SD1.5"][:2])

    def draw(pipeline: Any, size: tuple[int, int], **given: Any) -> Any:
        pipe = pipeline(**base.components, controlnet=net, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = EulerDiscreteScheduler.from_config(base.default_scheduler_config)
        shared = {
            "prompt": "a fox",
            "negative_prompt": "fog",
            "guidance_scale": 4.0,
            "controlnet_conditioning_scale": 1.0,
        }
        control = sent.resize(size, Image.Resampling.LANCZOS)
        maps = {"control_image" if "image" in given else "image": control}
        return pipe(**shared | maps | given, generator=torch.Generator().manual_seed(5)).images[0]

    first = draw(StableDiffusionControlNetPipeline, (128, 192), num_inference_steps=3)
    larger = first.resize((256, 384), Image.Resampling.LANCZOS)
    steps = {"num_inference_steps": WHOLE, "strength": 0.6}
    wanted = draw(StableDiffusionControlNetImg2ImgPipeline, larger.size, image=larger, **steps)
    check(ours(text2image, request)[0], np.asarray(wanted).astype(int), "lanczos")
