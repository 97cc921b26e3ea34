"""The reply, the fields and the two routes, as clients see them."""

from __future__ import annotations

import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from config.catalog import Catalog
from deployments.api.schemas import GenerationRequest
from pipelines.pictures.images import read_plan
from pipelines.plan import GenerationParams, GenerationPlan
from pipelines.text2image import Text2Image
from tests.support.http import SMALL, encoded, photo, picture, pixels, post


async def test_reply_has_exactly_the_documented_fields(client: httpx.AsyncClient) -> None:
    reply = await post(client)
    body = reply.json()
    assert set(body) == {"images", "inference_time"}
    assert set(body["images"][0]) == {"index", "image", "random_seed"}
    assert body["images"][0]["index"] == 0
    assert body["images"][0]["random_seed"] == 7
    assert isinstance(body["inference_time"], float)
    assert picture(reply).format == "JPEG"


async def test_headers_tell_stages_and_backend(client: httpx.AsyncClient) -> None:
    reply = await post(client)
    stages = [entry.split(";")[0] for entry in reply.headers["server-timing"].split(", ")]
    assert stages == ["text_encoder", "denoise_unet-sd15", "vae_decode"]
    assert reply.headers["x-backend"] == "torch"


async def test_a_random_seed_comes_back_and_repeats_the_picture(client: httpx.AsyncClient) -> None:
    first = await post(client, seed=None, output_format="png")
    seed = first.json()["images"][0]["random_seed"]
    again = await post(client, seed=seed, output_format="png")
    other = await post(client, seed=seed ^ 1, output_format="png")
    assert np.abs(pixels(picture(first)) - pixels(picture(again))).max() <= 1
    assert np.abs(pixels(picture(first)) - pixels(picture(other))).max() > 1


async def test_the_graph_draws_what_one_process_draws(client: httpx.AsyncClient, catalog: Catalog) -> None:
    text2image = Text2Image(catalog)
    given = photo()
    common = {"prompt": "a fox", "negative_prompt": "fog", "width": 256, "height": 256, "steps": 10, "seed": 3}
    for model, extra in [
        ("SD2", {"width": 128, "height": 160}),
        ("SSD", {"sampler": "Euler a"}),
        ("SDXL1.0-base", {"enable_refiner": True, "sampler": "Heun"}),
        ("SDXL1.0-base", {"image": given, "strength": 0.5, "enable_refiner": True}),
        ("SDXL-turbo", {"style_preset": "Pixel Art"}),
        ("SD1.5-ControlNet", {"controlnet_name": "canny", "controlnet_image": given}),
        ("SDXL-ControlNet", {"controlnet_name": "canny", "controlnet_image": given, "enable_refiner": True}),
    ]:
        fields = common | extra
        wire = {k: encoded(v) if isinstance(v, bytes) else v for k, v in fields.items()}
        reply = await client.post("/v1/image/generation", json={"model_name": model, "output_format": "png"} | wire)
        ours = text2image.generate(GenerationParams(model_name=model, **fields)).image
        assert np.abs(pixels(picture(reply)) - pixels(ours)).max() <= 1, model


@pytest.mark.parametrize("output_format", ["jpeg", "png", "webp"])
async def test_formats_carry_the_plan(client: httpx.AsyncClient, catalog: Catalog, output_format: str) -> None:
    reply = await post(client, output_format=output_format, prompt="über naïve 猫")
    image = picture(reply)
    assert image.format == output_format.upper()
    assert image.size == (128, 128)
    metadata = read_plan(base64.b64decode(reply.json()["images"][0]["image"]))
    assert metadata is not None
    plan = GenerationPlan.model_validate_json(metadata)
    assert plan.seed == 7
    assert plan.stages[0].text.prompts == ("über naïve 猫",)


async def test_model_defaults_fill_what_is_absent(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/image/generation", json={"model_name": "sdxl-TURBO", "prompt": "x", "seed": None})
    assert picture(reply).size == (512, 512)
    plan = GenerationPlan.model_validate_json(read_plan(base64.b64decode(reply.json()["images"][0]["image"])) or "")
    assert plan.stages[0].schedule.steps == 4
    assert not plan.stages[0].guided


async def test_aliases_and_unknown_fields(client: httpx.AsyncClient) -> None:
    """huggingface_hub sends num_inference_steps and guidance_scale, coinbase-agentkit num_images, others nulls."""
    fields = {k: v for k, v in SMALL.items() if k != "steps"}
    extra = {"num_inference_steps": 2, "guidance_scale": 1.5, "num_images": 1, "lora": None, "image": None, "weird": {}}
    reply = await client.post("/v1/image/generation", json=fields | extra)
    plan = GenerationPlan.model_validate_json(read_plan(base64.b64decode(reply.json()["images"][0]["image"])) or "")
    assert plan.stages[0].schedule.steps == 2
    assert plan.stages[0].guidance_scale == 1.5


def test_every_field_of_the_contract_is_in_the_schema() -> None:
    contract = (
        "model_name prompt height width backend prompt_2 negative_prompt negative_prompt_2 image strength seed "
        "cfg_scale sampler steps style_preset enable_refiner controlnet_name controlnet_image loras output_format "
        "controlnet_preprocess"
    )
    ours = {"stream", "preview", "prompt_syntax", "emphasis", "long_prompt", "clip_skip"}
    ours |= {"mask_image", "mask_blur", "inpaint_area", "inpaint_padding", "inpaint_fill"}
    ours |= {"controlnets", "hires", "guidance_rescale", "guidance_start", "guidance_end", "eta"}
    assert set(GenerationRequest.model_fields) == set(contract.split()) | ours


async def test_a_body_is_read_as_json_whatever_its_content_type(client: httpx.AsyncClient) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data"):
        content = json.dumps(SMALL)
        reply = await client.post("/v1/image/generation", content=content, headers={"content-type": kind})
        assert picture(reply).size == (128, 128)


async def test_names_match_without_case_and_by_alias(client: httpx.AsyncClient) -> None:
    canonical = picture(await post(client, sampler="Euler a", style_preset="Lowpoly", output_format="png"))
    alias = picture(await post(client, sampler="k_euler_ancestral", style_preset="LOW-poly", output_format="png"))
    assert np.abs(pixels(canonical) - pixels(alias)).max() <= 1


async def test_image_takes_base64_and_data_uris(client: httpx.AsyncClient) -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        raw = encoded(photo(60, 40, kind))
        plain = picture(await post(client, image=raw, strength=0.7, output_format="png"))
        uri = f"data:image/{kind.lower()};base64,{raw}"
        wrapped = picture(await post(client, image=uri, strength=0.7, output_format="png"))
        assert np.abs(pixels(plain) - pixels(wrapped)).max() <= 1


async def test_hyperbolic_shape_on_the_second_route(client: httpx.AsyncClient) -> None:
    assert picture(await post(client, "/v1/images/generations")).size == (128, 128)


async def test_strength_one_follows_the_seed_and_not_the_picture(client: httpx.AsyncClient) -> None:
    """diffusers' meaning: at strength 1 the picture is drowned in noise of the highest level, all steps run."""

    async def drawn(colour: str, seed: int) -> np.ndarray:
        buffer = io.BytesIO()
        Image.new("RGB", (128, 128), colour).save(buffer, "PNG")
        fields = {"image": encoded(buffer.getvalue()), "strength": 1.0, "output_format": "png"}
        return pixels(picture(await post(client, seed=seed, **fields)))

    navy, ivory, other = await drawn("navy", 4), await drawn("ivory", 4), await drawn("navy", 5)
    assert np.abs(navy - other).mean() > 4 * np.abs(navy - ivory).mean()
