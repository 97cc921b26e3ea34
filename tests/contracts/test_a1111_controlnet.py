"""A1111's ControlNet extension: units of a request, and its own routes."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from pipelines.control.annotators import canny, lineart
from tests.support.http import blank, decoded, encoded, photo, picture, pixels, post

TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
SMALL = {"prompt": "a cat", "width": 128, "height": 128, "steps": 3, "seed": 7, "cfg_scale": 5.0}
OURS = {"output_format": "png", "cfg_scale": 5.0, "prompt_syntax": "weighted"}
PHOTO = encoded(photo(128, 128))


async def drawn(client: httpx.AsyncClient, *units: dict[str, Any], path: str = TXT2IMG, **fields: Any) -> list[str]:
    """The pictures of a request with these units."""
    body = SMALL | fields | {"alwayson_scripts": {"controlnet": {"args": [*units]}}}
    reply = await client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    images: list[str] = reply.json()["images"]
    return images


def control(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "image": PHOTO} | fields


async def test_units_are_controls_of_the_main_route(client: httpx.AsyncClient) -> None:
    canny_unit = {"enabled": True, "model": "canny [0123abcd]", "module": "canny", "image": PHOTO}
    map_unit = {"model": "depth", "module": "none", "input_image": f"data:image/png;base64,{PHOTO}"}
    webuiapis = {"mask": None, "low_vram": False, "processor_res": 512, "threshold_a": 64, "threshold_b": 64}
    webuiapis |= {"resize_mode": "Resize and Fill", "pixel_perfect": False, "hr_option": "Both"}
    webuiapis |= {"weight": 1.0, "guidance_start": 0.0, "guidance_end": 1.0, "control_mode": "Balanced"}
    disabled = {"enabled": False, "model": "nothing", "module": "none"}
    cases: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
        ([canny_unit | webuiapis], [control("canny")]),
        ([map_unit, disabled], [control("depth", preprocess=False)]),
        ([canny_unit | {"weight": 0.5, "guidance_start": 0.3, "control_mode": 2}, map_unit | {"guidance": 0.7}],
         [control("canny", weight=0.5, start=0.3, guess=True), control("depth", preprocess=False, end=0.7)]),
        ([canny_unit | {"image": {"image": PHOTO, "mask": None}, "control_mode": "ControlNet is more important"}],
         [control("canny", guess=True)]),
    ]  # fmt: skip
    for units, controls in cases:
        (image,) = await drawn(client, *units)
        expected = pixels(picture(await post(client, **OURS, controlnets=controls)))
        assert np.array_equal(pixels(decoded(image)), expected), units
    (image,) = await drawn(client, {"model": "canny", "module": "canny"}, path=IMG2IMG, init_images=[PHOTO])
    expected = pixels(picture(await post(client, **OURS, image=PHOTO, strength=0.75, controlnets=[control("canny")])))
    assert np.array_equal(pixels(decoded(image)), expected), "img2img's own picture"


async def test_a_map_is_shown_behind_the_pictures_where_it_is_asked_for(client: httpx.AsyncClient) -> None:
    unit = {"model": "canny", "module": "canny", "image": PHOTO, "save_detected_map": True}
    ready = unit | {"module": "none"}
    images = await drawn(client, unit, ready, batch_size=2)
    assert len(images) == 3
    expected = canny(Image.open(io.BytesIO(base64.b64decode(PHOTO))))
    assert np.array_equal(pixels(decoded(images[2])), pixels(expected))


@pytest.mark.parametrize("mode", [0, 1, "Crop and Resize", "Resize and Fill"])
async def test_a_picture_of_another_shape(client: httpx.AsyncClient, mode: int | str) -> None:
    wide = Image.open(io.BytesIO(photo(256, 128)))
    unit = {"model": "canny", "module": "none", "resize_mode": mode}
    buffer, cut = io.BytesIO(), io.BytesIO()
    wide.save(buffer, "PNG")
    wide.crop((64, 0, 192, 128)).save(cut, "PNG")
    (image,) = await drawn(client, unit | {"image": encoded(buffer.getvalue())})
    (stretched,) = await drawn(client, unit | {"image": encoded(buffer.getvalue()), "resize_mode": 0})
    (middle,) = await drawn(client, unit | {"image": encoded(cut.getvalue())})
    same = [np.array_equal(pixels(decoded(image)), pixels(decoded(other))) for other in (stretched, middle)]
    assert same == {0: [True, False], "Resize and Fill": [False, False]}.get(mode, [False, True])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": "tile"}, "Unexpected ControlNet args.0.model 'tile'"),
    ({"model": "None"}, "'canny'"),
    ({"module": "depth"}, "Only ['none', 'canny'] allowed now"),
    ({"image": None}, "image is missing"),
    ({"image": 7}, "args.0.image"),
    ({"image": "https://example.org/a.png"}, "send the picture itself"),
    ({"image": encoded(b"no picture")}, "PNG"),
    ({"mask": PHOTO}, "mask is not possible"),
    ({"weight": 3}, "less than or equal to 2"),
    ({"guidance_start": 0.8, "guidance_end": 0.2}, "leaves no step"),
    ({"control_mode": "My prompt is more important"}, "'controlnet is more important'"),
    ({"resize_mode": "Twirl"}, "'crop and resize'"),
]


@pytest.mark.parametrize(("change", "says"), BAD)
async def test_units_that_cannot_be_honoured(client: httpx.AsyncClient, change: dict[str, Any], says: str) -> None:
    unit = {"model": "canny", "module": "canny", "image": PHOTO} | change
    reply = await client.post(TXT2IMG, json=SMALL | {"alwayson_scripts": {"ControlNet": {"args": [unit]}}})
    body = reply.json()
    assert (reply.status_code, body["param"]) == (400, "alwayson_scripts"), body
    assert says in body["detail"]


async def test_models_that_require_a_control(client: httpx.AsyncClient) -> None:
    override = {"override_settings": {"sd_model_checkpoint": "SD1.5-ControlNet"}}
    reply = await client.post(TXT2IMG, json=SMALL | override)
    assert (reply.status_code, reply.json()["param"]) == (400, "alwayson_scripts")
    unit = {"model": "canny", "module": "canny", "image": PHOTO}
    assert len(await drawn(client, unit, **override)) == 1
    for scripts in ({"ControlNet": {"args": 7}}, {"ControlNet": {"args": ["x"]}}):
        assert (await client.post(TXT2IMG, json=SMALL | {"alwayson_scripts": scripts})).status_code == 400


async def test_detect_makes_the_maps_that_units_are_steered_by(client: httpx.AsyncClient) -> None:
    given = photo(90, 70)
    image = Image.open(io.BytesIO(given)).convert("RGB")
    for module, field, annotator in (
        ("canny", "controlnet_images", canny),
        ("Lineart", "controlnet_input_images", lineart),
    ):
        body = {"controlnet_module": module, field: [encoded(given)] * 2, "controlnet_processor_res": 512}
        reply = (await client.post("/controlnet/detect", json=body)).json()
        assert reply["info"] == "Success"
        for text in reply["images"]:
            assert np.array_equal(pixels(decoded(text)), pixels(annotator(image)))
    bad = [
        ({"controlnet_module": "none", "controlnet_images": [PHOTO]}, 400, "'canny'"),
        ({"controlnet_module": "canny"}, 400, "no picture"),
        ({"controlnet_module": "canny", "controlnet_images": [encoded(b"x")]}, 400, "PNG"),
        ({"controlnet_module": "canny", "controlnet_images": [blank(1001, 1001)]}, 413, "1000000"),
        ({"controlnet_module": "canny", "controlnet_images": PHOTO}, 422, "list"),
    ]  # fmt: skip
    for body, status, says in bad:
        reply = await client.post("/controlnet/detect", json=body)
        assert reply.status_code == status, reply.text
        assert says in reply.json()["errors"]
