"""Several control maps at once, with weights, windows and guess mode, equal diffusers' own pipelines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, MultiControlNetModel, StableDiffusionXLImg2ImgPipeline
from PIL import Image, ImageDraw

from pipelines.control_plan import ControlParams
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.parity import oracle
from tests.parity.test_pictures import assert_same
from tests.support.pictures import png

SD, XL, UNION = "StableDiffusion", "StableDiffusionXL", "StableDiffusionXL union"
SIDE = {SD: 128, XL: 256, UNION: 256}
MODES = {"openpose": 0, "depth": 1, "softedge": 2, "canny": 3}
TWO: list[dict[str, Any]] = [{"name": "canny", "weight": 0.7, "end": 0.6}, {"name": "depth", "start": 0.3}]
GUESSES = [control | {"guess": True} for control in TWO]


def control_map(position: int, side: int) -> Image.Image:
    """A map that no other control of a request has."""
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    for i in range(4):
        box = [side * i // 6, side * position // 6, side * (i + 2) // 6, side * (position + 2) // 6]
        (draw.ellipse if position % 2 else draw.rectangle)(box, outline=["white", "red", "lime"][i % 3], width=3)
    return image


def asked(kind: str, controls: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A request of one kind of model; its maps are ready."""
    base = {"model_name": "SD1.5" if kind == SD else "SDXL1.0-base", "prompt": "a fox", "seed": 7, "steps": 6}
    base |= {"cfg_scale": 5.0, "sampler": "Euler", "width": SIDE[kind], "height": SIDE[kind]}
    maps = [
        ControlParams(**{"image": png(control_map(i, SIDE[kind])), "preprocess": False} | control)
        for i, control in enumerate(controls)
    ]
    return base | fields | {"controlnets": tuple(maps)}


def draw(tiny: Path, kind: str, request: dict[str, Any]) -> np.ndarray:
    """The picture of diffusers' own pipeline for such a request, followed by its refiner."""
    controls: Sequence[ControlParams] = request["controlnets"]
    image, mask = ("image" in request), ("mask_image" in request)
    task = "Inpaint" if mask else "Img2Img" if image else ""
    if kind == UNION:
        net: Any = ControlNetUnionModel.from_pretrained(tiny / "controlnet-sdxl-union")
        net.register_forward_pre_hook(_as_many_control_types_as_rows, with_kwargs=True)
        name = f"StableDiffusionXLControlNetUnion{task}Pipeline"
    else:
        own = {"canny": "canny"} if kind == SD else {}
        folders = [f"controlnet-sd15-{own.get(c.name, 'soft')}" if kind == SD else "controlnet-sdxl" for c in controls]
        net = MultiControlNetModel([ControlNetModel.from_pretrained(tiny / folder) for folder in folders])
        name = f"{kind}ControlNet{task}Pipeline"
    base = oracle.pipeline(*oracle.PIPELINES[request["model_name"]][:2])
    extra: dict[str, Any] = {"requires_safety_checker": False} if kind == SD else {"add_watermarker": False}
    pipe = getattr(diffusers, name)(**base.components, controlnet=net, **extra)
    pipe.set_progress_bar_config(disable=True)
    pipe.default_scheduler_config = base.default_scheduler_config
    generator = torch.Generator().manual_seed(request["seed"])
    arguments: dict[str, Any] = {
        "prompt": request["prompt"],
        "num_inference_steps": request["steps"],
        "guidance_scale": request["cfg_scale"],
        "generator": generator,
        "controlnet_conditioning_scale": [control.weight for control in controls],
        "control_guidance_start": [control.start for control in controls],
        "control_guidance_end": [control.end for control in controls],
        "guess_mode": controls[0].guess,
    }
    maps = [Image.open(io.BytesIO(control.image)) for control in controls]
    arguments["control_image" if image or kind == UNION else "image"] = maps
    if kind == UNION:
        arguments["control_mode"] = [MODES[control.name] for control in controls]
    if not image or mask:
        arguments |= {"width": request["width"], "height": request["height"]}
    if image:
        arguments |= {"image": Image.open(io.BytesIO(request["image"])), "strength": request["strength"]}
    if mask:
        crop = 32 if request.get("inpaint_area") == "masked" else None
        arguments |= {"mask_image": Image.open(io.BytesIO(request["mask_image"])), "padding_mask_crop": crop}
        pipe.check_inputs = lambda *_, **__: None  # it takes several maps for no picture, which cropping then crops
    if request.get("enable_refiner"):
        arguments |= {"denoising_end": 0.8, "output_type": "latent"}
    result = oracle._scheduled(pipe, request["sampler"], request["seed"])(**arguments).images
    if request.get("enable_refiner"):
        refiner = oracle._scheduled(oracle.pipeline("sdxl-refiner", StableDiffusionXLImg2ImgPipeline), "Euler", 0)
        same = {k: arguments[k] for k in ("prompt", "num_inference_steps", "guidance_scale", "generator")}
        result = refiner(image=result, denoising_start=0.8, **same).images
    if mask and request.get("inpaint_area") != "masked":
        return np.asarray(pipe.image_processor.apply_overlay(arguments["mask_image"], arguments["image"], result[0]))
    return np.asarray(result[0])


def _as_many_control_types_as_rows(net: Any, args: Any, given: dict[str, Any]) -> Any:
    """In guess mode the union pipeline brings a control type for each row of the UNet, and fails."""
    return args, given | {"control_type": given["control_type"][: len(args[0])]}


def starting_from(photo: bytes, kind: str, masked: str | None = None) -> dict[str, Any]:
    picture = Image.open(io.BytesIO(photo)).convert("RGB").resize((SIDE[kind],) * 2, Image.Resampling.LANCZOS)
    fields: dict[str, Any] = {"image": png(picture), "strength": 0.7}
    if masked is not None:
        mask, side = Image.new("L", picture.size), SIDE[kind]
        ImageDraw.Draw(mask).ellipse((side // 4, side // 3, side * 3 // 4, side * 5 // 6), fill=255)
        fields |= {"mask_image": png(mask), "inpaint_area": masked}
    return fields


CASES = {
    "weights and windows": (TWO, {}),
    "a sampler of two ticks a step": (TWO, {"sampler": "Heun", "steps": 4}),
    "guess mode": (GUESSES, {}),
    "guess mode without guidance": (GUESSES, {"cfg_scale": 1.0}),
    "three": ([*TWO, {"name": "softedge", "weight": 0.4, "start": 0.1, "end": 0.9}], {"sampler": "DPM++ 2M"}),
    "one": ([{"name": "canny", "weight": 1.6, "start": 0.2, "end": 0.7}], {}),
    "one map twice, none near the end": ([{"name": "canny", "end": 0.4}, {"name": "canny", "end": 0.4}], {}),
}


@pytest.mark.parametrize("kind", [SD, XL, UNION])
@pytest.mark.parametrize("case", CASES)
def test_from_text(text2image: Text2Image, plain_xl: Text2Image, tiny_models: Path, kind: str, case: str) -> None:
    ours = plain_xl if kind == XL else text2image
    controls, fields = CASES[case]
    request = asked(kind, controls, **fields)
    drawn = ours.generate(GenerationParams(**request)).image
    assert_same(drawn, draw(tiny_models, kind, request))
    plain = ours.generate(GenerationParams(**request | {"controlnets": ()})).image
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(plain)).mean() > 0.5, "the controls must show"


@pytest.mark.parametrize("kind", [SD, XL, UNION])
@pytest.mark.parametrize("masked", [None, "whole", "masked"])
def test_from_a_picture(
    text2image: Text2Image, plain_xl: Text2Image, tiny_models: Path, photo: bytes, kind: str, masked: str | None
) -> None:
    """Windows are shares of what `strength` leaves; maps are cut out where the part is that is drawn."""
    ours = plain_xl if kind == XL else text2image
    request = asked(kind, TWO, **starting_from(photo, kind, masked))
    assert_same(ours.generate(GenerationParams(**request)).image, draw(tiny_models, kind, request))


@pytest.mark.parametrize("kind", [XL, UNION])
def test_windows_before_a_refiner_are_shares_of_the_whole_schedule(
    text2image: Text2Image, plain_xl: Text2Image, tiny_models: Path, kind: str
) -> None:
    ours = plain_xl if kind == XL else text2image
    request = asked(kind, TWO, enable_refiner=True, steps=10)
    drawn = ours.generate(GenerationParams(**request))
    assert [len(stage.controls) for stage in drawn.plan.stages] == [2, 0]
    assert_same(drawn.image, draw(tiny_models, kind, request))


@pytest.mark.parametrize("kind", [SD, UNION])
def test_eight_that_differ_share_ticks(text2image: Text2Image, photo: bytes, kind: str) -> None:
    """None, one, two and three controls, other windows and weights, guess mode, masks: each as if alone."""
    late, early = {"name": "canny", "start": 0.5}, {"name": "canny", "weight": 0.5, "end": 0.5}
    jobs: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        (TWO, {}),
        ([], {"sampler": "Euler a"}),
        ([late], {"sampler": "Heun"}),
        ([early, late | {"name": "softedge", "weight": 2.0}], {"sampler": "DDIM", "cfg_scale": 1.0}),
        (GUESSES, {"sampler": "DPM++ 2M SDE Karras"}),
        ([{"name": "depth", "guess": True}, late], starting_from(photo, kind)),
        ([*TWO, early], starting_from(photo, kind, "whole")),
        ([{"name": "depth", "weight": 0.0}, early], {"guidance_end": 0.6, "steps": 5}),
    ]
    requests = [
        GenerationParams(**asked(kind, controls, seed=i, **fields)) for i, (controls, fields) in enumerate(jobs)
    ]
    for picture, alone in zip(text2image.generate_many(requests), requests, strict=True):
        assert_same(picture.image, np.asarray(text2image.generate(alone).image))
