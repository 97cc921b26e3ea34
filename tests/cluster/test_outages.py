"""What a cluster can lose while it serves: a proxy, its Redis, its head.

Requests are answered, or refused in the contract's form; pictures are those drawn before; nothing hangs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import httpx
import numpy as np
import pytest
import redis

from tests.cluster.conftest import Outages
from tests.cluster.nodes import Node
from tests.support.http import PATH, check, picture, pixels
from tests.support.live import draw, is_whole, request, wait_for, wait_until_whole

pytestmark = pytest.mark.slow

Recovered = Callable[[str, float], None]
BODY = request("SD1.5", sampler="Euler") | {"output_format": "png"}


@pytest.fixture
def expected(outages: Outages) -> np.ndarray:
    """The picture of `BODY` while nothing happens; the graph is whole."""
    wait_until_whole(outages.heads)
    wait_until_whole(outages.workers)
    with outages.client(outages.workers) as client:
        return draw(client, **BODY)[0]


@contextmanager
def drawing(outages: Outages, url: str, expected: np.ndarray) -> Iterator[Counter[str]]:
    """Two clients that draw all the time through a proxy; what came of it, which is all right or told by its name."""
    outcomes: Counter[str] = Counter()
    stop = Event()

    def keep_drawing() -> None:
        with outages.client(url) as client:
            while not stop.is_set():
                outcomes[one(client)] += 1

    def one(client: httpx.Client) -> str:
        try:
            reply = client.post(PATH, json=BODY)
        except httpx.TransportError as error:
            stop.wait(0.2)
            return type(error).__name__
        if reply.status_code == 503:
            check(reply, 503, 42903, None)
            return "refused"
        assert np.abs(pixels(picture(reply)) - expected).max() <= 1
        return "drawn"

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(keep_drawing) for _ in range(2)]
        try:
            yield outcomes
        finally:
            stop.set()
    for client in clients:
        client.result()


def some_more(outcomes: Counter[str]) -> None:
    """Wait until pictures came that were begun now."""
    before = outcomes["drawn"]
    wait_for(lambda: outcomes["drawn"] >= before + 4)


def kill(node: Node, title: str) -> None:
    (victim,) = node.processes(f"ray::{title}")
    victim.kill()
    victim.wait()


@pytest.mark.parametrize("place", ["worker", "head"])
def test_a_killed_proxy_takes_its_own_connections_alone(
    outages: Outages, expected: np.ndarray, place: str, recovered: Recovered
) -> None:
    lost, other = (outages.workers, outages.heads) if place == "worker" else (outages.heads, outages.workers)
    node: Node = getattr(outages.nodes, place)
    with drawing(outages, lost, expected) as through_lost, drawing(outages, other, expected) as through_other:
        some_more(through_lost)
        some_more(through_other)
        since = time.monotonic()
        kill(node, "ProxyActor")
        some_more(through_other)
        some_more(through_lost)
        recovered(f"proxy of the {place} killed, pictures through it again", since)
    assert set(through_other) == {"drawn"}
    assert set(through_lost) <= {"drawn", "ReadError", "RemoteProtocolError", "ConnectError", "WriteError"}


def counted(outages: Outages) -> int:
    """Requests that the limits store has counted."""
    with redis.Redis.from_url(f"{outages.redis.url}/1") as client:
        return sum(client.llen(key) for key in client.keys("*") if client.type(key) == b"list")


def test_a_redis_that_hangs_delays_nobody_for_long(
    outages: Outages, expected: np.ndarray, recovered: Recovered
) -> None:
    """The limits of keys and what the head keeps are in it; each ingress counts on its own meanwhile."""
    before = counted(outages)
    outages.redis.process.suspend()
    try:
        with outages.client(outages.heads) as heads, outages.client(outages.workers) as workers:
            since = time.monotonic()
            for client in (heads, workers):
                assert np.abs(draw(client, **BODY)[0] - expected).max() <= 1
            recovered("Redis hangs, the first picture through each proxy", since)
            for _ in range(10):
                assert np.abs(draw(workers, **BODY)[0] - expected).max() <= 1
        assert is_whole(outages.workers)
    finally:
        outages.redis.process.resume()
    since = time.monotonic()
    assert counted(outages) <= before + 1, "nobody could count there"
    with outages.client(outages.workers) as client:

        def counts_again() -> bool:
            now = counted(outages)
            draw(client, **BODY)
            return counted(outages) > now

        wait_for(counts_again)
    recovered("Redis goes on, requests are counted in it", since)


def test_a_head_that_comes_back_finds_everything(outages: Outages, expected: np.ndarray, recovered: Recovered) -> None:
    """Controller, its proxy and Ray's control store are away; replicas serve on through the other node's proxy."""
    with drawing(outages, outages.workers, expected) as outcomes:
        some_more(outcomes)
        outages.nodes.head.kill()
        some_more(outcomes)
        wait_for(lambda: "controller has not answered" in httpx.get(f"{outages.workers}/readyz").text)
        assert is_whole(outages.workers), "what was ready serves on"
        some_more(outcomes)
        since = time.monotonic()
        outages.nodes.start_head()
        wait_until_whole(outages.heads)
        recovered("head started anew, its proxy and controller serve", since)
        some_more(outcomes)
        kill(outages.nodes.worker, "ServeReplica:sdgraph:vae-sd15")
        some_more(outcomes)
        recovered("the same, and a replica that died then was replaced", since)
    assert set(outcomes) <= {"drawn", "refused"}
    assert outcomes["refused"] <= 2, "the killed VAE's alone"
    with outages.client(outages.heads) as client:
        assert np.abs(draw(client, **BODY)[0] - expected).max() <= 1
