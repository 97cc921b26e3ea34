"""Repainting a part of a picture equals diffusers' inpainting pipelines, alone and in a batch with seven other jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetInpaintPipeline
from PIL import Image, ImageDraw

from config.catalog import Catalog
from pipelines.errors import InvalidValueError
from pipelines.plan import GenerationParams
from pipelines.planning import make_plan
from pipelines.sampling.latents import Latents
from pipelines.sampling.samplers import SAMPLERS
from pipelines.text2image import Text2Image
from tests.parity import oracle, repainting
from tests.parity.repainting import picture, png

SIZE = {"SD1.5": 128, "SDXL1.0-base": 256}


def fields(model: str, photo: bytes, **changes: Any) -> dict[str, Any]:
    return repainting.fields(model, photo, SIZE[model], **changes)


def check(ours: Image.Image, request: dict[str, Any]) -> None:
    repainting.check(ours, oracle.PIPELINES[request["model_name"]][0], request)


@pytest.mark.parametrize("sampler", sorted(oracle.SCHEDULERS))
def test_every_sampler_keeps_what_is_black(text2image: Text2Image, photo: bytes, sampler: str) -> None:
    request = fields("SD1.5", photo, sampler=sampler)
    check(text2image.generate(GenerationParams(**request)).image, request)


@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("model", sorted(SIZE))
def test_strength(text2image: Text2Image, photo: bytes, model: str, strength: float) -> None:
    request = fields(model, photo, strength=strength, sampler="DPM++ 2M Karras")
    check(text2image.generate(GenerationParams(**request)).image, request)


def test_a_blurred_mask(text2image: Text2Image, photo: bytes) -> None:
    request = fields("SD1.5", photo, mask_blur=4)
    check(text2image.generate(GenerationParams(**request)).image, request)


@pytest.mark.parametrize("model", sorted(SIZE))
def test_the_masked_area_alone_is_drawn_and_laid_into_a_picture_of_any_size(
    text2image: Text2Image, photo: bytes, model: str
) -> None:
    large = picture(photo, 400).crop((0, 0, 400, 301))
    mask = Image.new("L", large.size)
    ImageDraw.Draw(mask).rectangle((250, 120, 310, 200), fill=255)
    request = fields(model, photo, image=png(large), mask_image=png(mask), inpaint_area="masked", mask_blur=2)
    ours = text2image.generate(GenerationParams(**request)).image
    assert ours.size == (400, 301)
    check(ours, request)


@pytest.mark.parametrize("fill", ["original", "noise", "nothing"])
def test_a_part_that_begins_from_noise_forgets_the_picture_there(
    text2image: Text2Image, catalog: Catalog, photo: bytes, fill: str
) -> None:
    """Two pictures that differ under the mask alone begin alike; from the original they do not."""
    plan = make_plan(GenerationParams(**fields("SD1.5", photo, inpaint_fill=fill)), catalog)
    engine = text2image.torch_engine(plan.stages[0].component)
    text = text2image.text_encoders(plan.text_encoder).encode(plan.stages[0])
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:9, 2:12] = 1
    pictures = [torch.ones(1, 4, 16, 16), torch.ones(1, 4, 16, 16) + mask]
    begun = [engine.prepare("one", plan.stages[0], text, Latents(values, mask=mask)).latents for values in pictures]
    assert torch.equal(*begun) == (fill != "original")
    assert torch.equal(*(latents.masked_select(mask == 0) for latents in begun))


def test_eight_jobs_with_and_without_masks_share_ticks(text2image: Text2Image, photo: bytes) -> None:
    plain = {"image": None, "mask_image": None}
    requests = [
        fields("SD1.5", photo, seed=1),
        fields("SD1.5", photo, seed=2) | plain,
        fields("SD1.5", photo, seed=3, sampler="Heun", strength=1.0),
        fields("SD1.5", photo, seed=4, sampler="DPM++ 2M SDE Karras", mask_blur=3),
        fields("SD1.5", photo, seed=5, cfg_scale=1.0, sampler="DDIM"),
        fields("SD1.5", photo, seed=6, sampler="UniPC 2M"),
        fields("SD1.5", photo, seed=7, mask_image=None),
        fields("SD1.5", photo, seed=8, sampler="DPM SDE", strength=0.5),
    ]
    together = text2image.generate_many([GenerationParams(**request) for request in requests])
    for drawn, request in zip(together, requests, strict=True):
        if request["mask_image"]:
            check(drawn.image, request)
        else:
            usual = {k: v for k, v in request.items() if k not in ("mask_image", "image")}
            given = {"image": request["image"]} if request["image"] else {}
            strength = {} if given else {"strength": None}
            expected = oracle.draw(**usual | given | strength)
            assert np.abs(np.asarray(drawn.image).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["SD1.5", "SD1.5-inpainting"])
def test_a_controlnet_steers_what_is_repainted(
    inpainting_catalog: Catalog, inpainting_models: Path, photo: bytes, name: str
) -> None:
    """A ControlNet sees the latents alone, also where the UNet reads nine channels."""
    data = inpainting_catalog.model_dump()
    unet = inpainting_catalog.model(name).unet
    for model in data["models"]:
        if model["unet"] == "unet-sd15":
            model["unet"] = unet
    for component in data["components"]:
        if component["base"] == "unet-sd15":
            component["base"] = unet
    request = fields("SD1.5", photo) | {"model_name": "SD1.5-ControlNet"}
    control = {"controlnet_name": "canny", "controlnet_image": request["image"], "controlnet_preprocess": False}
    ours = Text2Image(Catalog.model_validate(data)).generate(GenerationParams(**request, **control)).image
    folder: str | Path = "sd15" if name == "SD1.5" else inpainting_models / name
    usual = repainting.inpainting_pipeline(folder, request)
    net = ControlNetModel.from_pretrained(oracle.TINY / "controlnet-sd15-canny")
    parts = usual.components | {"controlnet": net}
    pipe = StableDiffusionControlNetInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    more = {"control_image": picture(photo, 128), "controlnet_conditioning_scale": 1.0}
    repainting.check(ours, folder, request, repainting.repainted(folder, request, pipe=pipe, **more))
    assert np.abs(np.asarray(ours).astype(int) - repainting.repainted(folder, request)).max() > 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (64, 128), 255), "mask_image is 64x128, image 128x128"),
        (Image.new("L", (128, 128), 127), "black all over"),
    ],
)
def test_invalid_masks_are_refused(text2image: Text2Image, photo: bytes, mask: Image.Image, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message) as caught:
        text2image.generate(GenerationParams(**fields("SD1.5", photo, mask_image=png(mask))))
    assert caught.value.param == "mask_image"


def test_no_sampler_that_serves_these_models_is_missing() -> None:
    assert {name for name, spec in SAMPLERS.items() if not spec.edm} == set(oracle.SCHEDULERS)
