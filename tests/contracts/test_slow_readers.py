"""Clients that hardly read: dropped after a while, whether the answer is under way or long complete; others are not."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.proxy import slow_readers
from deployments.proxy.slow_readers import SlowReaders

PART, PARTS = b"." * 2**20, 16
"""More than a kernel's buffers hold for a client with a small window."""


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_readers, "CHECK_S", 0.1)


class Parts:
    """Sends `PARTS` at once or one after another, and tells when its client is gone."""

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self.gone = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.create_task(self._until_gone(receive))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in [PART * PARTS] if self._whole else [PART] * PARTS:
            await send({"type": "http.response.body", "body": part, "more_body": not self._whole})
        if not self._whole:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        await leaving

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone.set()


@contextmanager
def served(app: ASGIApp) -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask(port: int) -> socket.socket:
    """A client with a small window, which has asked and reads nothing yet."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    return client


def read_to_the_end(client: socket.socket) -> int:
    """Bytes that still come."""
    count = 0
    while data := client.recv(2**16):
        count += len(data)
    return count


@pytest.mark.parametrize("whole", [False, True], ids=["a stream", "one large body"])
def test_a_client_that_reads_a_byte_now_and_then_is_dropped(whole: bool, caplog: pytest.LogCaptureFixture) -> None:
    app = Parts(whole)
    with served(SlowReaders(app)) as port, ask(port) as client:
        while "dropped" not in caplog.text:
            client.recv(1)
        assert app.gone.wait(60), "the application is told as if the client had left"
        assert read_to_the_end(client) < len(PART) * PARTS, "only what the kernel had"


@pytest.mark.parametrize("whole", [False, True], ids=["a stream", "one large body"])
def test_a_client_that_begins_late_and_reads_gets_everything(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_readers, "SLOWEST_BYTES_S", 0)
    app = Parts(whole)
    with served(SlowReaders(app)) as port:
        reply = httpx.get(f"http://127.0.0.1:{port}")
        assert reply.content == PART * PARTS


def test_where_there_is_no_uvicorn_nothing_is_watched() -> None:
    async def run(app: ASGIApp) -> bytes:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get("/")).content

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok", "more_body": False})

    assert asyncio.run(run(SlowReaders(app))) == b"ok"
