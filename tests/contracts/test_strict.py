"""`reproducible: strict`: the reply's picture has the same bytes whatever else is drawn at the same time."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from tests.support.bound import run_locally
from tests.support.ingress import ClientFactory

REQUEST = {"model_name": "SD1.5", "prompt": "a fox", "width": 128, "height": 128, "output_format": "png"}
SAMPLERS = ["DPM++ 2M SDE Heun Karras", "Euler a", "Heun", "DDIM", "LMS"]


@pytest.fixture(scope="module")
def strict_graph(catalog: Catalog) -> Graph:
    args = AppArgs(grouping="role", reproducible="strict")
    bound = bind_components(args, catalog.only(("SD1.5",)), Runtime(device="cpu", torch_threads=2))
    return Graph(run_locally(bound, "strict"))


async def picture(client: httpx.AsyncClient, **fields: Any) -> str:
    reply = await client.post("/v1/image/generation", json=REQUEST | fields)
    assert reply.status_code == 200, reply.text
    image: str = reply.json()["images"][0]["image"]
    return image


@pytest.mark.slow
async def test_equal_bytes_alone_and_among_seven_others(connect: ClientFactory, strict_graph: Graph) -> None:
    async with connect(graph=strict_graph) as client:
        for trial in range(20):
            own: dict[str, Any] = {"seed": trial, "steps": 3, "sampler": SAMPLERS[trial % 5], "cfg_scale": trial % 4}
            if trial % 2:
                own["loras"] = {"Pixel_Art": 0.5}
            alone = await picture(client, **own)
            others = [{"seed": 100 + i, "steps": 2 + i % 3, "sampler": SAMPLERS[i % 5]} for i in range(7)]
            place = trial % 8
            crowd = await asyncio.gather(*(picture(client, **one) for one in [*others[:place], own, *others[place:]]))
            assert crowd[place] == alone
            assert len(set(crowd)) == 8
