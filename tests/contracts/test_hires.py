"""A second pass over HTTP: plain and streamed, through OpenAI's routes, read back from its file, refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest

from config.catalog import Catalog
from deployments.graph import Graph
from tests.support.graph import FakeGraph
from tests.support.http import check, decoded, encoded, events, photo, picture, pixels, post
from tests.support.ingress import ClientFactory

HIRES: dict[str, Any] = {"scale": 1.5, "steps": 2, "strength": 0.6}


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
async def test_a_stream_draws_the_same_picture_and_counts_its_stages(client: httpx.AsyncClient, upscaler: str) -> None:
    fields = {"hires": HIRES | {"upscaler": upscaler}, "output_format": "png"}
    plain = picture(await post(client, **fields))
    assert plain.size == (192, 192)
    told = events((await post(client, stream=True, preview=True, **fields)).text)
    steps = [data for name, data in told if name == "progress" and data["state"] == "denoising"]
    counted = [(data["stage_number"], data["stages"], data["steps"]) for data in steps]
    assert counted == [(1, 2, 3)] * 3 + [(2, 2, 2)] * 2
    assert [name for name, _ in told].count("preview") == 3
    watched = decoded(told[-1][1]["images"][0]["image"])
    assert np.array_equal(pixels(watched), pixels(plain))


async def test_a_picture_is_drawn_again_from_its_file(client: httpx.AsyncClient) -> None:
    steered = {"model_name": "SD1.5-ControlNet", "controlnet_name": "canny", "controlnet_image": encoded(photo())}
    fields = {"hires": HIRES | {"upscaler": "latent-bicubic"}, "output_format": "png", "clip_skip": 2}
    drawn = await post(client, **steered, **fields)
    file = drawn.json()["images"][0]["image"]
    told = (await client.post("/v1/images/info", json={"image": file})).json()
    assert (told["width"], told["height"], told["needs"]) == (192, 192, ["controlnets.0.image"])
    told["request"]["controlnets"][0]["image"] = encoded(photo())
    again = await client.post("/v1/image/generation", json=told["request"])
    assert np.abs(pixels(picture(again)) - pixels(picture(drawn))).max() <= 1


async def test_openais_routes_take_it_too_and_tell_the_size_that_is_drawn(client: httpx.AsyncClient) -> None:
    body = {"model": "SD1.5", "prompt": "a cat", "size": "128x128", "seed": 3, "steps": 3, "hires": HIRES}
    reply = await client.post("/v1/images/generations", json=body)
    assert reply.json()["size"] == "192x192"
    files, form = {"image": ("a.png", photo(), "image/png")}, body | {"hires": json.dumps(HIRES)}
    edited = await client.post("/v1/images/edits", files=files, data={k: str(v) for k, v in form.items()})
    assert edited.status_code == 200, edited.text
    assert decoded(edited.json()["data"][0]["b64_json"]).size == (192, 192)


async def test_each_pass_has_a_control_map_and_a_deadline_of_its_own(
    connect: ClientFactory, graph: Graph, catalog: Catalog
) -> None:
    steered = {"model_name": "SD1.5-ControlNet", "controlnet_name": "canny", "controlnet_image": encoded(photo())}
    watching = FakeGraph(graph)
    async with connect(graph=watching, catalog=catalog) as client:
        await post(client, hires=HIRES | {"upscaler": "lanczos"}, **steered)
    sizes = [(call["stage"].width, call["stage"].height) for call in watching.named("prepare")]
    assert sizes == [(128, 128), (192, 192)]
    assert len(watching.named("enlarge")) == 1
    assert len({call["expires"] for call in watching.named("denoise")}) == 1


@pytest.mark.parametrize(
    ("hires", "message"),
    [
        ({"scale": 20}, "hires.scale: Input should be less than or equal to 8"),
        ({"steps": 0}, "hires.steps: Input should be greater than or equal to 1"),
        ({"strength": 0}, "hires.strength: Input should be greater than 0"),
        ({"strength": 1.5}, "hires.strength: Input should be less than or equal to 1"),
        ({"upscaler": "nope"}, "Only ['latent', 'latent-antialiased', "),
        ({"scale": 8, "steps": 1000, "strength": 1.0}, "pixels x steps"),
    ],
)
async def test_what_is_refused(client: httpx.AsyncClient, hires: dict[str, Any], message: str) -> None:
    reply = await post(client, hires=hires, steps=1, sampler="Euler a")
    assert message in check(reply, 400, 40302, "hires")
