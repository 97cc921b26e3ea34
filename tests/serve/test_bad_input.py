"""Bad input against the real server: always an answer, always the contract's, never a 5xx."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from deployments.ray_compat import ray_processes
from tests.support.bad_values import VALUES
from tests.support.http import blank, check
from tests.support.live import draw, request


def test_every_bad_value(client: httpx.Client) -> None:
    for fields, param, _ in VALUES:
        reply = client.post("/v1/image/generation", json=request("SD1.5", steps=3) | fields)
        if param == "steps" and "width" in fields:
            assert reply.status_code == 400  # the budget of this server is larger than the unit tests'
            continue
        check(reply, 400, 40302, param)


@pytest.mark.parametrize("name", ["nope", "SDXL"])
def test_models_not_served(client: httpx.Client, name: str) -> None:
    check(client.post("/v1/image/generation", json=request("SD1.5") | {"model_name": name}), 400, 40301, "model_name")


def test_not_json(client: httpx.Client) -> None:
    check(client.post("/v1/image/generation", content=b"{"), 422, 40001, None)


def test_not_a_number(client: httpx.Client) -> None:
    body = json.dumps(request("SD1.5"))[:-1] + ', "cfg_scale": NaN}'
    check(client.post("/v1/image/generation", content=body), 400, 40302, "cfg_scale")


def test_a_picture_bomb(client: httpx.Client) -> None:
    bomb = blank(30_000, 30_000)
    assert len(bomb) < 200_000
    check(client.post("/v1/image/generation", json=request("SD1.5") | {"image": bomb}), 413, 40004, "image")


def resident() -> int:
    """Resident bytes of what a body passes through."""
    own = ray_processes("ServeReplica:sdgraph:ingress", "ProxyActor")
    return sum(process.memory_info().rss for _, process in own)


def test_a_chunked_body_of_100_mb_is_refused_while_it_is_read(client: httpx.Client, url: str) -> None:
    """The limit here is 8 MiB. The answer comes while the upload still runs; the rest is thrown away unread."""
    draw(client, **request("SD1.5", steps=1))
    before = resident()
    chunk = b"100000\r\n" + b"y" * 2**20 + b"\r\n"
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 80)), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/image/generation HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(10):
            connection.sendall(chunk)
        with connection.makefile("rb") as reader:  # the body is not finished, and never will be
            status = reader.readline()
            headers = http.client.parse_headers(reader)
            body = json.loads(reader.read(int(headers["content-length"])))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(90):
                connection.sendall(chunk)
    assert status.startswith(b"HTTP/1.1 413")
    assert body["code"] == 40004
    grown = resident() - before
    assert grown < 40 * 2**20, f"grew by {grown} bytes"
    draw(client, **request("SD1.5", steps=1))


def test_the_server_serves_requests_after_all_bad_input(client: httpx.Client) -> None:
    assert client.get("/readyz").status_code == 200
