"""OpenAI's Images API, as its clients speak it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from config.catalog import Catalog
from deployments.graph import Graph, Progress, Sealed
from pipelines.pictures.images import read_plan
from pipelines.plan import GenerationPlan
from tests.support.graph import FakeGraph, never
from tests.support.http import blank, check, check_body, encoded, events, photo, picture, pixels, post
from tests.support.ingress import ClientFactory

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
SMALL = {"model": "SD1.5", "prompt": "a cat", "size": "128x128", "steps": 3, "seed": 7}


async def generate(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await client.post(GENERATIONS, json=SMALL | fields)
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


def opened(item: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def plan_of(item: dict[str, Any]) -> GenerationPlan:
    return GenerationPlan.model_validate_json(read_plan(base64.b64decode(item["b64_json"])) or "")


async def test_the_reply_has_what_clients_read(client: httpx.AsyncClient) -> None:
    body = await generate(client, n=2, quality="standard", user="u", moderation="low", unheard_of=1)
    assert isinstance(body["created"], int)
    assert (body["background"], body["output_format"], body["quality"], body["size"]) == (
        *("opaque", "png", "standard", "128x128"),
    )
    zeros = {"text_tokens": 0, "image_tokens": 0}
    tokens = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0, "input_tokens_details": zeros}
    assert body["usage"] == tokens
    first, second = body["data"]
    assert set(first) == {"b64_json", "seed"}
    assert (first["seed"], second["seed"]) == (7, 8)
    assert opened(first).format == "PNG"
    assert np.abs(pixels(opened(first)) - pixels(opened(second))).max() > 1


async def test_the_seed_and_the_other_dialect_draw_the_same(client: httpx.AsyncClient) -> None:
    ours = {"negative_prompt": "fog", "cfg_scale": 3.0, "sampler": "Euler a", "loras": {"Pixel_Art": 0.5}}
    named = {"negative_prompt": "fog", "guidance_scale": 3.0, "sampler": "Euler a", "num_inference_steps": 3}
    together = {"image_loras": [{"path": "Pixel_Art", "scale": 0.5}], "response_format": "base64"}
    body = {k: v for k, v in SMALL.items() if k != "steps"} | named | together
    theirs = (await client.post(GENERATIONS, json=body)).json()["data"][0]
    other = picture(await post(client, output_format="png", **ours))
    assert np.abs(pixels(opened(theirs)) - pixels(other)).max() <= 1


@pytest.mark.parametrize(
    ("loras", "expected"),
    [
        ({"Pixel_Art": 0.5}, 0.5),
        ([{"name": "Pixel_Art", "weight": 0.25}], 0.25),
        ({"name": "Pixel_Art", "path": "/x", "scale": 0.75}, 0.75),
        ([{"path": "Pixel_Art"}], 1.0),
        ('{"Pixel_Art": 0.5}', 0.5),
    ],
)
@pytest.mark.parametrize("field", ["loras", "lora", "image_loras"])
async def test_every_spelling_of_loras(client: httpx.AsyncClient, loras: Any, expected: float, field: str) -> None:
    (use,) = plan_of((await generate(client, **{field: loras}))["data"][0]).stages[0].loras
    assert (use.name, use.weight) == ("Pixel_Art", expected)


@pytest.mark.parametrize(
    ("fields", "model"),
    [
        ({}, "SD1.5"),
        ({"model": None}, "SD1.5"),
        ({"model": ""}, "SD1.5"),
        ({"model": "gpt-image-1"}, "SD1.5"),
        ({"model": "DALL-E-2"}, "SD1.5"),
        ({"model": "SD2"}, "SD2"),
    ],
)
async def test_models_by_default_and_by_foreign_names(
    client: httpx.AsyncClient, fields: dict[str, Any], model: str
) -> None:
    body = {"prompt": "x", "size": "128x128", "steps": 2} | fields
    assert plan_of((await client.post(GENERATIONS, json=body)).json()["data"][0]).model == model


async def test_model_name_decides_for_the_other_dialect(client: httpx.AsyncClient) -> None:
    body = SMALL | {"model_name": "SD2", "width": 128, "height": 128}
    assert set((await client.post(GENERATIONS, json=body)).json()) == {"images", "inference_time"}
    assert "data" in (await client.post(GENERATIONS, json=body | {"model_name": None})).json()


@pytest.mark.parametrize(
    ("quality", "steps"), [("low", 15), ("medium", 30), ("auto", 30), ("hd", 45), ("xhigh", 60), (None, 30)]
)
async def test_quality_is_steps(
    connect: ClientFactory, graph: Graph, catalog: Catalog, quality: str | None, steps: int
) -> None:
    seen: list[int] = []

    async def decode(**arguments: Any) -> None:
        seen.append(arguments["plan"].stages[0].schedule.steps)
        raise RuntimeError

    fake = FakeGraph(decode=decode)
    async with connect(graph=fake) as client:
        await client.post(GENERATIONS, json={"prompt": "x", "size": "128x128", "quality": quality})
        await client.post(GENERATIONS, json={"prompt": "x", "size": "128x128", "quality": quality, "steps": 4})
    assert seen == [steps, 4], "steps that are sent win"


async def test_formats_and_compression(client: httpx.AsyncClient) -> None:
    sizes = {}
    for compression in (5, 95):
        (item,) = (await generate(client, output_format="webp", output_compression=compression))["data"]
        assert opened(item).format == "WEBP"
        sizes[compression] = len(item["b64_json"])
    assert sizes[5] < sizes[95]
    (item,) = (await generate(client, response_format="url", output_format="jpeg"))["data"]
    assert set(item) == {"url", "seed"}
    scheme, _, data = item["url"].partition(",")
    assert scheme == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).format == "JPEG"
    assert opened((await generate(client, output_compression=100))["data"][0]).format == "PNG"


async def test_a_stream_of_one(client: httpx.AsyncClient) -> None:
    fields = SMALL | {"stream": True, "partial_images": 2, "steps": 9, "quality": "high"}
    reply = await client.post(GENERATIONS, json=fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    body, _, done = reply.text.rpartition("data: ")
    assert done == "[DONE]\n\n"
    told = events(body)
    assert [name for name, _ in told] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert all(data["type"] == name for name, data in told)
    assert [data["partial_image_index"] for _, data in told[:-1]] == [0, 1]
    for _, data in told:
        assert {data[key] for key in ("quality", "background", "output_format", "size")} == {
            *("high", "opaque", "png", "128x128"),
        }
        assert opened(data).format == "PNG"
        assert isinstance(data["created_at"], int)
    last = told[-1][1]
    assert last["usage"]["total_tokens"] == 0
    plain = (await generate(client, steps=9))["data"][0]
    assert np.abs(pixels(opened(last)) - pixels(opened(plain))).max() <= 1


async def test_a_stream_of_several_and_without_partials(client: httpx.AsyncClient) -> None:
    reply = await client.post(GENERATIONS, json=SMALL | {"stream": True, "n": 3})
    told = events(reply.text.rpartition("data: ")[0])
    assert [name for name, _ in told] == ["image_generation.completed"] * 3
    assert sorted(data["seed"] for _, data in told) == [7, 8, 9]


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_the_first_partial_image_comes_with_the_first_step(
    connect: ClientFactory, graph: Graph, count: int
) -> None:
    """And no preview is decoded that is not sent."""
    watched = FakeGraph(graph)
    async with connect(graph=watched) as client:
        await client.post(GENERATIONS, json=SMALL | {"stream": True, "partial_images": count, "steps": 10})
        assert len(watched.named("preview")) == count
    steps: list[int] = []

    async def denoise(**_: Any) -> AsyncGenerator[Any, None]:
        for step in range(1, 11):
            steps.append(step)
            yield Progress("unet-sd15", step, 10, latents=Sealed(b""))
        yield Sealed(b"")

    async def preview(**_: Any) -> bytes:
        shown.append(steps[-1])
        return b""

    shown: list[int] = []
    async with connect(graph=FakeGraph(denoise_watched=denoise, preview=preview)) as client:
        await client.post(GENERATIONS, json=SMALL | {"stream": True, "partial_images": count, "steps": 10})
    assert shown == {1: [1], 2: [1, 5], 3: [1, 4, 7]}[count]


async def test_a_stream_that_fails_says_so_as_the_sdk_reads_it(connect: ClientFactory) -> None:
    async def denoise(**_: Any) -> AsyncGenerator[Any, None]:
        yield Progress("unet-sd15", 1, 3)
        raise RuntimeError("secret")

    async with connect(graph=FakeGraph(denoise_watched=denoise)) as client:
        reply = await client.post(GENERATIONS, json=SMALL | {"stream": True, "n": 2})
    name, data = events(reply.text)[-1]
    assert name == "error"
    assert "secret" not in check_body(data, 50001, None)
    assert data["error"]["message"]
    assert "[DONE]" not in reply.text


async def test_closing_a_stream_of_several_pictures_cancels_all(connect: ClientFactory) -> None:
    ended = []

    async def denoise(**_: Any) -> AsyncGenerator[Any, None]:
        try:
            yield Progress("unet-sd15", 1, 3)
            await never()
        finally:
            ended.append(1)

    async with connect(graph=FakeGraph(denoise_watched=denoise), deadline_s=0.2) as client:
        await client.post(GENERATIONS, json=SMALL | {"stream": True, "n": 3})
    assert len(ended) == 3


def form(**fields: Any) -> dict[str, Any]:
    """A form as the SDKs send one: everything is text."""
    return {"data": {"prompt": "a cat", "size": "128x128", "steps": "3", "seed": "7", **fields}}


async def test_an_edit_is_img2img(client: httpx.AsyncClient) -> None:
    source = photo(160, 120)
    ours = picture(await post(client, image=encoded(source), strength=0.6, output_format="png"))
    uri = "data:image/png;base64," + encoded(source)
    fields = {"prompt": "a cat", "size": "128x128", "steps": 3, "seed": 7, "strength": 0.6}
    sent: list[dict[str, Any]] = [
        {"files": {"image": ("a.png", source)}, **form(strength="0.6")},
        {"files": [("image[]", ("a.png", source))], **form(strength="0.6", n="1", stream="false", loras="")},
        {"json": fields | {"images": [{"image_url": uri}]}},
        {"json": fields | {"images": [{"image_url": {"url": uri}}]}},
        {"json": fields | {"image": encoded(source)}},
    ]
    for one in sent:
        reply = await client.post(EDITS, **one)
        assert reply.status_code == 200, reply.text
        assert np.abs(pixels(opened(reply.json()["data"][0])) - pixels(ours)).max() <= 1


async def test_generations_take_a_picture_too(client: httpx.AsyncClient) -> None:
    plain = picture(await post(client, image=encoded(photo()), strength=0.6, output_format="png"))
    for name in ("image", "image_url"):
        (item,) = (await generate(client, **{name: encoded(photo()), "strength": 0.6}))["data"]
        assert plan_of(item).source is not None
    assert plain.size == (128, 128)


async def test_an_edit_streams(client: httpx.AsyncClient) -> None:
    sent = {"files": {"image": ("a.png", photo())}, **form(stream="true", partial_images="1", strength="1")}
    told = events((await client.post(EDITS, **sent)).text.rpartition("data: ")[0])
    assert [name for name, _ in told] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("shape", "size"), [((90, 60), "768x512"), ((60, 90), "512x768"), ((64, 64), "512x512"), ((400, 40), "768x512")]
)
async def test_an_edit_keeps_the_shape(connect: ClientFactory, shape: tuple[int, int], size: str) -> None:
    plans: list[GenerationPlan] = []

    async def decode(**arguments: Any) -> None:
        plans.append(arguments["plan"])
        raise RuntimeError

    async with connect(graph=FakeGraph(decode=decode)) as client:
        for fields in ({}, {"size": "auto"}, {"input_fidelity": "high"}):
            data = {"prompt": "a cat", **fields}
            await client.post(EDITS, data=data, files={"image": ("a.png", photo(*shape))})
    assert {f"{plan.width}x{plan.height}" for plan in plans} == {size}
    assert [plan.stages[0].schedule.strength for plan in plans] == [0.8, 0.8, 0.5]


BAD: list[tuple[dict[str, Any], int, int, str | None, str]] = [
    ({"background": "transparent"}, 400, 40302, "background", "['auto', 'opaque']"),
    ({"style": "natural"}, 400, 40302, "style", "['vivid']"),
    ({"quality": "best"}, 400, 40302, "quality", "'hd'"),
    ({"response_format": "file"}, 400, 40302, "response_format", "['b64_json', 'base64', 'url']"),
    ({"output_format": "gif"}, 400, 40302, "output_format", "['jpeg', 'png', 'webp']"),
    ({"output_compression": 50}, 400, 40302, "output_compression", "png"),
    ({"output_compression": 101}, 400, 40302, "output_compression", "100"),
    ({"n": 0}, 400, 40302, "n", "1"),
    ({"n": 11}, 400, 40302, "n", "10"),
    ({"partial_images": 4}, 400, 40302, "partial_images", "3"),
    ({"frame_count": 2}, 400, 40302, "frame_count", "1"),
    ({"reference_images": ["x"]}, 400, 40302, "image", "reference_images"),
    ({"size": "128"}, 400, 40302, "size", "pattern"),
    ({"size": "132x128"}, 400, 40302, "width", "[128, 136]"),
    ({"width": 256}, 400, 40302, "size", "disagree"),
    ({"model": "gpt-image-9"}, 400, 40301, "model_name", "Only ["),
    ({"image_url": "https://example.org/a.png"}, 400, 40302, "image", "send the picture itself"),
    ({"prompt": ""}, 400, 40302, "prompt", "at least 1"),
    ({"loras": {"Nope": 1}}, 400, 40302, "loras", "Nope"),
    ({"loras": [{"name": "Pixel_Art"}, {"path": "Pixel_Art"}]}, 400, 40302, "loras", "twice"),
    ({"loras": "{"}, 422, 40001, "loras", "dictionary"),
    ({"loras": 3}, 422, 40001, "loras", "dictionary"),
    ({"n": "many"}, 422, 40001, "n", "integer"),
    ({"prompt": None}, 422, 40001, "prompt", "required"),
]


@pytest.mark.parametrize(("fields", "status", "code", "param", "says"), BAD)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_honoured_is_refused(
    client: httpx.AsyncClient, fields: dict[str, Any], status: int, code: int, param: str, says: str, stream: bool
) -> None:
    reply = await client.post(GENERATIONS, json=SMALL | {"stream": stream} | fields)
    assert says in check(reply, status, code, param)


BAD_EDITS: list[tuple[dict[str, Any], int, int, str | None, str]] = [
    ({"json": {"prompt": "x"}}, 400, 40302, "image", "missing"),
    ({"json": {"prompt": "x", "images": []}}, 400, 40302, "image", "missing"),
    ({"json": {"prompt": "x", "images": [{"file_id": "f"}]}}, 400, 40302, "image", "keeps no files"),
    ({"json": {"prompt": "x", "images": [{"image_url": "http://x/a.png"}]}}, 400, 40302, "image", "picture itself"),
    ({"json": {"prompt": "x", "image": 7}}, 400, 40302, "image", "is not a picture"),
    ({"json": {"prompt": "x", "image": encoded(b"no picture")}}, 400, 40302, "image", "PNG"),
    ({"json": {"prompt": "x", "image": blank(1001, 1001)}}, 413, 40004, "image", "1000000"),
    ({"json": {"prompt": "x", "image": blank(9, 9), "mask": blank(1001, 1001)}}, 413, 40004, "mask", "1000000"),
    ({"files": [("image[]", photo())] * 2, **form()}, 400, 40302, "image", "2 pictures"),
    ({"files": [("image[]", photo())] * 17, **form()}, 400, 40302, None, "16"),
    ({"files": {"image": photo(), "mask": bytes(2 * 2**20)}, **form()}, 413, 40004, None, "body"),
    ({"files": {"image": photo()}, **form(markup="x")}, 400, 40302, "markup", "markup"),
    ({"files": {"image": photo(90, 70), "mask": photo(90, 60)}, **form()}, 400, 40302, "mask", "90x60"),
    (
        {"files": {"image": photo(), "mask": base64.b64decode(blank(90, 70))}, **form()},
        *(400, 40302, "mask", "mask is black all over, so nothing would be repainted: make it transparent, or white,"),
    ),
    ({"json": {"prompt": "x", "image": encoded(photo()), "mask": "https://x/m.png"}}, 400, 40302, "mask", "itself"),
    ({"files": {"image": photo()}, **form(mask="https://x/m.png")}, 400, 40302, "mask", "picture itself"),
    ({"files": {"image": b""}, **form()}, 400, 40302, "image", "empty"),
    ({"files": {"image": photo()}, "data": {"size": "128x128"}}, 422, 40001, "prompt", "required"),
]


@pytest.mark.parametrize(("sent", "status", "code", "param", "says"), BAD_EDITS)
async def test_bad_edits(
    client: httpx.AsyncClient, sent: dict[str, Any], status: int, code: int, param: str | None, says: str
) -> None:
    assert says in check(await client.post(EDITS, **sent), status, code, param)


async def test_forms_are_bounded(client: httpx.AsyncClient) -> None:
    many = {f"f{i}": "x" for i in range(201)}
    reply = await client.post(EDITS, data=many, files={"image": photo()})
    assert "200" in check(reply, 400, 40302, None)
    assert json.loads(reply.content)
