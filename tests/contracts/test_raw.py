"""Pictures as bytes: Hugging Face's way, and `Accept: image/*` on the other routes."""

from __future__ import annotations

import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from pipelines.pictures.images import check_image, read_plan
from pipelines.pictures.provenance import MACHINE_MADE
from pipelines.plan import GenerationPlan
from tests.support.http import PATH, SMALL, check, encoded, photo, picture, pixels, post

PARAMETERS = {"width": 128, "height": 128, "num_inference_steps": 3, "seed": 7}


def opened(reply: httpx.Response) -> Image.Image:
    assert reply.status_code == 200, reply.text
    image = Image.open(io.BytesIO(reply.content))
    assert reply.headers["content-type"] == f"image/{str(image.format).lower()}"
    return image


async def infer(client: httpx.AsyncClient, name: str = "SD1.5", accept: str = "*/*", **body: Any) -> httpx.Response:
    sent = {"inputs": "a cat", "parameters": PARAMETERS} | body
    return await client.post(f"/models/{name}", json=sent, headers={"accept": accept})


async def test_a_model_by_its_url(client: httpx.AsyncClient) -> None:
    reply = await infer(client, accept="image/png")
    ours = picture(await post(client, output_format="png"))
    assert np.abs(pixels(opened(reply)) - pixels(ours)).max() <= 1
    assert reply.headers["x-seed"] == "7"
    assert "denoise" in reply.headers["server-timing"]
    assert check_image(reply.content, "image", 10**6).digital_source_type == MACHINE_MADE
    assert opened(await infer(client, name="gpt-image-1")).format == "JPEG"


async def test_its_parameters_are_ours_and_schedulers_have_diffusers_names(client: httpx.AsyncClient) -> None:
    fields = {"negative_prompt": "fog", "guidance_scale": 2.5, "scheduler": "EulerAncestralDiscreteScheduler"}
    more = {"loras": {"Pixel_Art": 0.5}, "output_format": "webp"}
    reply = await infer(client, parameters=PARAMETERS | fields | more)
    assert opened(reply).format == "WEBP"
    (stage,) = GenerationPlan.model_validate_json(read_plan(reply.content) or "").stages
    assert (stage.sampler, stage.guidance_scale, len(stage.loras)) == ("Euler a", 2.5, 1)


async def test_image_to_image_by_url(client: httpx.AsyncClient) -> None:
    parameters = {
        "prompt": "a cat",
        "strength": 0.6,
        "num_inference_steps": 3,
        "target_size": {"width": 128, "height": 160},
    }
    reply = await infer(client, inputs=encoded(photo()), parameters=parameters)
    assert opened(reply).size == (128, 160)
    assert GenerationPlan.model_validate_json(read_plan(reply.content) or "").source is not None


@pytest.mark.parametrize(
    ("name", "body", "status", "code", "param"),
    [
        ("nope", {}, 400, 40301, "model_name"),
        ("org/nope", {}, 400, 40301, "model_name"),
        ("SD1.5", {"inputs": None}, 422, 40001, "inputs"),
        ("SD1.5", {"inputs": ""}, 400, 40302, "prompt"),
        ("SD1.5", {"parameters": [1]}, 422, 40001, "parameters"),
        ("SD1.5", {"parameters": {"width": "wide"}}, 422, 40001, "width"),
        ("SD1.5", {"parameters": {"scheduler": "NoScheduler"}}, 400, 40302, "sampler"),
        ("SD1.5", {"parameters": {"target_size": {"width": "wide"}}}, 422, 40001, "width"),
        ("SD1.5", {"parameters": {"prompt": "x"}}, 400, 40302, "image"),
    ],
)
async def test_its_errors(
    client: httpx.AsyncClient, name: str, body: dict[str, Any], status: int, code: int, param: str
) -> None:
    check(await infer(client, name, **body), status, code, param)


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("image/*", "JPEG"),
        ("image/png", "PNG"),
        ("image/webp,*/*;q=0.5", "WEBP"),
        ("image/avif, image/webp;q=0.9, image/png;q=0.8", "WEBP"),
        ("application/json, image/png;q=0.5", None),
        ("*/*", None),
        ("image/avif", None),
        ("image/png;q=x, */*", None),
        ("", None),
    ],
)
async def test_accept_on_the_main_route(client: httpx.AsyncClient, accept: str, expected: str | None) -> None:
    reply = await client.post(PATH, json=SMALL, headers={"accept": accept})
    if expected is None:
        assert picture(reply).format == "JPEG"
    else:
        assert opened(reply).format == expected


async def test_huggingface_hub_gets_json_of_its_providers_routes(client: httpx.AsyncClient) -> None:
    """It asks for image/png there too, as 1.21.0's provider for Hyperbolic did, and reads JSON."""
    headers = {"accept": "image/png", "user-agent": "unknown/None; hf_hub/1.21.0; python/3.11.7"}
    assert picture(await client.post(PATH, json=SMALL, headers=headers)).format == "PNG"
    openai = {"model": "SD1.5", "prompt": "a cat", "size": "128x128", "steps": 2}
    assert "data" in (await client.post("/v1/images/generations", json=openai, headers=headers)).json()
    by_url = {"inputs": "a cat", "parameters": PARAMETERS}
    assert opened(await client.post("/models/SD1.5", json=by_url, headers=headers)).format == "PNG"


async def test_accept_elsewhere(client: httpx.AsyncClient) -> None:
    bytes_please = {"accept": "image/*"}
    body = {"prompt": "a cat", "size": "128x128", "steps": 2}
    reply = await client.post("/v1/images/generations", json=body, headers=bytes_please)
    assert opened(reply).format == "PNG"
    webp = await client.post("/v1/images/generations", json=body, headers={"accept": "image/webp"})
    assert opened(webp).format == "WEBP"
    said = await client.post(PATH, json=SMALL | {"output_format": "png"}, headers={"accept": "image/webp"})
    assert opened(said).format == "PNG", "what the body says wins"
    edit = {"data": body | {"strength": "0.9"}, "files": {"image": photo()}}
    assert opened(await client.post("/v1/images/edits", **edit, headers=bytes_please)).format == "PNG"
    two = await client.post("/v1/images/generations", json=body | {"n": 2}, headers=bytes_please)
    check(two, 400, 40302, "n")
    wrong = await client.post(PATH, json=SMALL | {"sampler": "nope"}, headers=bytes_please)
    check(wrong, 400, 40302, "sampler")
