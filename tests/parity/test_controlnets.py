"""ControlNets against diffusers: plain and union, from text and from a picture, before the refiner, in a batch."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, EulerDiscreteScheduler
from PIL import Image

from pipelines.errors import InvalidValueError
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.parity import oracle
from tests.parity.test_pictures import assert_same, request

SD, XL, PLAIN_XL = "SD1.5-ControlNet", "SDXL-ControlNet", "plain"
PIPELINES = {
    SD: ("StableDiffusionControlNetPipeline", "StableDiffusionControlNetImg2ImgPipeline"),
    XL: ("StableDiffusionXLControlNetUnionPipeline", "StableDiffusionXLControlNetUnionImg2ImgPipeline"),
    PLAIN_XL: ("StableDiffusionXLControlNetPipeline", "StableDiffusionXLControlNetImg2ImgPipeline"),
}
MODES = {"openpose": 0, "depth": 1, "softedge": 2, "canny": 3}


def control_map(data: bytes, side: int, canny: bool) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    if not canny:
        return image
    return Image.fromarray(cv2.Canny(np.asarray(image), 100, 200)).convert("RGB")


def draw(
    tiny: Path,
    model: str,
    name: str,
    control: Image.Image,
    image: bytes | None = None,
    enable_refiner: bool = False,
    **fields: Any,
) -> np.ndarray:
    """The picture of diffusers' own ControlNet pipeline, followed by its refiner."""
    union, sd = model == XL, model == SD
    folder = {SD: f"controlnet-sd15-{'canny' if name == 'canny' else 'soft'}", XL: "controlnet-sdxl-union"}
    net_class = ControlNetUnionModel if union else ControlNetModel
    net = net_class.from_pretrained(tiny / folder.get(model, "controlnet-sdxl"))
    base = oracle.pipeline(*oracle.PIPELINES["SD1.5" if sd else "SDXL1.0-base"][:2])
    extra: dict[str, Any] = {"requires_safety_checker": False} if sd else {"add_watermarker": False}
    pipe = getattr(diffusers, PIPELINES[model][image is not None])(**base.components, controlnet=net, **extra)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(base.default_scheduler_config)
    generator = torch.Generator().manual_seed(fields["seed"])
    arguments: dict[str, Any] = {
        "prompt": fields["prompt"],
        "num_inference_steps": fields["steps"],
        "guidance_scale": fields["cfg_scale"],
        "generator": generator,
        "controlnet_conditioning_scale": 1.0,
    }
    if union:
        arguments["control_mode"] = [MODES[name]]
    if image is None:
        arguments |= {"width": control.width, "height": control.height, "control_image" if union else "image": control}
    else:
        picture = control_map(image, control.width, canny=False)
        arguments |= {"image": picture, "control_image": control, "strength": fields["strength"]}
    if enable_refiner:
        arguments |= {"denoising_end": 0.8, "output_type": "latent"}
    result = pipe(**arguments).images
    if enable_refiner:
        refiner = oracle.pipeline("sdxl-refiner", diffusers.StableDiffusionXLImg2ImgPipeline)
        refiner.scheduler = EulerDiscreteScheduler.from_config(refiner.default_scheduler_config)
        same = {k: arguments[k] for k in ("prompt", "num_inference_steps", "guidance_scale", "generator")}
        result = refiner(image=result, denoising_start=0.8, **same).images
    return np.asarray(result[0])


@pytest.mark.parametrize("cfg_scale", [1.0, 5.0])
@pytest.mark.parametrize("name", ["canny", "softedge"])
@pytest.mark.parametrize("model", [SD, XL, PLAIN_XL])
def test_from_text(
    text2image: Text2Image,
    plain_xl: Text2Image,
    tiny_models: Path,
    photo: bytes,
    model: str,
    name: str,
    cfg_scale: float,
) -> None:
    ours = plain_xl if model == PLAIN_XL else text2image
    fields = request("SD1.5" if model == SD else "SDXL1.0-base", sampler="Euler", steps=4, cfg_scale=cfg_scale)
    fields["model_name"] = XL if model == PLAIN_XL else model
    canny = name == "canny"
    control = {"controlnet_name": name, "controlnet_image": photo, "controlnet_preprocess": canny}
    drawn = ours.generate(GenerationParams(**fields, **control)).image
    assert_same(drawn, draw(tiny_models, model, name, control_map(photo, fields["width"], canny), **fields))
    plain = ours.generate(GenerationParams(**fields | {"model_name": "SD1.5" if model == SD else "SDXL1.0-base"})).image
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(plain)).mean() > 1, "the ControlNet must show"


@pytest.mark.parametrize("model", [SD, XL, PLAIN_XL])
def test_from_a_picture(
    text2image: Text2Image, plain_xl: Text2Image, tiny_models: Path, photo: bytes, model: str
) -> None:
    ours = plain_xl if model == PLAIN_XL else text2image
    fields = request("SD1.5" if model == SD else "SDXL1.0-base", sampler="Euler", steps=6, strength=0.6, image=photo)
    fields["model_name"] = XL if model == PLAIN_XL else model
    drawn = ours.generate(GenerationParams(**fields, controlnet_name="canny", controlnet_image=photo)).image
    assert_same(drawn, draw(tiny_models, model, "canny", control_map(photo, fields["width"], canny=True), **fields))


@pytest.mark.parametrize("model", [XL, PLAIN_XL])
def test_the_refiner_follows(
    text2image: Text2Image, plain_xl: Text2Image, tiny_models: Path, photo: bytes, model: str
) -> None:
    """The ControlNet steers the base's stage; the refiner runs as after a plain base."""
    ours = plain_xl if model == PLAIN_XL else text2image
    fields = request("SDXL1.0-base", sampler="Euler", steps=10, enable_refiner=True)
    control = {"model_name": XL, "controlnet_name": "canny", "controlnet_image": photo}
    refined = ours.generate(GenerationParams(**fields | control))
    assert [len(stage.controls) for stage in refined.plan.stages] == [1, 0]
    canny = control_map(photo, fields["width"], canny=True)
    assert_same(refined.image, draw(tiny_models, model, "canny", canny, **fields))
    base_only = ours.generate(GenerationParams(**fields | control | {"enable_refiner": False})).image
    assert np.abs(np.asarray(refined.image).astype(int) - np.asarray(base_only)).mean() > 1


def test_eight_that_differ_in_everything_share_ticks(text2image: Text2Image, photo: bytes) -> None:
    """Sampler, steps, guidance, LoRA set, ControlNet, starting picture: all of it in one batch, each as if alone."""
    canny = {"model_name": SD, "controlnet_name": "canny", "controlnet_image": photo}
    depth = {"model_name": SD, "controlnet_name": "depth", "controlnet_image": photo}
    edges = {"model_name": SD, "controlnet_name": "softedge", "controlnet_image": photo, "controlnet_preprocess": False}
    pixel, detail = {"loras": {"Pixel_Art": 0.8}}, {"loras": {"Add_Detail": -0.5}}
    both, more = {"loras": {"Pixel_Art": 0.4, "Add_Detail": 0.7}}, {"loras": {"Add_Detail": 1.0, "Pixel_Art": -0.3}}
    requests: list[dict[str, Any]] = [
        {"steps": 4, "sampler": "Euler"} | canny | pixel,
        {"steps": 6, "sampler": "Heun"} | detail,
        {"steps": 5, "sampler": "DDIM", "cfg_scale": 1.0} | canny | both,
        {"steps": 4, "sampler": "Euler a"} | edges,
        {"steps": 7, "sampler": "DPM++ 2M SDE Karras", "cfg_scale": 8.0} | more,
        {"steps": 3, "sampler": "UniPC 2M", "cfg_scale": 0.0},
        {"steps": 6, "sampler": "LMS", "image": photo} | depth | detail,
        {"steps": 5, "sampler": "DPM SDE", "negative_prompt": "fog"} | both,
    ]
    common = {"model_name": "SD1.5", "prompt": "a fox", "width": 128, "height": 128}
    params = [GenerationParams(**common | {"seed": seed} | fields) for seed, fields in enumerate(requests)]
    together = text2image.generate_many(params)
    for picture, one in zip(together, params, strict=True):
        alone = text2image.generate(one).image
        assert_same(picture.image, np.asarray(alone))
        if one.loras:
            without = text2image.generate(replace(one, loras={})).image
            assert not np.array_equal(np.asarray(without), np.asarray(alone)), "the LoRAs must show"


def test_what_a_controlnet_request_needs(text2image: Text2Image, photo: bytes) -> None:
    fields = request("SD1.5") | {"model_name": SD}
    with pytest.raises(InvalidValueError, match="controlnet_name is required"):
        text2image.generate(GenerationParams(**fields, controlnet_image=photo))
    with pytest.raises(InvalidValueError, match="controlnet_image is required"):
        text2image.generate(GenerationParams(**fields, controlnet_name="canny"))
    with pytest.raises(InvalidValueError, match=r"Unexpected controlnet_name 'cany'. Did you mean 'canny'\? Only \["):
        text2image.generate(GenerationParams(**fields, controlnet_name="cany", controlnet_image=photo))
    with pytest.raises(InvalidValueError, match=r"Only \['canny', 'depth', 'openpose', 'softedge'\]"):
        text2image.generate(
            GenerationParams(**fields | {"model_name": XL}, controlnet_name="lineart", controlnet_image=photo)
        )
