"""Deployments that may have scaled to zero are pinged together, when a request that will visit them is admitted."""

from __future__ import annotations

import pytest

from deployments.graph import Graph
from deployments.ingress import wake
from tests.support.graph import FakeGraph, raising
from tests.support.http import post
from tests.support.ingress import ClientFactory


async def test_deployments_that_may_have_scaled_to_zero_are_pinged_first(
    connect: ClientFactory, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = FakeGraph(graph)
    async with connect(graph=watched) as client:
        assert (await post(client)).status_code == 200
        pinged = {call["deployment"] for call in watched.named("ping")}
        assert pinged == {"text-encoder", "unet-torch", "vae"}
        watched.calls.clear()
        assert (await post(client)).status_code == 200
        assert watched.named("ping") == [], "visited a moment ago"
        monkeypatch.setattr(wake, "PING_AFTER_S", 0.0)
        assert (await post(client)).status_code == 200
        assert {"deployment": "vae"} in watched.named("ping")


async def test_a_failing_ping_does_not_fail_the_request(connect: ClientFactory, graph: Graph) -> None:
    watched = FakeGraph(graph, ping=raising(RuntimeError("no")))
    async with connect(graph=watched) as client:
        assert (await post(client)).status_code == 200
    assert watched.named("ping")
