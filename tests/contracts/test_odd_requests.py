"""Requests as real clients send them: nulls, aliases, empty strings, odd base64, odd headers, odd bodies."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from deployments.api import body_limit
from deployments.api.body_limit import BodyLimit
from deployments.api.encoding import decode_base64
from deployments.api.errors import ErrorCode, Failure
from deployments.api.openai.requests import ImageRequest
from deployments.api.schemas import GenerationRequest
from deployments.proxy.answers import ProxyAnswers
from pipelines.errors import InvalidValueError
from pipelines.pictures.images import read_plan
from pipelines.plan import GenerationPlan
from tests.support.http import PATH, SMALL, check, encoded, photo, picture, pixels, post

ALIASES = {"steps": "num_inference_steps", "cfg_scale": "guidance_scale", "loras": "lora"}
VALUES: dict[str, Any] = {"steps": 2, "cfg_scale": 1.5, "loras": {"Pixel_Art": 0.5}}


def plan_of(reply: httpx.Response) -> GenerationPlan:
    return GenerationPlan.model_validate_json(read_plan(base64.b64decode(reply.json()["images"][0]["image"])) or "")


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_null_is_absent_in_every_alias_pair(data: st.DataObject) -> None:
    """In whatever order and spelling the fields come."""
    body: dict[str, Any] = {"model_name": "SD1.5", "prompt": "x"}
    expected: dict[str, Any] = {}
    for field, alias in ALIASES.items():
        spellings = data.draw(st.permutations([field, alias]))
        value = data.draw(st.sampled_from([None, VALUES[field]]))
        body |= dict.fromkeys(spellings[: data.draw(st.integers(0, 2))])
        if value is not None:
            body[data.draw(st.sampled_from(spellings))] = value
        expected[field] = value
    request = GenerationRequest.model_validate(body)
    assert {field: getattr(request, field) for field in ALIASES} == expected


OPTIONAL = sorted(set(GenerationRequest.model_fields) - {"model_name", "prompt"})


@given(st.sets(st.sampled_from(OPTIONAL)))
def test_nulls_change_nothing(fields: set[str]) -> None:
    body = {"model_name": "SD1.5", "prompt": "x"}
    assert GenerationRequest.model_validate(body | dict.fromkeys(fields)) == GenerationRequest.model_validate(body)


def test_empty_strings_of_unset_fields_are_absent_but_an_empty_negative_prompt_is_not() -> None:
    body = {"model_name": "SD1.5", "prompt": "x"}
    unset = ["prompt_2", "negative_prompt_2", "backend", "image", "sampler", "style_preset", "controlnet_name"]
    empty = dict.fromkeys([*unset, "controlnet_image", "output_format"], "")
    assert GenerationRequest.model_validate(body | empty).to_params() == GenerationRequest(**body).to_params()
    assert GenerationRequest.model_validate(body | {"negative_prompt": ""}).to_params().negative_prompt == ""
    openai = {"model": "SD1.5", "prompt": "x"}
    assert ImageRequest.model_validate(openai | {"size": "", "n": ""}) == ImageRequest.model_validate(openai)


@pytest.mark.parametrize("seed", [-1, None])
async def test_a_seed_of_minus_one_is_random_and_comes_back(client: httpx.AsyncClient, seed: int | None) -> None:
    replies = [await post(client, seed=seed, steps=1) for _ in range(2)]
    first, second = (reply.json()["images"][0]["random_seed"] for reply in replies)
    assert 0 <= first < 2**32
    assert first != second


@given(data=st.binary(min_size=1, max_size=50), urlsafe=st.booleans(), padded=st.booleans(), spaces=st.booleans())
@settings(deadline=None)
def test_base64_is_read_in_every_spelling(data: bytes, urlsafe: bool, padded: bool, spaces: bool) -> None:
    text = (base64.urlsafe_b64encode if urlsafe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    text = "\r\n".join(text[i : i + 8] for i in range(0, len(text), 8)) if spaces else text
    heads = ["", "data:image/png;base64,", "data:;base64,", "data:image/png;name=a.png;charset=utf-8;base64,"]
    for head in (*heads, "DATA:application/octet-stream;base64,", "data:base64,"):
        assert decode_base64(head + text, "image") == data


@pytest.mark.parametrize("text", ["%%%", "a", "data:image/png;base64,", "data:image/svg+xml,<svg/>", "", "=="])
def test_what_is_no_base64_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidValueError, match="image"):
        decode_base64(text, "image")


async def test_a_picture_in_an_odd_data_uri_is_drawn(client: httpx.AsyncClient) -> None:
    data = photo(60, 40)
    odd = "data:image/png;name=x.png;base64," + base64.urlsafe_b64encode(data).decode().rstrip("=")
    fields = {"strength": 0.7, "output_format": "png"}
    drawn = [pixels(picture(await post(client, image=text, **fields))) for text in (encoded(data), odd)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


ANY_TEXT = st.text(st.characters(), max_size=20)  # lone surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def fields() -> list[str]:
    return [*GenerationRequest.model_fields, "num_inference_steps", "guidance_scale", "lora", "model", "n", "size"]


@pytest.mark.parametrize("path", [PATH, "/v1/images/generations"])
async def test_no_body_causes_a_500(client: httpx.AsyncClient, fields: list[str], path: str) -> None:
    """Whatever JSON a field holds, the answer is a picture or a 4xx in the contract's form."""
    bodies: list[dict[str, Any]] = []

    @given(st.dictionaries(st.sampled_from(fields) | ANY_TEXT, JSON, max_size=4))
    @settings(max_examples=150, deadline=None, database=None)
    def collect(extra: dict[str, Any]) -> None:
        bodies.append(extra)

    collect()
    bodies += [{"loras": {"\ud800": 0.5}}, {"sampler": "\udfff"}, {"\ud800": 1}, {"prompt": "\ud800"}]
    for extra in bodies:
        body = SMALL | {"steps": 1} | extra
        reply = await client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert reply.status_code in (200, 400, 413, 422), (body, reply.text)
        if not reply.headers["content-type"].startswith("text/event-stream"):  # of `"stream": true`
            reply.json()


async def test_broken_json_is_told_with_its_position(client: httpx.AsyncClient) -> None:
    reply = await client.post(PATH, content=b'{"model_name": "SD1.5",, "prompt": "x"}')
    assert "at character 23" in check(reply, 422, 40001, None)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd", "br"])
async def test_encoded_bodies_are_refused_by_name(client: httpx.AsyncClient, encoding: str) -> None:
    reply = await client.post(PATH, json=SMALL, headers={"content-encoding": encoding})
    assert reply.status_code == 415
    assert f"'{encoding}'" in reply.json()["message"]


async def test_twenty_thousand_emoji_come_back_in_a_jpeg(client: httpx.AsyncClient) -> None:
    reply = await post(client, prompt="\N{GRINNING FACE}" * 20_000, long_prompt="cut", steps=1)
    assert picture(reply).format == "JPEG"


async def test_health_routes_answer_head(client: httpx.AsyncClient) -> None:
    for path in ("/healthz", "/readyz"):
        reply = await client.head(path)
        assert (reply.status_code, reply.content) == (200, b"")


async def test_headers_that_are_not_utf8_never_reach_serves_proxy() -> None:
    """Serve decodes `x-request-id` as UTF-8; a latin-1 byte there made every request look like a dead ingress."""
    seen: dict[str, Any] = {}

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update({name.decode(): value.decode() for name, value in scope["headers"]})
        await Failure.invalid(404, ErrorCode.OTHER, "x").response()(scope, receive, send)

    transport = httpx.ASGITransport(BodyLimit(ProxyAnswers(proxy), max_bytes=1000))
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
        await client.get("/", headers=[(b"x-request-id", b"caf\xe9"), (b"x-other", "café".encode())])
    assert "x-request-id" not in seen
    assert seen["x-other"] == "café"


async def test_a_body_that_stops_halfway_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_limit, "PAUSE_S", 0.01)
    sent: list[Message] = []
    began = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> Message:
        if began:
            return began.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pytest.fail("half a body was passed on")

    await BodyLimit(app, max_bytes=1000)({"type": "http", "headers": []}, receive, send)
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["code"] == 40000
