"""A1111's routes for finished pictures: what their files tell, and larger ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from tests.support.bound import run_locally
from tests.support.http import decoded, encoded, photo, pixels
from tests.support.ingress import open_client
from tests.support.upscalers import FILE, X2, by_spandrel, with_upscalers

SINGLE, BATCH = "/sdapi/v1/extra-single-image", "/sdapi/v1/extra-batch-images"
SENT = photo(40, 30)


async def enlarged(client: httpx.AsyncClient, **fields: Any) -> Image.Image:
    reply = await client.post(SINGLE, json={"image": encoded(SENT)} | fields)
    assert reply.status_code == 200, reply.text
    assert set(reply.json()) == {"html_info", "image"}
    return decoded(reply.json()["image"])


async def test_a_larger_picture_is_that_of_the_main_route(client: httpx.AsyncClient) -> None:
    for theirs, ours in (("Lanczos", "lanczos"), ("Nearest", "nearest")):
        body = {"image": encoded(SENT), "upscaler": ours, "scale": 1.5}
        expected = decoded((await client.post("/v1/images/upscale", json=body)).json()["images"][0]["image"])
        assert np.array_equal(pixels(await enlarged(client, upscaler_1=theirs, upscaling_resize=1.5)), pixels(expected))


async def test_the_upscaler_none_changes_nothing(client: httpx.AsyncClient) -> None:
    """What webuiapi sends by default."""
    sent = {"resize_mode": 0, "show_extras_results": True, "upscaler_1": "None", "upscaler_2": "None"}
    sent |= {"gfpgan_visibility": 0, "codeformer_visibility": 0, "codeformer_weight": 0, "upscaling_resize": 2}
    sent |= {"upscaling_resize_w": 512, "upscaling_crop": True, "extras_upscaler_2_visibility": 0}
    for fields in (sent, {}, dict.fromkeys(sent)):
        assert np.array_equal(pixels(await enlarged(client, **fields)), pixels(Image.open(io.BytesIO(SENT))))


async def test_a_size(client: httpx.AsyncClient) -> None:
    to = {"upscaler_1": "Lanczos", "resize_mode": 1, "upscaling_resize_w": 80}
    assert (await enlarged(client, **to, upscaling_resize_h=60)).size == (80, 60)
    assert (await enlarged(client, **to, upscaling_resize_h=90, upscaling_crop=False)).size == (120, 90)


async def test_several(client: httpx.AsyncClient) -> None:
    pictures = [{"data": encoded(photo(20, 10)), "name": "a"}, {"data": encoded(photo(10, 20)), "name": "b"}]
    reply = await client.post(BATCH, json={"imageList": pictures, "upscaler_1": "Lanczos"})
    assert [decoded(image).size for image in reply.json()["images"]] == [(40, 20), (20, 40)]


async def test_a_model_enlarges(catalog: Catalog, tiny_models: Path) -> None:
    offered = with_upscalers(catalog, tiny_models)
    bound = bind_components(AppArgs(grouping="role"), offered, Runtime(device="cpu", torch_threads=1))
    only = {name: handle for name, handle in bound.items() if name.startswith("upscaler")}
    async with open_client(graph=Graph(run_locally(only, "enlarging")), catalog=offered) as client:
        listed = [entry["name"] for entry in (await client.get("/sdapi/v1/upscalers")).json()]
        assert X2 in listed
        image = await enlarged(client, upscaler_1=X2)
    expected = by_spandrel(tiny_models / "upscaler-x2" / FILE, Image.open(io.BytesIO(SENT)))
    assert np.abs(pixels(image) - pixels(expected)).max() <= 1


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    (SINGLE, {"upscaler_1": "LDSR"}, "upscaler_1", "'lanczos'"),
    (SINGLE, {"upscaler_1": "Latent"}, "upscaler_1", "'lanczos'"),
    (SINGLE, {"upscaler_1": "Lanczos", "upscaling_resize": 0.5}, "upscaling_resize", "1"),
    (SINGLE, {"upscaler_1": "Lanczos", "resize_mode": 1}, "upscaling_crop", "of its shape"),
    (SINGLE, {"gfpgan_visibility": 0.5}, "gfpgan_visibility", "face restorer"),
    (SINGLE, {"extras_upscaler_2_visibility": 1}, "extras_upscaler_2_visibility", "alone"),
    (SINGLE, {"image": None}, "image", "missing"),
    (SINGLE, {"image": encoded(b"x")}, "image", "PNG"),
    (BATCH, {}, "imageList", "empty"),
]


@pytest.mark.parametrize(("path", "fields", "param", "says"), BAD)
async def test_what_is_not_possible(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    reply = await client.post(path, json={"image": encoded(SENT)} | fields)
    body = reply.json()
    assert (reply.status_code, body["param"]) == (400, param), body
    assert says in body["detail"]


async def test_options_say_the_format(client: httpx.AsyncClient) -> None:
    await client.post("/sdapi/v1/options", json={"samples_format": "webp"})
    assert (await enlarged(client, upscaler_1="Lanczos")).format == "WEBP"
