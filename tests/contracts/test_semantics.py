"""The embedded models draw what the prompt says: two objects, two colours, over HTTP at default settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.ingress import Ingress, IngressLimits
from deployments.replica import Runtime
from pipelines.planning import PlanLimits
from tests.contracts.conftest import ready, run_locally
from tests.contracts.test_generation import picture
from training import judge
from training.words import COLOURS, OBJECTS


@pytest.fixture(scope="module")
def embedded_catalog() -> Catalog:
    return Catalog.load("embedded")


@pytest.fixture(scope="module")
def embedded_handles(embedded_catalog: Catalog) -> dict[str, Any]:
    args = AppArgs(catalog="embedded", grouping="role")
    bound = bind_components(args, embedded_catalog, Runtime("cpu", torch_threads=2))
    return run_locally(bound, "embedded")


@pytest.fixture
async def embedded(embedded_catalog: Catalog, embedded_handles: dict[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
    limits = IngressLimits(PlanLimits(10**8), 2**20, 10**6, 120)
    ingress = Ingress(embedded_handles, embedded_catalog, limits, {}, None, ready)
    transport = httpx.ASGITransport(ingress.__serve_build_asgi_app__(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://sdgraph", timeout=120) as client:
        yield client


@pytest.mark.parametrize("model", ["SD1.5", "SDXL1.0-base"])
@pytest.mark.parametrize(("thing", "colour"), [("sailboat", "blue"), ("cactus", "yellow")])
async def test_the_picture_shows_what_the_prompt_says(
    embedded: httpx.AsyncClient, model: str, thing: str, colour: str
) -> None:
    side = 512 if model == "SD1.5" else 1024
    body = {"model_name": model, "prompt": f"a {thing} on a {colour} background", "width": side, "height": side}
    drawn = picture(await embedded.post("/v1/image/generation", json=body | {"seed": 1, "output_format": "png"}))
    image = drawn.resize((256, 256), Image.Resampling.BOX)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    assert list(COLOURS)[int(judge.background_colour(pixels))] == colour
    with torch.no_grad():
        assert list(OBJECTS)[int(judge.load()(pixels).argmax())] == thing


async def test_what_is_not_trained_says_so(embedded: httpx.AsyncClient) -> None:
    reply = await embedded.post("/v1/image/generation", json={"model_name": "SSD", "prompt": "a cat"})
    assert reply.status_code == 400
    assert reply.json()["code"] == 40301
    assert "no embedded weights are trained for it yet" in reply.json()["message"]
