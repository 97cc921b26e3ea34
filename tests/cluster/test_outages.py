"""What a cluster can lose while it serves: a proxy, its Redis, its head, its disk, the volume of its weights.

Requests are answered, or refused in the contract's form; pictures are those drawn before; nothing hangs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import httpx
import numpy as np
import pytest
import redis

from tests.cluster.conftest import LORAS, NO_DISK, NO_VOLUME, Outages, compile_into
from tests.cluster.nodes import Node
from tests.support.disk import fill
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
def test_a_killed_proxy_loses_only_its_own_connections(
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


def test_a_hanging_redis_delays_requests_only_briefly(
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


def test_a_restarted_head_restores_the_graph(outages: Outages, expected: np.ndarray, recovered: Recovered) -> None:
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


@pytest.mark.skipif(NO_DISK is not None, reason=str(NO_DISK))
def test_a_compile_that_filled_its_disk_left_nothing_to_load(outages: Outages, expected: np.ndarray) -> None:
    """A graph with compiled UNets draws with torch where the disk was full before the first was complete."""
    compiled = compile_into(outages.programs)
    assert compiled.returncode != 0
    assert f"--cache {outages.programs}: no space left on device" in compiled.stderr
    assert not [folder for folder in outages.programs.iterdir() if folder.is_dir() and folder.suffix != ".partial"]
    kill(outages.nodes.worker, "ServeReplica:sdgraph:unet-sd15-tvm")
    with outages.client(outages.workers) as client:
        sized = BODY | {"width": 512, "height": 512, "steps": 2}
        reply = client.post(PATH, json=sized | {"backend": "auto"})
        assert (reply.status_code, reply.headers["x-backend"]) == (200, "torch")
        assert "compiled" in check(client.post(PATH, json=sized | {"backend": "tvm"}), 400, 40302, "backend")


@pytest.mark.skipif(NO_DISK is not None, reason=str(NO_DISK))
def test_a_full_disk_under_rays_folder_stops_no_picture(
    outages: Outages, expected: np.ndarray, recovered: Recovered
) -> None:
    """Logs are lost, and a replica that dies cannot be started anew; that is said, and it comes when there is room."""
    full = fill(outages.temp)
    try:
        with outages.client(outages.workers) as client:
            for _ in range(10):
                assert np.abs(draw(client, **BODY)[0] - expected).max() <= 1
            kill(outages.nodes.worker, "ServeReplica:sdgraph:vae-sd15")
            reply = client.post(PATH, json=BODY, headers={"x-request-timeout-seconds": "15"})
            if reply.status_code == 200:
                assert np.abs(pixels(picture(reply)) - expected).max() <= 1
            else:
                assert reply.status_code in (503, 504)
                check(reply, reply.status_code, {503: 42903, 504: 50006}[reply.status_code], None)
    finally:
        full.unlink()
    since = time.monotonic()
    wait_until_whole(outages.workers)
    with outages.client(outages.workers) as client:
        assert np.abs(draw(client, **BODY)[0] - expected).max() <= 1
    recovered("room on Ray's disk again, a picture", since)


@pytest.mark.skipif(NO_VOLUME is not None, reason=str(NO_VOLUME))
def test_a_volume_that_hangs_stops_only_what_needs_it(
    outages: Outages, expected: np.ndarray, recovered: Recovered
) -> None:
    """A replica starts from it, LoRAs are on it: what needs them waits or is refused, what does not is drawn."""
    assert outages.server is not None
    slow = BODY | {"model_name": "Slow"}
    hurried = {"x-request-timeout-seconds": "8"}
    with outages.client(outages.workers) as client, ThreadPoolExecutor(12) as pool:
        assert np.abs(draw(client, **slow)[0] - expected).max() <= 1, "the same weights"
        known = draw(client, **BODY, loras={LORAS[0]: 1})[0]

        def ask(body: dict[str, Any], headers: dict[str, str]) -> httpx.Response:
            return client.post(PATH, json=body, headers=headers)

        outages.server.suspend()
        try:
            kill(outages.nodes.worker, "ServeReplica:sdgraph:unet-slow-torch")
            waiting = [pool.submit(ask, BODY | {"loras": {name: 1}}, hurried) for name in LORAS[1:] * 2]
            waiting.append(pool.submit(ask, slow, hurried))
            patient: Future[httpx.Response] = pool.submit(ask, slow, {})
            assert np.abs(draw(client, **BODY)[0] - expected).max() <= 1
            assert np.abs(draw(client, **BODY, loras={LORAS[0]: 1})[0] - known).max() <= 1, "it is loaded"
            assert "One" in {entry["name"] for entry in client.get("/v1/loras").json()["data"]}
            for reply in (future.result() for future in waiting):
                assert reply.status_code in (503, 504)
                check(reply, reply.status_code, {503: 42903, 504: 50006}[reply.status_code], None)
            assert np.abs(draw(client, **BODY)[0] - expected).max() <= 1
            wait_for(lambda: unhealthy(client) == ["unet-slow-torch"])
        finally:
            outages.server.resume()
        since = time.monotonic()
        assert np.abs(pixels(picture(patient.result())) - expected).max() <= 1, "it waited"
        wait_until_whole(outages.workers)
        for name in LORAS:
            assert np.abs(draw(client, **BODY, loras={name: 1})[0] - known).max() <= 1
        recovered("the volume goes on, everything on it draws", since)


def unhealthy(client: httpx.Client) -> list[str]:
    """Deployments that Serve calls anything but healthy."""
    states = client.get("/readyz").json()["deployments"]
    return [name for name, state in states.items() if not state.startswith("HEALTHY")]
