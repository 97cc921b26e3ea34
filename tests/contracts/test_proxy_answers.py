"""What Serve's proxy answers by itself, put into the contract's form; its real messages are in tests/serve."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from deployments.api.body_limit import BodyLimit
from deployments.proxy.answers import ProxyAnswers
from tests.support.http import check


class Proxy:
    """Gives the next of its answers to every request, and remembers the bodies it was sent."""

    def __init__(self, *answers: Response | None) -> None:
        self.answers = list(answers)
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message: Message = await receive()
        self.bodies.append(message["body"])
        answer = self.answers.pop(0)
        if answer is not None:  # a replica that died: Serve's proxy then says nothing
            await answer(scope, receive, send)


def plain(status: int, **headers: str) -> Response:
    return PlainTextResponse("The actor died: secret internals", status, {"x-request-id": "id-1"} | headers)


@asynccontextmanager
async def in_front_of(proxy: Proxy) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(BodyLimit(ProxyAnswers(proxy), max_bytes=1000))
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
        yield client


@pytest.mark.parametrize(
    ("answers", "status", "code", "retry_after"),
    [
        ([plain(503)], 503, 42903, "5"),
        ([plain(503, **{"retry-after": "0"})], 503, 42903, "5"),
        ([plain(408)], 504, 50006, None),
        ([plain(404)], 404, 40000, None),
        ([None, None], 503, 42903, "5"),
        ([None, plain(408)], 504, 50006, None),
    ],
)
async def test_plain_text_errors_of_the_proxy_get_the_contracts_body(
    answers: list[Response | None], status: int, code: int, retry_after: str | None
) -> None:
    async with in_front_of(Proxy(*answers)) as client:
        reply = await client.post("/v1/image/generation", content=b"{}")
    message = check(reply, status, code, None)
    assert "internals" not in message
    assert reply.headers.get_list("x-request-id") == (["id-1"] if answers[-1] else [])
    assert reply.headers.get("retry-after") == retry_after
    assert reply.headers.get_list("content-type") == ["application/json"]


async def test_a_dead_ingress_is_tried_again_with_the_same_body() -> None:
    proxy = Proxy(None, JSONResponse({"images": []}))
    async with in_front_of(proxy) as client:
        reply = await client.post("/v1/image/generation", content=b'{"prompt": "x"}')
    assert reply.json() == {"images": []}
    assert proxy.bodies == [b'{"prompt": "x"}'] * 2


async def test_a_start_without_a_body_is_no_answer() -> None:
    class Torn(Response):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

    async with in_front_of(Proxy(Torn(), JSONResponse({"images": []}, 200))) as client:
        reply = await client.post("/", content=b"{}")
    assert reply.json() == {"images": []}


async def test_a_client_that_left_is_not_tried_again() -> None:
    calls = 0

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal calls
        calls += 1
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    messages = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await BodyLimit(ProxyAnswers(proxy), max_bytes=1000)({"type": "http", "headers": []}, receive, send)
    assert calls == 1
    assert sent == []


async def test_the_applications_own_answers_pass_untouched() -> None:
    async def events() -> AsyncIterator[str]:
        yield "event: progress\n\n"
        yield "event: error\n\n"

    own = [
        JSONResponse({"code": 50001}, 500),
        PlainTextResponse("metrics", 200),
        StreamingResponse(events(), media_type="text/event-stream"),
    ]
    async with in_front_of(Proxy(*own)) as client:
        replies = [await client.get("/") for _ in own]
    assert [reply.status_code for reply in replies] == [500, 200, 200]
    assert replies[0].json() == {"code": 50001}
    assert replies[2].text.count("event:") == 2
