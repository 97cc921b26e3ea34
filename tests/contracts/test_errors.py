"""Every row of the contract's error table, through HTTP. The real server answers the same in tests/serve."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from tests.contracts.conftest import ClientFactory
from tests.contracts.test_generation import SMALL, picture, pixels


def check(reply: httpx.Response, status: int, code: int, param: str | None) -> str:
    """The error body of the contract; returns its message."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    said = {key: body[key] for key in ("message", "type", "param", "code")}
    assert body["object"] == "error"
    assert body["error"] == said
    assert (body["code"], body["param"]) == (code, param)
    assert ("detail" in body) == (status == 422)
    assert "Traceback" not in reply.text
    return str(body["message"])


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


CONTROL = {"model_name": "SD1.5-ControlNet", "controlnet_name": "canny", "controlnet_image": png(8, 8)}

VALUES: list[tuple[dict[str, Any], str, str]] = [
    ({"sampler": "Euler b"}, "sampler", "Did you mean 'Euler"),
    ({"style_preset": "Watercolr"}, "style_preset", "Did you mean 'Watercolor'?"),
    ({"backend": "onnx"}, "backend", "['auto', 'tvm', 'torch']"),
    ({"backend": "tvm"}, "backend", "'512x512'"),
    ({"backend": "tvm", "width": 512, "height": 768}, "backend", "not compiled"),
    ({"width": 132}, "width", "[128, 136]"),
    ({"height": 64}, "height", "128"),
    ({"width": 2504}, "width", "2496"),
    ({"steps": 0}, "steps", "1"),
    ({"steps": 1001}, "steps", "1000"),
    ({"sampler": "LCM", "steps": 51}, "steps", "1 to 50"),
    ({"sampler": "EDM_Euler"}, "sampler", "cannot serve this model"),
    ({"cfg_scale": 50.5}, "cfg_scale", "50"),
    ({"cfg_scale": -1}, "cfg_scale", "0"),
    ({"strength": 1.5}, "strength", "1"),
    ({"image": png(64, 64), "strength": 0.1}, "strength", "at least 0.3333"),
    ({"seed": -1}, "seed", "0"),
    ({"seed": 2**32}, "seed", "4294967296"),
    ({"prompt": ""}, "prompt", "at least 1"),
    ({"prompt": "x" * 20_001}, "prompt", "20000"),
    ({"prompt_2": "x"}, "prompt_2", "SD1.5"),
    ({"negative_prompt_2": "x"}, "negative_prompt_2", "SD1.5"),
    ({"enable_refiner": True}, "enable_refiner", "no refiner"),
    ({"controlnet_name": "canny"}, "controlnet_name", "no ControlNet"),
    ({"controlnet_image": png(8, 8)}, "controlnet_image", "no ControlNet"),
    ({"loras": {"Nope": 1.0}}, "loras", "Nope"),
    ({"loras": {"Logo": 1.0}}, "loras", "no tiny weights"),
    ({"model_name": "SD1.5-ControlNet"}, "controlnet_name", "required"),
    ({"model_name": "SD1.5-ControlNet", "controlnet_name": "canny"}, "controlnet_image", "required"),
    (
        CONTROL | {"controlnet_name": "cany"},
        "controlnet_name",
        "Unexpected controlnet_name 'cany'. Did you mean 'canny'?",
    ),
    (CONTROL | {"controlnet_image": "x"}, "controlnet_image", "base64"),
    (CONTROL | {"controlnet_image": png(300, 300)[:80]}, "controlnet_image", "damaged"),
    ({"image": "%%%"}, "image", "base64"),
    ({"image": ""}, "image", "empty"),
    ({"image": base64.b64encode(b"no picture").decode()}, "image", "PNG"),
    ({"image": png(300, 300)[:80]}, "image", "damaged"),
    ({"output_format": "tiff"}, "output_format", "jpeg"),
    ({"width": 2496, "height": 2496, "steps": 1000}, "steps", "budget"),
]


@pytest.mark.parametrize(("fields", "param", "hint"), VALUES, ids=lambda v: str(v)[:40])
async def test_bad_value(client: httpx.AsyncClient, fields: dict[str, Any], param: str, hint: str) -> None:
    reply = await client.post("/v1/image/generation", json=SMALL | fields)
    message = check(reply, 400, 40302, param)
    assert param in message
    assert hint in message


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["cfg_scale", "strength"])
async def test_numbers_that_are_none(client: httpx.AsyncClient, field: str, literal: str) -> None:
    body = json.dumps(SMALL)[:-1] + f', "{field}": {literal}}}'
    reply = await client.post("/v1/image/generation", content=body, headers={"content-type": "application/json"})
    check(reply, 400, 40302, field)


async def test_lora_weights_that_are_no_numbers(client: httpx.AsyncClient) -> None:
    body = json.dumps(SMALL)[:-1] + ', "loras": {"Pixel_Art": NaN}}'
    reply = await client.post("/v1/image/generation", content=body, headers={"content-type": "application/json"})
    check(reply, 400, 40302, "loras")


@pytest.mark.parametrize("name", ["SDXL1.0", "FLUX.1-dev"])
async def test_models_not_served(client: httpx.AsyncClient, name: str) -> None:
    message = check(
        await client.post("/v1/image/generation", json=SMALL | {"model_name": name}), 400, 40301, "model_name"
    )
    assert message.endswith("'SDXL-turbo', 'SDXL-ControlNet', 'SD1.5-ControlNet'] allowed now")


async def test_choices_can_be_parsed_as_a_client_does(client: httpx.AsyncClient) -> None:
    """PyPI llm-hyperbolic 0.4.9 takes the first square brackets and strips the quotes."""
    reply = await client.post("/v1/image/generation", json=SMALL | {"sampler": "bad ['x']"})
    options = re.findall(r"\[(.+?)\]", reply.json()["message"])[0].split(", ")
    assert "DPM++ 2M SDE Heun Karras" in [option.strip("'") for option in options]


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"not json", None),
        (b"", None),
        (b"[]", None),
        (b'{"model_name": "SD1.5"}', "prompt"),
        (b'{"prompt": "x"}', "model_name"),
        (b'{"model_name": "SD1.5", "prompt": "x", "steps": "many"}', "steps"),
        (b'{"model_name": "SD1.5", "prompt": "x", "steps": 2.5}', "steps"),
        (b'{"model_name": "SD1.5", "prompt": ["x"]}', "prompt"),
        (b'{"model_name": "SD1.5", "prompt": "x", "loras": [1]}', "loras"),
        (b'{"model_name": "SD1.5", "prompt": "\\ud800"}', "prompt"),
        (b'{"model_name": "SD1.5", "prompt": "x\xff"}', None),
    ],
)
@pytest.mark.parametrize("path", ["/v1/image/generation", "/v1/images/generations"])
async def test_not_json_or_a_wrong_type(
    client: httpx.AsyncClient, path: str, content: bytes, param: str | None
) -> None:
    check(await client.post(path, content=content, headers={"content-type": "application/json"}), 422, 40001, param)


async def test_body_too_large(client: httpx.AsyncClient) -> None:
    check(await client.post("/v1/image/generation", json=SMALL | {"x": "y" * 2**20}), 413, 40004, None)


async def test_picture_too_large(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/image/generation", json=SMALL | {"image": png(1001, 1000)})
    check(reply, 413, 40004, "image")


def raising(error: Exception) -> SimpleNamespace:
    """A handle whose calls end in `error`."""

    async def fail() -> None:
        raise error

    call = SimpleNamespace(remote=lambda *_: fail())
    return SimpleNamespace(encode=call, denoise=call, decode=call)


class Unused:
    """A handle whose responses nobody awaits, as in the graph."""

    def __getattr__(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *_: None)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(BackPressureError(1, 1), 503, 42903), (RuntimeError("password=hunter2"), 500, 50001)],
)
async def test_faults_below(
    connect: ClientFactory, handles: dict[str, Any], error: Exception, status: int, code: int
) -> None:
    broken = dict.fromkeys(handles, Unused()) | {"vae-sd15": raising(error)}
    async with connect(handles=broken) as client:
        reply = await client.post("/v1/image/generation", json=SMALL, headers={"x-request-id": "abc-1"})
        message = check(reply, status, code, None)
        assert "hunter2" not in reply.text
        if status == 503:
            assert int(reply.headers["retry-after"]) > 0
        else:
            assert "abc-1" in message


async def test_a_replica_that_dies_is_tried_again(connect: ClientFactory, handles: dict[str, Any]) -> None:
    """Once; the picture is the same. Dead again, the client is told when to come back."""
    deaths = 0

    def dying(times: int) -> dict[str, Any]:
        vae = handles["vae-sd15"]

        async def die() -> None:
            nonlocal deaths
            deaths += 1
            raise ActorDiedError

        def decode(*args: Any) -> Any:
            return die() if deaths < times else vae.decode.remote(*args)

        return handles | {"vae-sd15": SimpleNamespace(decode=SimpleNamespace(remote=decode))}

    async with connect(handles=dying(1)) as client, connect() as healthy:
        body = SMALL | {"output_format": "png"}
        replies = [await c.post("/v1/image/generation", json=body) for c in (client, healthy)]
    assert deaths == 1
    again, undisturbed = (pixels(picture(reply)) for reply in replies)
    assert np.abs(again - undisturbed).max() <= 1
    deaths = 0
    async with connect(handles=dying(2)) as client:
        reply = await client.post("/v1/image/generation", json=SMALL)
    check(reply, 503, 42903, None)
    assert int(reply.headers["retry-after"]) > 0


@pytest.mark.parametrize(("header", "waits"), [("0.05", False), ("5000", True), ("soon", True), ("-1", True)])
async def test_a_client_may_shorten_its_deadline_and_no_more(
    connect: ClientFactory, handles: dict[str, Any], header: str, waits: bool
) -> None:
    async def slow() -> None:
        await asyncio.sleep(0.5)
        raise BackPressureError(1, 1)

    late = dict.fromkeys(handles, Unused()) | {
        "vae-sd15": SimpleNamespace(decode=SimpleNamespace(remote=lambda *_: slow()))
    }
    async with connect(handles=late) as client:
        reply = await client.post("/v1/image/generation", json=SMALL, headers={"x-request-timeout-seconds": header})
    assert reply.status_code == (503 if waits else 504)


async def test_deadline(connect: ClientFactory, handles: dict[str, Any]) -> None:
    async def never() -> None:
        await asyncio.sleep(60)

    slow = dict.fromkeys(handles, Unused()) | {
        "vae-sd15": SimpleNamespace(decode=SimpleNamespace(remote=lambda *_: never()))
    }
    async with connect(handles=slow, deadline_s=0.05) as client:
        check(await client.post("/v1/image/generation", json=SMALL), 504, 50006, None)


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    check(await client.get("/v1/nothing"), 404, 40000, None)
    check(await client.get("/v1/image/generation"), 405, 40000, None)
