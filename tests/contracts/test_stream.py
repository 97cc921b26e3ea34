"""Server-sent events of a watched request."""

from __future__ import annotations

import base64
import io
import json
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.contracts.conftest import ClientFactory
from tests.contracts.test_errors import check
from tests.contracts.test_generation import SMALL, picture, pixels, post


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Events of a stream, as a browser's EventSource would see them."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields["event"], json.loads(fields["data"])))
    return found


async def test_progress_then_the_same_reply(client: httpx.AsyncClient) -> None:
    fields = {"output_format": "png", "steps": 5, "sampler": "Heun"}
    reply = await post(client, stream=True, **fields)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = parse(reply.text)
    assert events[0] == ("progress", {"state": "queued", "stage": "unet-sd15", "position": 0})
    steps = [data["step"] for name, data in events if name == "progress" and data["state"] == "denoising"]
    assert steps == sorted(steps)
    assert steps[-1] == 5
    assert {data["steps"] for name, data in events if "steps" in data} == {5}
    name, result = events[-1]
    assert name == "result"
    assert set(result) == {"images", "inference_time"}
    watched = Image.open(io.BytesIO(base64.b64decode(result["images"][0]["image"])))
    assert np.array_equal(pixels(watched), pixels(picture(await post(client, **fields))))


async def test_stages_tell_their_progress_in_turn(client: httpx.AsyncClient) -> None:
    body = SMALL | {"model_name": "SDXL1.0-base", "width": 256, "height": 256, "steps": 10, "enable_refiner": True}
    events = parse((await client.post("/v1/image/generation", json=body | {"stream": True})).text)
    stages = [data["stage"] for name, data in events if name == "progress" and data["state"] == "denoising"]
    assert stages == ["unet-sdxl-base"] * stages.count("unet-sdxl-base") + ["refiner-sdxl"] * stages.count(
        "refiner-sdxl"
    )
    assert len(stages) == 10, "the two stages share the schedule"
    assert 0 < stages.count("refiner-sdxl") < 5


async def test_previews_are_small_pictures(client: httpx.AsyncClient) -> None:
    events = parse((await post(client, stream=True, preview=True, width=512, height=384, steps=4)).text)
    previews = [data["image"] for name, data in events if name == "preview"]
    assert len(previews) == 3, "every step but the last"
    sizes = {Image.open(io.BytesIO(base64.b64decode(preview))).size for preview in previews}
    assert sizes == {(256, 192)}


async def test_a_bad_request_is_refused_before_the_stream(client: httpx.AsyncClient) -> None:
    check(await post(client, stream=True, sampler="nope"), 400, 40302, "sampler")


async def test_a_fault_is_an_event_of_its_own(connect: ClientFactory, handles: dict[str, Any]) -> None:
    async def fail() -> None:
        raise RuntimeError("password=hunter2")

    decode = SimpleNamespace(remote=lambda *_: fail())
    async with connect(handles=handles | {"vae-sd15": SimpleNamespace(decode=decode)}) as client:
        reply = await post(client, stream=True)
        name, data = parse(reply.text)[-1]
        assert name == "error"
        assert (data["code"], data["object"]) == (50001, "error")
        assert "hunter2" not in reply.text
