"""Waiting for calls that depend on one another: what Serve would wait for for ever is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from deployments.graph import Call
from deployments.ingress import health, pending
from deployments.ingress.pending import Pending
from tests.support.graph import FakeGraph, FakeResponse, denoised, never, raising, unending
from tests.support.http import check_outcome, outcome
from tests.support.ingress import ClientFactory

LOST = ActorUnavailableError("its node is gone", b"0" * 16)


async def healthy() -> bool:
    return True


async def unhealthy() -> bool:
    return False


def call(edge: Any = never) -> Call[Any]:
    return Call(FakeResponse(edge, {}))


@pytest.fixture(autouse=True)
def frequent_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "HEALTH_CHECK_S", 0.01)


async def test_a_result_that_takes_its_time_is_waited_for() -> None:
    release = asyncio.Event()

    async def release_after_checks() -> bool:
        nonlocal checks
        checks += 1
        if checks == 3:
            release.set()
        return False

    async def slow() -> str:
        await release.wait()
        return "picture"

    async def latents() -> str:
        return "latents"

    checks = 0
    async with Pending(release_after_checks) as waiting:
        waiting.add(call(latents))
        assert await waiting.wait(call(slow)) == "picture"


@pytest.mark.parametrize(("health_check", "check_arguments_s"), [(unhealthy, 60.0), (healthy, 0.0)])
async def test_a_failed_argument_is_noticed_while_the_last_call_hangs(
    health_check: Any, check_arguments_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a deployment was unhealthy, or after long."""
    monkeypatch.setattr(pending, "CHECK_ARGUMENTS_S", check_arguments_s)
    async with Pending(health_check) as waiting:
        waiting.add(call())
        waiting.add(call(raising(LOST)))
        with pytest.raises(ActorUnavailableError):
            await waiting.wait(call())


async def test_no_argument_is_fetched_while_all_is_well() -> None:
    checks = 0
    fetched = False
    release = asyncio.Event()

    async def counting() -> bool:
        nonlocal checks
        checks += 1
        if checks == 5:
            release.set()
        return True

    async def latents() -> None:
        nonlocal fetched
        fetched = True

    async with Pending(counting) as waiting:
        waiting.add(call(latents))
        await waiting.wait(release.wait())
    assert not fetched


async def test_an_exception_cancels_every_call() -> None:
    calls = [call(), call()]

    async def fail() -> None:
        async with Pending(healthy) as waiting:
            for one in calls:
                waiting.add(one)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        await fail()
    assert all(one.response.cancelled for one in calls)


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("component", ["vae-sd15", "unet-sd15"])
async def test_a_deployment_that_cannot_start_is_not_waited_for(
    connect: ClientFactory, monkeypatch: pytest.MonkeyPatch, streamed: bool, component: str
) -> None:
    """Its constructor raises again and again; Serve's status says so."""

    async def failing() -> tuple[bool, Mapping[str, str]]:
        return False, {component: "UPDATING: A replica failed to start with exception. Retrying. Error: no weights"}

    monkeypatch.setattr(health, "GIVE_UP_S", 0.0)
    watched = denoised if component == "vae-sd15" else unending
    graph = FakeGraph(decode=never, denoise_watched=watched)
    async with connect(graph=graph, readiness=failing) as client:
        reply = await outcome(client, streamed)
    assert f"'{component}'" in check_outcome(reply, streamed, 503, 42903)
    if not streamed:
        assert reply.headers["retry-after"] == "60"
