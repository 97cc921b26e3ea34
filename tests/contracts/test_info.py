"""`POST /v1/images/info`, and that pictures of every route are marked."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from tests.support.http import blank, check, encoded, events, photo, picture, pixels, post

INFO = "/v1/images/info"
MACHINE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"


async def info(client: httpx.AsyncClient, image: str) -> dict[str, Any]:
    reply = await client.post(INFO, json={"image": image})
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told


@pytest.mark.parametrize("output_format", ["jpeg", "png", "webp"])
async def test_a_picture_is_drawn_again_from_its_file(client: httpx.AsyncClient, output_format: str) -> None:
    weight = {"unet": 0.5, "text_encoder": 0.9} if output_format == "png" else 0.5
    fields = {"negative_prompt": "fog", "sampler": "Euler a", "loras": {"Pixel_Art": weight}, "seed": None}
    drawn = await post(client, output_format=output_format, **fields)
    told = await info(client, drawn.json()["images"][0]["image"])
    assert (told["format"], told["width"], told["height"]) == (output_format, 128, 128)
    assert told["digital_source_type"] == MACHINE
    assert told["plan"]["seed"] == drawn.json()["images"][0]["random_seed"]
    assert told["parameters"]["Sampler"] == "Euler a"
    assert told["needs"] == []
    again = await client.post("/v1/image/generation", json=told["request"])
    assert np.abs(pixels(picture(again)) - pixels(picture(drawn))).max() <= 1


async def test_what_starts_from_a_photo_is_a_composite_and_needs_it(client: httpx.AsyncClient) -> None:
    given_photo = encoded(photo())
    drawn = (await post(client, image=given_photo, strength=0.7)).json()["images"][0]["image"]
    told = await info(client, drawn)
    assert told["digital_source_type"] == COMPOSITE
    assert told["plan"]["source"]["digital_source_type"] is None
    assert told["needs"] == ["image"]
    assert told["request"]["strength"] == 0.7
    ours = (await post(client)).json()["images"][0]["image"]
    of_ours = await info(client, (await post(client, image=ours, strength=0.7)).json()["images"][0]["image"])
    assert of_ours["digital_source_type"] == MACHINE, "a model's picture changed by a model"
    assert of_ours["plan"]["source"]["digital_source_type"] == "trainedAlgorithmicMedia"


async def test_control_and_refiner_are_repeated(client: httpx.AsyncClient) -> None:
    control = {"model_name": "SDXL-ControlNet", "controlnet_name": "canny", "controlnet_image": encoded(photo())}
    fields = {"width": 256, "height": 256, "prompt_2": "a (dog)", "enable_refiner": True, "steps": 5}
    fields |= {"prompt_syntax": "weighted", "emphasis": "No norm", "long_prompt": "cut", "clip_skip": 3}
    fields |= {"sampler": "DDIM", "eta": 0.5, "guidance_rescale": 0.2, "guidance_start": 0.1, "guidance_end": 0.9}
    told = await info(client, (await post(client, **control, **fields)).json()["images"][0]["image"])
    assert told["needs"] == ["controlnets.0.image"]
    expected = fields | {"controlnets": [{"name": "canny"}], "model_name": "SDXL-ControlNet"}
    assert told["request"].items() >= expected.items()


async def test_an_infotext_of_a_mask_needs_it(client: httpx.AsyncClient) -> None:
    chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    last = "Steps: 3, Sampler: Euler a, CFG scale: 7, Seed: 4, Size: 128x128, Denoising strength: 0.75, Mask blur: 4, "
    chunks.add_text("parameters", f"a cat\n{last}Inpaint area: Only masked, Masked area padding: 32, Version: v1.10.1")
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=chunks)
    told = await info(client, encoded(buffer.getvalue()))
    assert told["needs"] == ["image", "mask_image"]
    fields = {"mask_blur": 4, "inpaint_area": "masked", "inpaint_padding": 32, "strength": 0.75}
    assert told["request"].items() >= fields.items()


async def test_previews_are_marked(client: httpx.AsyncClient) -> None:
    told = events((await post(client, stream=True, preview=True)).text)
    previews = [data["image"] for name, data in told if name == "preview"]
    assert previews
    assert {(await info(client, preview))["digital_source_type"] for preview in previews} == {MACHINE}


async def test_an_infotext_of_another_program(client: httpx.AsyncClient) -> None:
    chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    text = "a cat\nSteps: 3, Sampler: Euler a, CFG scale: 7, Seed: 4, Size: 128x128, Model: sd1.5, Weird: 1"
    chunks.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=chunks)
    told = await info(client, encoded(buffer.getvalue()))
    assert told["plan"] is None
    assert told["infotext"] == text
    assert told["parameters"]["Weird"] == "1"
    assert picture(await client.post("/v1/image/generation", json=told["request"])).size == (128, 128)


async def test_a_form_of_one_file(client: httpx.AsyncClient) -> None:
    for name in ("image", "file", "image[]"):
        reply = await client.post(INFO, files={name: ("a.png", photo(), "image/png")})
        assert reply.status_code == 200, reply.text
        assert reply.json()["format"] == "png"
    assert reply.json()["digital_source_type"] is None


def form(*names: str) -> dict[str, Any]:
    return {"files": [(name, ("a.png", photo(), "image/png")) for name in names]}


@pytest.mark.parametrize(
    ("sent", "status", "code", "param", "says"),
    [
        ({"json": {}}, 400, 40302, "image", "missing"),
        ({"json": {"image": None}}, 400, 40302, "image", "missing"),
        ({"json": {"image": "%"}}, 400, 40302, "image", "base64"),
        ({"json": {"image": "https://example.org/a.png"}}, 400, 40302, "image", "send the picture itself"),
        ({"json": {"image": encoded(b"GIF89a")}}, 400, 40302, "image", "PNG"),
        ({"json": {"image": [encoded(b"x")] * 2}}, 400, 40302, "image", "2 pictures"),
        ({"json": {"image": {"a": 1}}}, 422, 40001, "image", "text"),
        ({"json": {"image": blank(1001, 1001)}}, 413, 40004, "image", "1000000"),
        ({"json": [1]}, 422, 40001, None, "object"),
        ({"content": b"{"}, 422, 40001, None, "not JSON"),
        ({"content": b"\xff\xfe"}, 422, 40001, None, "not JSON"),
        (form("image", "image"), 400, 40302, "image", "2 pictures"),
        (form(*["image"] * 17), 400, 40302, None, "16"),
        (form("mask"), 400, 40302, "image", "missing"),
        (
            {"content": b"--x\r\nno form", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            *(400, 40302, None, "form"),
        ),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 400, 40302, None, "boundary"),
    ],
)
async def test_bad_bodies(
    client: httpx.AsyncClient, sent: dict[str, Any], status: int, code: int, param: str | None, says: str
) -> None:
    assert says in check(await client.post(INFO, **sent), status, code, param)


@given(data=st.binary(max_size=200), prefix=st.sampled_from(["", "PNG", "JPEG", "WEBP"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_bytes_get_an_answer(client: httpx.AsyncClient, data: bytes, prefix: str) -> None:
    whole = (photo(8, 8, prefix) if prefix else b"") + data
    for sent in ({"json": {"image": base64.b64encode(whole).decode()}}, {"files": {"image": ("x", whole)}}):
        reply = await client.post(INFO, **sent)  # type: ignore[arg-type]
        assert reply.status_code in (200, 400), reply.text
        assert json.loads(reply.content)
