"""A client that hardly reads its stream: others are served meanwhile, and it is dropped."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from tests.support.http import PATH
from tests.support.live import draw, request

pytestmark = pytest.mark.slow


def test_a_client_that_reads_a_byte_a_second_holds_nobody_up_and_is_dropped(
    client: httpx.Client, url: str, graph_log: Path
) -> None:
    """Its previews are more than the kernel keeps for so small a window; the proxy looks every 30 s."""
    fields = request("SD1.5", sampler="Euler")
    expected, _ = draw(client, **fields)
    parts = urlsplit(url)
    with socket.socket() as reader, ThreadPoolExecutor(1) as pool:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((parts.hostname, parts.port))
        reader.sendall(posted(fields | {"steps": 150, "width": 1024, "height": 1024, "stream": True, "preview": True}))
        dropped = threading.Event()
        reading = pool.submit(read, reader, dropped)
        try:
            while "waited for it: dropped" not in graph_log.read_text(errors="replace"):
                assert not reading.done(), "it has everything"
                drawn, _ = draw(client, **fields)
                assert np.abs(drawn - expected).max() <= 1
        finally:
            dropped.set()
        answer = reading.result()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"event: progress" in answer
    assert b"event: result" not in answer, "what it had not read is gone"
    assert np.abs(draw(client, **fields)[0] - expected).max() <= 1


def posted(body: dict[str, object]) -> bytes:
    """A request's bytes."""
    content = json.dumps(body).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def read(reader: socket.socket, dropped: threading.Event) -> bytes:
    """A byte a second, and what the kernel has left as soon as it is `dropped`."""
    answer = b""
    try:
        while data := reader.recv(2**16 if dropped.is_set() else 1):
            answer += data
            dropped.wait(1)
    except ConnectionResetError:  # the kernel has thrown it away
        pass
    return answer
