"""Every row of the contract's error table, through HTTP. The real server answers the same in tests/serve."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import numpy as np
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from deployments.graph import Graph
from pipelines.errors import NonFiniteError, WeightsError
from tests.support.bad_values import VALUES
from tests.support.graph import FakeGraph, denoised, never, raising, unending
from tests.support.http import PATH, SMALL, blank, check, check_outcome, drawn, events, outcome, picture, pixels
from tests.support.ingress import ClientFactory


@pytest.mark.parametrize(("fields", "param", "hint"), VALUES, ids=lambda v: str(v)[:40])
async def test_bad_value(client: httpx.AsyncClient, fields: dict[str, Any], param: str, hint: str) -> None:
    reply = await client.post("/v1/image/generation", json=SMALL | fields)
    message = check(reply, 400, 40302, param)
    assert param in message
    assert hint in message


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["cfg_scale", "strength"])
async def test_nan_and_infinity(client: httpx.AsyncClient, field: str, literal: str) -> None:
    body = json.dumps(SMALL)[:-1] + f', "{field}": {literal}}}'
    reply = await client.post("/v1/image/generation", content=body, headers={"content-type": "application/json"})
    check(reply, 400, 40302, field)


@pytest.mark.parametrize("weight", ["NaN", '{"unet": NaN}', '{"text_encoder": -Infinity}'])
async def test_a_lora_weight_of_nan(client: httpx.AsyncClient, weight: str) -> None:
    body = json.dumps(SMALL)[:-1] + f', "loras": {{"Pixel_Art": {weight}}}}}'
    reply = await client.post("/v1/image/generation", content=body, headers={"content-type": "application/json"})
    check(reply, 400, 40302, "loras")


async def test_a_part_that_no_lora_has_is_named_with_those_there_are(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/image/generation", json=SMALL | {"loras": {"Pixel_Art": {"te": 1}}})
    check(reply, 422, 40001, "loras")
    assert "'te'" in reply.json()["message"]
    assert "text_encoder_2" in reply.json()["message"]


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
        (b'{"model_name": "SD1.5", "prompt": "x", "steps": "many"}', "steps"),
        (b'{"model_name": "SD1.5", "prompt": "x", "steps": 2.5}', "steps"),
        (b'{"model_name": "SD1.5", "prompt": ["x"]}', "prompt"),
        (b'{"model_name": "SD1.5", "prompt": "x", "loras": [1]}', "loras"),
        (b'{"model_name": "SD1.5", "prompt": "x", "loras": {"Pixel_Art": {"unet": "much"}}}', "loras"),
        (b'{"model_name": "SD1.5", "prompt": "x", "loras": {"Pixel_Art": [1]}}', "loras"),
        (b'{"model_name": "SD1.5", "prompt": "\\ud800"}', "prompt"),
        (b'{"model_name": "SD1.5", "prompt": "x\xff"}', None),
    ],
)
@pytest.mark.parametrize("path", ["/v1/image/generation", "/v1/images/generations"])
async def test_not_json_or_a_wrong_type(
    client: httpx.AsyncClient, path: str, content: bytes, param: str | None
) -> None:
    check(await client.post(path, content=content, headers={"content-type": "application/json"}), 422, 40001, param)


async def test_a_request_without_a_model(client: httpx.AsyncClient) -> None:
    """The second route has a default model, as OpenAI's has."""
    check(await client.post("/v1/image/generation", json={"prompt": "x"}), 422, 40001, "model_name")


async def test_body_too_large(client: httpx.AsyncClient) -> None:
    check(await client.post("/v1/image/generation", json=SMALL | {"x": "y" * 2**20}), 413, 40004, None)


async def test_picture_too_large(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/image/generation", json=SMALL | {"image": blank(1001, 1000)})
    check(reply, 413, 40004, "image")


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(BackPressureError(1, 1), 503, 42903), (RuntimeError("password=hunter2"), 500, 50001)],
)
async def test_an_exception_of_a_stage(
    connect: ClientFactory, error: Exception, status: int, code: int, streamed: bool
) -> None:
    async with connect(graph=FakeGraph(decode=raising(error), denoise_watched=denoised)) as client:
        headers = {"x-request-id": "abc-1"}
        answer = await outcome(client, streamed, headers)
    message = check_outcome(answer, streamed, status, code)
    assert "hunter2" not in answer.text
    if status == 500:
        assert "abc-1" in message
    elif not streamed:
        assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
async def test_values_that_are_not_finite(connect: ClientFactory, streamed: bool) -> None:
    error = NonFiniteError("sampler 'DDIM' with 999 steps: the latents have values that are not finite", "sampler")
    async with connect(graph=FakeGraph(decode=raising(error), denoise_watched=denoised)) as client:
        message = check_outcome(await outcome(client, streamed), streamed, 400, 40302, "sampler")
    assert "'DDIM' with 999 steps" in message


async def test_a_lora_file_that_is_missing(connect: ClientFactory) -> None:
    """The answer names the LoRA and nothing of the server's disk."""
    error = WeightsError("lora Lost, file lost.safetensors: no such file: /srv/gone/lost.safetensors")
    async with connect(graph=FakeGraph(decode=raising(error))) as client:
        lost = await client.post(PATH, json=SMALL)
    message = check(lost, 503, 42903, None)
    assert message.startswith("lora Lost, file lost.safetensors cannot be read on this server")
    assert "/srv" not in lost.text
    assert lost.headers["retry-after"] == "60"


def dying(times: int, graph: Graph) -> FakeGraph:
    """A graph whose VAE dies so many times."""
    left = times

    async def decode(**arguments: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise ActorDiedError
        return await graph.decode(**arguments)

    return FakeGraph(graph, decode=decode)


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
async def test_a_replica_that_dies_is_tried_again_once(
    connect: ClientFactory, client: httpx.AsyncClient, graph: Graph, streamed: bool
) -> None:
    """The picture is the same. A watcher is told that its steps begin again."""
    failing = dying(1, graph)
    async with connect(graph=failing) as unlucky:
        again = await outcome(unlucky, streamed)
    assert len(failing.named("decode")) == 2
    undisturbed = pixels(picture(await outcome(client, False)))
    assert np.abs(drawn(again, streamed) - undisturbed).max() <= 1
    if streamed:
        told = [data for name, data in events(again.text) if name == "progress"]
        restart = told.index({"state": "restarted", "stage": "unet-sd15"})
        for part in (told[:restart], told[restart + 1 :]):
            steps = [data["step"] for data in part if data["state"] == "denoising"]
            assert steps == sorted(steps)
            assert steps[-1] == 3


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
async def test_a_replica_that_dies_twice(connect: ClientFactory, graph: Graph, streamed: bool) -> None:
    async with connect(graph=dying(2, graph)) as client:
        reply = await outcome(client, streamed)
    assert "restarting" in check_outcome(reply, streamed, 503, 42903)
    if not streamed:
        assert int(reply.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("header", "servers_own", "status"),
    [
        ("0.05", 60, 504),
        ("5000", 0.05, 504),  # never longer than the server's
        ("soon", 0.05, 504),
        ("soon", 60, 503),
        ("-1", 60, 503),
    ],
)
async def test_a_client_may_shorten_its_deadline_but_not_lengthen_it(
    connect: ClientFactory, header: str, servers_own: float, status: int
) -> None:
    decode = never if status == 504 else raising(BackPressureError(1, 1))
    async with connect(graph=FakeGraph(decode=decode), deadline_s=servers_own) as client:
        reply = await client.post(PATH, json=SMALL, headers={"x-request-timeout-seconds": header})
    assert reply.status_code == status


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("stuck", ["decode", "denoise"])
async def test_a_passed_deadline_cancels_every_call(connect: ClientFactory, streamed: bool, stuck: str) -> None:
    watched = denoised if stuck == "decode" else unending
    edges = dict.fromkeys(("encode_text", "denoise", "decode"), never)
    graph = FakeGraph(**edges, denoise_watched=watched)
    async with connect(graph=graph, deadline_s=0.05) as client:
        reply = await outcome(client, streamed)
    check_outcome(reply, streamed, 504, 50006)
    assert graph.named("encode_text")
    assert all(response.cancelled for response in graph.responses)


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    check(await client.get("/v1/nothing"), 404, 40000, None)
    check(await client.get("/v1/image/generation"), 405, 40000, None)
