"""What dies, and what is too much: nothing is lost, nothing hangs, pictures are the same."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from tests.serve.conftest import COUNT, Eventful, send_all
from tests.support.http import check
from tests.support.live import replicas, request, wait_until_whole

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "deployment",
    ["text-encoder-sdxl", "controlnet-sdxl", "unet-sdxl-base-torch", "refiner-sdxl", "vae-sdxl", "ingress"],
)
def test_a_replica_killed_under_load_costs_no_picture(url: str, eventful: Eventful, deployment: str) -> None:
    victims = replicas(deployment)
    assert victims, f"no process of {deployment}"

    def kill() -> None:
        for victim in victims:
            victim.kill()

    pictures = send_all(url, eventful.bodies, after=3, then=kill)
    assert len(pictures) == COUNT
    for expected, pixels in zip(eventful.pictures, pictures, strict=True):
        assert np.abs(expected - pixels).max() <= 1
    assert not {p.pid for p in replicas(deployment)} & {p.pid for p in victims}
    wait_until_whole(url)


def test_a_killed_compiled_unet_costs_no_picture(url: str) -> None:
    """Who named tvm waits for the successor; `auto` may go on with torch, within that backend's 2/255."""
    bodies = [request("SD1.5", seed=i, width=512, height=512, backend=("tvm", "auto")[i % 2]) for i in range(COUNT)]
    expected = send_all(url, bodies)
    (victim,) = replicas("unet-sd15-tvm")
    pictures = send_all(url, bodies, after=3, then=victim.kill)
    for before, after in zip(expected, pictures, strict=True):
        assert np.abs(before - after).max() <= 2
    wait_until_whole(url)


def test_load_beyond_capacity_is_refused_early(url: str) -> None:
    """An open loop at four times what was measured: pictures in time, or a 503 that says when to come back."""
    body = request("SD1.5", steps=60, sampler="Euler", width=256, height=256)
    begin = time.monotonic()
    send_all(url, [body | {"seed": i} for i in range(12)])
    per_second = 12 / (time.monotonic() - begin)
    deadline_s, seconds = 6.0, 12.0
    count = int(4 * per_second * seconds)

    def one(index: int) -> httpx.Response:
        time.sleep(max(0.0, start + index / (4 * per_second) - time.monotonic()))
        headers = {"x-request-timeout-seconds": str(deadline_s)}
        with httpx.Client(base_url=url, timeout=60) as client:
            return client.post("/v1/image/generation", json=body | {"seed": index}, headers=headers)

    start = time.monotonic()
    with ThreadPoolExecutor(min(count, 200)) as pool:
        answers = list(pool.map(one, range(count)))
    assert {reply.status_code for reply in answers} == {200, 503}
    for reply in answers:
        if reply.status_code == 503:
            check(reply, 503, 42903, None)
            assert 1 <= int(reply.headers["retry-after"]) <= 60
        else:
            assert reply.json()["inference_time"] <= deadline_s, "what is late is refused"
    served = sum(reply.status_code == 200 for reply in answers)
    assert served >= per_second * seconds / 3, "shedding must leave the server working"
    wait_until_whole(url)
