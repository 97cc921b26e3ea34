"""The embedded models draw what the prompt says: two objects, two colours, over HTTP at default settings."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from tests.support.bound import run_locally
from tests.support.http import check, picture
from tests.support.ingress import open_client
from training import judge
from training.words import COLOURS, DRAWN

PHOTO = io.BytesIO()
Image.effect_noise((64, 64), 90).convert("RGB").save(PHOTO, "PNG")
CONTROL = {"controlnet_name": "canny", "controlnet_image": base64.b64encode(PHOTO.getvalue()).decode()}


@pytest.fixture(scope="module")
def embedded_catalog() -> Catalog:
    return Catalog.load("embedded")


@pytest.fixture(scope="module")
def embedded_graph(embedded_catalog: Catalog) -> Graph:
    args = AppArgs(catalog="embedded", grouping="role")
    bound = bind_components(args, embedded_catalog, Runtime("cpu", torch_threads=1))
    return Graph(run_locally(bound, "embedded"))


@pytest.fixture
async def embedded(embedded_catalog: Catalog, embedded_graph: Graph) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(graph=embedded_graph, catalog=embedded_catalog, deadline_s=120) as client:
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
        assert list(DRAWN)[int(judge.load()(pixels).argmax())] == thing


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"loras": {"Logo": 1.0}}, "loras"),
        ({"model_name": "SD1.5-ControlNet", "controlnet_name": "depth"}, "controlnet_name"),
    ],
)
async def test_what_the_embedded_models_were_not_trained_on_is_an_error(
    embedded: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    photo = CONTROL if "controlnet_name" in fields else {}
    body = {"model_name": "SD1.5", "prompt": "a cat", "width": 512, "height": 512} | photo | fields
    check(await embedded.post("/v1/image/generation", json=body), 400, 40302, param)


async def test_every_model_of_the_contract_draws(embedded: httpx.AsyncClient) -> None:
    models = [m["id"] for m in (await embedded.get("/v1/models")).json()["data"]]
    assert len(models) == 7
    for model in models:
        side = 512 if model.startswith("SD1") or model == "SD2" else 1024
        body = {"model_name": model, "prompt": "a cat on a red background", "width": side, "height": side, "steps": 4}
        body |= CONTROL if "ControlNet" in model else {}
        assert picture(await embedded.post("/v1/image/generation", json=body)).size == (side, side)
