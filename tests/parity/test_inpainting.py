"""UNets for inpainting, which read a mask and the masked picture, draw what diffusers' inpainting pipelines draw."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from config.catalog import Catalog
from pipelines.plan import GenerationParams, ScheduleSlice
from pipelines.sampling.tables import SamplerTables
from pipelines.text2image import Text2Image
from pipelines.weights.files import read_config
from tests.parity import oracle, repainting
from tests.parity.repainting import picture, png
from tests.support.inpainting import NINE

SIZE = {"SD1.5-inpainting": 128, "SD2-inpainting": 128, "SD2-v": 128, "SDXL-inpainting": 256}


@pytest.fixture(scope="module")
def text2image(inpainting_catalog: Catalog) -> Text2Image:
    return Text2Image(inpainting_catalog)


def fields(model: str, photo: bytes, **changes: Any) -> dict[str, Any]:
    return repainting.fields(model, photo, SIZE[model], **changes)


def whole_picture(folder: Path, request: dict[str, Any]) -> np.ndarray:
    """diffusers' picture under a mask that is white all over, whatever lies below it where nothing was sent."""
    size = (request["width"], request["height"])
    sent, strength = request.get("image"), 1.0
    image = Image.new("RGB", size, "red") if sent is None else Image.open(io.BytesIO(sent))
    if sent is not None:
        strength = request["strength"]
    white = {"image": png(image), "mask_image": png(Image.new("L", size, 255)), "strength": strength}
    return repainting.repainted(folder, request | white)


def expected(models: Path, request: dict[str, Any]) -> np.ndarray:
    folder = models / request["model_name"]
    return repainting.repainted(folder, request) if request.get("mask_image") else whole_picture(folder, request)


def distance(ours: Image.Image, theirs: np.ndarray) -> int:
    pixels = np.asarray(ours).astype(int)
    assert pixels.std() > 10, "a flat picture proves nothing"
    return int(np.abs(pixels - theirs).max())


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("model", NINE)
def test_a_mask(text2image: Text2Image, inpainting_models: Path, photo: bytes, model: str, strength: float) -> None:
    request = fields(model, photo, strength=strength, sampler="DPM++ 2M Karras")
    ours = text2image.generate(GenerationParams(**request)).image
    repainting.check(ours, inpainting_models / model, request)


@pytest.mark.parametrize("model", NINE)
def test_without_a_mask_all_of_the_picture_is_masked(
    text2image: Text2Image, inpainting_models: Path, photo: bytes, model: str
) -> None:
    from_text = fields(model, photo, image=None, mask_image=None, strength=None)
    from_a_picture = fields(model, photo, mask_image=None, strength=0.6)
    drawn = text2image.generate_many([GenerationParams(**from_text), GenerationParams(**from_a_picture)])
    for ours, request in zip(drawn, (from_text, from_a_picture), strict=True):
        assert distance(ours.image, whole_picture(inpainting_models / model, request)) <= 1


@pytest.mark.parametrize("model", ["SD1.5-inpainting", "SDXL-inpainting"])
def test_the_masked_area_alone(text2image: Text2Image, inpainting_models: Path, photo: bytes, model: str) -> None:
    large = picture(photo, 400).crop((0, 0, 400, 301))
    mask = Image.new("L", large.size)
    ImageDraw.Draw(mask).rectangle((250, 120, 310, 200), fill=255)
    request = fields(model, photo, image=png(large), mask_image=png(mask), inpaint_area="masked", mask_blur=2)
    ours = text2image.generate(GenerationParams(**request)).image
    assert ours.size == (400, 301)
    repainting.check(ours, inpainting_models / model, request)


def test_a_lora(text2image: Text2Image, inpainting_models: Path, photo: bytes) -> None:
    model = "SD1.5-inpainting"
    request = fields(model, photo)
    plain = text2image.generate(GenerationParams(**request)).image
    ours = text2image.generate(GenerationParams(**request, loras={"Pixel_Art": 0.8})).image
    pipe = repainting.inpainting_pipeline(inpainting_models / model, request)
    pipe.load_lora_weights(oracle.TINY / "lora-pixel-sd15", adapter_name="pixel")
    pipe.set_adapters(["pixel"], [0.8])
    try:
        repainting.check(ours, inpainting_models / model, request)
    finally:
        pipe.unload_lora_weights()
    assert distance(ours, np.asarray(plain)) > 1


@pytest.mark.parametrize("model", ["SD1.5-inpainting", "SDXL-inpainting"])
def test_eight_jobs_of_every_kind_share_ticks(
    text2image: Text2Image, inpainting_models: Path, photo: bytes, model: str
) -> None:
    requests = [
        fields(model, photo, seed=1, strength=1.0),
        fields(model, photo, seed=2, image=None, mask_image=None),
        fields(model, photo, seed=3, sampler="Heun", strength=0.5),
        fields(model, photo, seed=4, sampler="DPM++ 2M SDE Karras", mask_blur=3),
        fields(model, photo, seed=5, cfg_scale=1.0, sampler="DDIM"),
        fields(model, photo, seed=6, sampler="PNDM", steps=9),
        fields(model, photo, seed=7, mask_image=None),
        fields(model, photo, seed=8, sampler="DPM SDE", strength=0.9),
    ]
    together = text2image.generate_many([GenerationParams(**request) for request in requests])
    for ours, request in zip(together, requests, strict=True):
        assert distance(ours.image, expected(inpainting_models, request)) <= 1


@pytest.mark.parametrize("model", ["SD2-inpainting", "SD2-v"])
def test_a_sampler_without_a_table(
    text2image: Text2Image, inpainting_catalog: Catalog, inpainting_models: Path, photo: bytes, model: str
) -> None:
    """The DDIM of these models clips, which no table can: its own steps are taken."""
    tables = SamplerTables(read_config(inpainting_catalog.component(f"unet-{model.lower()}"), "scheduler"))
    assert tables.get("DDIM", ScheduleSlice(steps=6, strength=0.7)) is None
    request = fields(model, photo, sampler="DDIM")
    ours = text2image.generate(GenerationParams(**request)).image
    repainting.check(ours, inpainting_models / model, request)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_v_prediction_with_latents_that_are_blended(
    text2image: Text2Image, inpainting_models: Path, photo: bytes, strength: float
) -> None:
    request = fields("SD2-v", photo, strength=strength)
    ours = text2image.generate(GenerationParams(**request)).image
    repainting.check(ours, inpainting_models / "SD2-v", request)


def test_a_canvas_that_is_larger_than_its_picture(
    text2image: Text2Image, inpainting_models: Path, photo: bytes
) -> None:
    """Outpainting: the picture lies in a larger one, and the mask is white around it."""
    canvas, mask = Image.new("RGB", (192, 128), "grey"), Image.new("L", (192, 128), 255)
    canvas.paste(picture(photo, 128).crop((0, 0, 96, 128)), (48, 0))
    mask.paste(0, (48, 0, 144, 128))
    size = {"width": 192, "height": 128}
    given = {"image": png(canvas), "mask_image": png(mask), "strength": 1.0} | size
    requests = [fields(model, photo, **given) for model in ("SD2-v", "SD1.5-inpainting")]
    for ours, request in zip(
        text2image.generate_many([GenerationParams(**request) for request in requests]), requests, strict=True
    ):
        assert ours.image.size == (192, 128)
        repainting.check(ours.image, inpainting_models / request["model_name"], request)


@pytest.mark.parametrize("strength", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("model", ["SDXL1.0-base", "SDXL-inpainting"])
def test_the_refiner_goes_on(
    text2image: Text2Image, inpainting_models: Path, photo: bytes, model: str, strength: float
) -> None:
    """diffusers' inpainting pipelines one after the other; behind a UNet for inpainting, which leaves no latents of
    the picture without noise, its refiner is the usual one."""
    request = repainting.fields(model, photo, 256, steps=10, strength=strength, enable_refiner=True)
    ours = text2image.generate(GenerationParams(**request)).image
    folder = inpainting_models / model if model in NINE else oracle.PIPELINES[model][0]
    repainting.check(ours, folder, request, repainting.refined(folder, request, masked=model not in NINE))


def test_a_batch_of_refined_pictures(text2image: Text2Image, inpainting_models: Path, photo: bytes) -> None:
    requests = [
        repainting.fields("SDXL1.0-base", photo, 256, seed=1, steps=10, enable_refiner=True),
        repainting.fields("SDXL1.0-base", photo, 256, seed=2, steps=12, enable_refiner=True, sampler="DDIM"),
        repainting.fields("SDXL1.0-base", photo, 256, seed=3, steps=8, enable_refiner=True, sampler="Heun"),
    ]
    together = text2image.generate_many([GenerationParams(**request) for request in requests])
    for ours, request in zip(together, requests, strict=True):
        repainting.check(ours.image, "sdxl", request, repainting.refined("sdxl", request, masked=True))
