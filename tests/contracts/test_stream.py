"""Server-sent events of a watched request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.types import Message

from config.catalog import Catalog
from deployments.api import events as event_stream
from deployments.api.hyperbolic import tell
from deployments.graph import Graph, Progress, Sealed
from tests.support.graph import FakeGraph, never, unending
from tests.support.http import PATH, SMALL, check, decoded, encoded, events, photo, picture, pixels, post
from tests.support.ingress import ClientFactory, make_app


async def test_progress_then_the_same_reply(client: httpx.AsyncClient) -> None:
    fields = {"output_format": "png", "steps": 5, "sampler": "Heun"}
    reply = await post(client, stream=True, **fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    told = events(reply.text)
    assert told[0] == ("progress", {"state": "queued", "stage": "unet-sd15", "position": 0})
    steps = [data["step"] for name, data in told if name == "progress" and data["state"] == "denoising"]
    assert steps == sorted(steps)
    assert steps[-1] == 5
    assert {data["steps"] for name, data in told if "steps" in data} == {5}
    name, result = told[-1]
    assert name == "result"
    assert set(result) == {"images", "inference_time", "prompt_tokens"}
    watched = decoded(result["images"][0]["image"])
    assert np.array_equal(pixels(watched), pixels(picture(await post(client, **fields))))


async def test_stages_tell_their_progress_in_turn(client: httpx.AsyncClient) -> None:
    body = SMALL | {"model_name": "SDXL1.0-base", "width": 256, "height": 256, "steps": 10, "enable_refiner": True}
    told = events((await client.post("/v1/image/generation", json=body | {"stream": True})).text)
    stages = [data["stage"] for name, data in told if name == "progress" and data["state"] == "denoising"]
    assert stages == ["unet-sdxl-base"] * stages.count("unet-sdxl-base") + ["refiner-sdxl"] * stages.count(
        "refiner-sdxl"
    )
    assert len(stages) == 10, "the two stages share the schedule"
    assert 0 < stages.count("refiner-sdxl") < 5


async def test_previews_are_small_pictures(client: httpx.AsyncClient) -> None:
    told = events((await post(client, stream=True, preview=True, width=512, height=384, steps=4)).text)
    previews = [data["image"] for name, data in told if name == "preview"]
    assert len(previews) == 3, "every step but the last"
    sizes = {decoded(preview).size for preview in previews}
    assert sizes == {(256, 192)}


async def test_a_bad_request_is_refused_before_the_stream(client: httpx.AsyncClient) -> None:
    check(await post(client, stream=True, sampler="nope"), 400, 40302, "sampler")


@pytest.mark.parametrize("blocked", [False, True], ids=["between events", "in the middle of sending one"])
async def test_leaving_a_stream_ends_its_work_before_the_response_returns(catalog: Catalog, blocked: bool) -> None:
    left, ended = asyncio.Event(), asyncio.Event()

    async def steps(**_: Any) -> AsyncGenerator[Progress, None]:
        try:
            for step in (1, 2, 3):
                yield Progress("unet-sd15", step, 400)
            await never()
        finally:
            ended.set()

    body = [json.dumps(SMALL | {"stream": True}).encode()]

    async def receive() -> Message:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if b'"step": 3' in message.get("body", b""):
            left.set()
            if blocked:  # the connection's buffer is full
                await never()

    graph = FakeGraph(denoise_watched=steps, encode_text=never)
    scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b""}
    scope |= {"server": ("127.0.0.1", 80), "http_version": "1.1", "asgi": {"spec_version": "2.3"}}
    await make_app(graph=graph, catalog=catalog)(scope, receive, send)
    assert ended.is_set()
    assert [response.cancelled for response in graph.responses] == [True], "the text was asked for and never came"


async def test_text_and_control_map_are_asked_for_together(connect: ClientFactory) -> None:
    """Neither waits for the other, watched or not."""
    for stream in (False, True):
        graph = FakeGraph(encode_text=never, prepare=never, denoise=never, decode=never, denoise_watched=unending)
        control = {"model_name": "SD1.5-ControlNet", "controlnet_name": "canny", "controlnet_image": encoded(photo())}
        async with connect(graph=graph, deadline_s=0.05) as client:
            await post(client, stream=stream, **control)
        assert graph.named("encode_text")
        assert graph.named("prepare")


async def test_silence_is_broken_by_comments(connect: ClientFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies end connections that are silent; parsers skip comments."""
    quiet = asyncio.Event()

    async def denoise(**_: Any) -> AsyncGenerator[Any, None]:
        yield Progress("unet-sd15", 1, 2)
        await quiet.wait()
        yield Progress("unet-sd15", 2, 2)

    def heard(data: bytes) -> bytes:
        if data.startswith(b": keep-alive"):
            quiet.set()
        return data

    monkeypatch.setattr(event_stream, "KEEP_ALIVE_S", 0.001)
    items = denoise()
    told = [heard(data) async for data in event_stream.events(await anext(items), items, tell, "id")]
    kept = [data for data in told if not data.startswith(b":")]
    assert len(kept) == 3, "the events and an empty end"
    assert len(told) > len(kept)


async def test_an_ingress_that_serves_streams_has_no_torch(connect: ClientFactory, graph: Graph) -> None:
    """What passes through it stays sealed."""
    watched = FakeGraph(graph)
    async with connect(graph=watched) as client:
        assert events((await post(client, stream=True, preview=True)).text)[-1][0] == "result"
    (decode,) = watched.named("decode")
    assert isinstance(decode["latents"], Sealed)
    assert all(isinstance(preview["latents"], Sealed) for preview in watched.named("preview"))
