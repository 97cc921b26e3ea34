"""Every picture that is drawn says so, whichever route it leaves by: as exiftool reads it, and as we do."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines.pictures.images import check_image
from tests.support.http import encoded, events, photo
from tests.support.http import post as ask

VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DRAWN, CHANGED = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
PHOTO = encoded(photo(128, 128))
OPENAI = {"model": "SD1.5", "prompt": "a cat", "size": "128x128", "steps": 3, "seed": 7}
WEBUI = {"prompt": "a cat", "width": 128, "height": 128, "steps": 3, "seed": 7}
Draw = Callable[[httpx.AsyncClient], Awaitable[list[tuple[str, str]]]]
"""Asks one route in its several ways; returns pictures in base64 with what they are to say of themselves."""


async def hyperbolic(client: httpx.AsyncClient) -> list[tuple[str, str]]:
    found = [(await ask(client, output_format=output_format), DRAWN) for output_format in ("jpeg", "png", "webp")]
    found.append((await ask(client, image=PHOTO, strength=0.7), CHANGED))
    found.append((await ask(client, hires={"scale": 1.5, "steps": 1}), DRAWN))
    pictures = [(reply.json()["images"][0]["image"], kind) for reply, kind in found]
    streamed = events((await ask(client, stream=True, preview=True)).text)
    pictures += [(data["image"], DRAWN) for name, data in streamed if name == "preview"]
    pictures += [(data["images"][0]["image"], DRAWN) for name, data in streamed if name == "result"]
    raw = await client.post("/v1/image/generation", json=WEBUI | {"model_name": "SD1.5"}, headers={"accept": "image/*"})
    return [*pictures, (encoded(raw.content), DRAWN)]


async def generations(client: httpx.AsyncClient) -> list[tuple[str, str]]:
    plain = (await client.post("/v1/images/generations", json=OPENAI | {"n": 2})).json()["data"]
    linked = (await client.post("/v1/images/generations", json=OPENAI | {"response_format": "url"})).json()["data"]
    streamed = await client.post("/v1/images/generations", json=OPENAI | {"stream": True, "partial_images": 2})
    told = [data["b64_json"] for _, data in events(streamed.text.rpartition("data: ")[0])]
    assert len(told) == 3
    pictures = [*told, *(item["b64_json"] for item in plain), linked[0]["url"].partition(",")[2]]
    return [(picture, DRAWN) for picture in pictures]


async def edits(client: httpx.AsyncClient) -> list[tuple[str, str]]:
    mask = encoded(photo(128, 128))
    replies = [
        await client.post("/v1/images/edits", json=OPENAI | more | {"image": PHOTO}) for more in ({}, {"mask": mask})
    ]
    return [(reply.json()["data"][0]["b64_json"], CHANGED) for reply in replies]


async def by_url(client: httpx.AsyncClient) -> list[tuple[str, str]]:
    parameters = {"width": 128, "height": 128, "num_inference_steps": 3}
    reply = await client.post("/models/SD1.5", json={"inputs": "a cat", "parameters": parameters})
    return [(encoded(reply.content), DRAWN)]


async def upscale(client: httpx.AsyncClient) -> list[tuple[str, str]]:
    """Of a drawn picture."""
    drawn = (await ask(client)).json()["images"][0]["image"]
    reply = await client.post("/v1/images/upscale", json={"image": drawn, "scale": 2, "upscaler": "lanczos"})
    return [(reply.json()["images"][0]["image"], DRAWN)]


async def extras(client: httpx.AsyncClient) -> list[tuple[str, str]]:
    """Of a drawn picture."""
    drawn = (await ask(client)).json()["images"][0]["image"]
    reply = await client.post("/sdapi/v1/extra-single-image", json={"image": drawn, "upscaler_1": "Lanczos"})
    return [(reply.json()["image"], DRAWN)]


async def extra_batch(client: httpx.AsyncClient) -> list[tuple[str, str]]:
    pictures = [{"data": (await ask(client)).json()["images"][0]["image"], "name": "a"}]
    reply = await client.post("/sdapi/v1/extra-batch-images", json={"imageList": pictures, "upscaler_1": "Lanczos"})
    return [(reply.json()["images"][0], DRAWN)]


async def txt2img(client: httpx.AsyncClient) -> list[tuple[str, str]]:
    pictures = []
    for more in (
        {"batch_size": 2},
        {"override_settings": {"samples_format": "webp"}},
        {"enable_hr": True, "hr_scale": 1.5},
    ):
        pictures += (await client.post("/sdapi/v1/txt2img", json=WEBUI | more)).json()["images"]
    drawing = asyncio.create_task(client.post("/sdapi/v1/txt2img", json=WEBUI | {"steps": 100}))
    preview = None
    while preview is None and not drawing.done():
        preview = (await client.get("/sdapi/v1/progress")).json()["current_image"]
        await asyncio.sleep(0)
    await drawing
    assert preview is not None
    pictures.append(preview)
    return [(picture, DRAWN) for picture in pictures]


async def img2img(client: httpx.AsyncClient) -> list[tuple[str, str]]:
    pictures = []
    for more in ({}, {"mask": encoded(photo(128, 128)), "inpaint_full_res": True}):
        reply = await client.post("/sdapi/v1/img2img", json=WEBUI | more | {"init_images": [PHOTO]})
        pictures += reply.json()["images"]
    return [(picture, CHANGED) for picture in pictures]


ROUTES: dict[str, Draw] = {
    "/v1/image/generation": hyperbolic,
    "/v1/images/generations": generations,
    "/v1/images/edits": edits,
    "/v1/images/upscale": upscale,
    "/models/{name}": by_url,
    "/sdapi/v1/txt2img": txt2img,
    "/sdapi/v1/img2img": img2img,
    "/sdapi/v1/extra-single-image": extras,
    "/sdapi/v1/extra-batch-images": extra_batch,
}
DRAW_NOTHING = {
    *("/v1/images/info", "/v1/loras/refresh"),
    *("/sdapi/v1/options", "/sdapi/v1/interrupt", "/sdapi/v1/skip", "/sdapi/v1/png-info"),
    *(f"/sdapi/v1/refresh-{what}" for what in ("checkpoints", "loras", "vae", "embeddings")),
    "/controlnet/detect",
}
"""Control maps are measurements of a photo, not drawn."""


async def test_the_list_contains_every_route_that_draws(client: httpx.AsyncClient) -> None:
    """A new one belongs into one list or the other."""
    document = (await client.get("/openapi.json")).json()
    posts = {path.replace(":path", "") for path, methods in document["paths"].items() if "post" in methods}
    assert posts == set(ROUTES) | DRAW_NOTHING


async def test_pictures_of_every_route_are_marked(client: httpx.AsyncClient, tmp_path: Path) -> None:
    expected = {}
    for number, (route, draw) in enumerate(ROUTES.items()):
        for index, (picture, kind) in enumerate(await draw(client)):
            data = base64.b64decode(picture, validate=True)
            file = check_image(data, "image", 10**6)
            assert file.digital_source_type == kind, route
            path = tmp_path / f"{number}-{index}.{file.format}"
            path.write_bytes(data)
            expected[str(path)] = f"{VOCABULARY}{kind}"
    if shutil.which("exiftool") is None:
        pytest.skip("exiftool (Debian: libimage-exiftool-perl) is not here; our own reader found every mark")
    command = ["exiftool", "-json", "-n", "-DigitalSourceType", *expected]
    done = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True)
    told: list[dict[str, Any]] = json.loads(done.stdout)
    assert {one["SourceFile"]: one.get("DigitalSourceType") for one in told} == expected
