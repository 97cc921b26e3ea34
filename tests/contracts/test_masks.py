"""Masks as clients send them: Hyperbolic's white, OpenAI's transparency."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
from PIL import Image

from config.catalog import Catalog
from config.settings import Settings
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from tests.support.bound import run_locally
from tests.support.http import check as check_error
from tests.support.http import decoded, encoded, events, picture, pixels, post
from tests.support.ingress import ClientFactory
from tests.support.pictures import png

SENT = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
LEFT = Image.new("L", (128, 128))
LEFT.paste(255, (0, 0, 64, 128))


def check(drawn: np.ndarray) -> None:
    """The left half changed, the right one did not."""
    sent = pixels(SENT)
    assert np.array_equal(drawn[:, 64:], sent[:, 64:])
    assert np.abs(drawn[:, :64] - sent[:, :64]).mean() > 5


@pytest.mark.parametrize("streamed", [False, True])
async def test_white_is_repainted_and_black_comes_back_to_the_bit(client: httpx.AsyncClient, streamed: bool) -> None:
    fields = {"image": encoded(png(SENT)), "mask_image": encoded(png(LEFT)), "output_format": "png"}
    if streamed:
        text = (await post(client, stream=True, **fields)).text
        result = next(line for line in text.split("\n\n") if line.startswith("event: result"))
        image = decoded(result.split('"image": "')[1].split('"')[0])
    else:
        image = picture(await post(client, **fields))
    check(pixels(image))


@pytest.mark.parametrize("kind", ["transparent", "white"])
async def test_openais_masks_are_transparent_where_they_repaint(client: httpx.AsyncClient, kind: str) -> None:
    mask = LEFT
    if kind == "transparent":
        mask = SENT.copy().convert("RGBA")
        mask.putalpha(LEFT.point(lambda value: 255 - value))
    files = {"image": ("a.png", png(SENT), "image/png"), "mask": ("m.png", png(mask), "image/png")}
    form = {"model": "SD1.5", "prompt": "a cat", "size": "128x128", "seed": "3", "output_format": "png", "steps": "3"}
    reply = await client.post("/v1/images/edits", files=files, data=form)
    assert reply.status_code == 200, reply.text
    check(pixels(decoded(reply.json()["data"][0]["b64_json"])))


async def test_info_says_that_a_mask_is_needed(client: httpx.AsyncClient) -> None:
    fields = {"image": encoded(png(SENT)), "mask_image": encoded(png(LEFT)), "mask_blur": 2, "inpaint_fill": "noise"}
    file = (await post(client, **fields)).json()["images"][0]["image"]
    told = (await client.post("/v1/images/info", json={"image": file})).json()
    assert told["needs"] == ["image", "mask_image"]
    assert (told["request"]["mask_blur"], told["request"]["inpaint_fill"]) == (2, "noise")
    assert "inpaint_area" not in told["request"]


async def test_a_model_for_inpainting_draws_under_a_mask_and_without_one(
    inpainting_catalog: Catalog, connect: ClientFactory
) -> None:
    """Its first stage always begins at the VAE, which makes a grey picture where none was sent."""
    wanted = ("unet-sd1.5-inpainting", "vae-sd15", "text-encoder-sd15")
    components = tuple(c for c in inpainting_catalog.components if c.id in wanted)
    models = (inpainting_catalog.model("SD1.5-inpainting"),)
    part = Catalog(components=components, models=models, styles=inpainting_catalog.styles)
    bound = bind_components(AppArgs(grouping="role"), part, Runtime(device="cpu", torch_threads=1))
    under_a_mask = {"image": encoded(png(SENT)), "mask_image": encoded(png(LEFT)), "output_format": "png"}
    async with connect(graph=Graph(run_locally(bound, "inpainting")), catalog=part) as client:
        (listed,) = (await client.get("/v1/models")).json()["data"]
        assert listed["inpainting"] is True
        check(pixels(picture(await post(client, model_name="SD1.5-inpainting", **under_a_mask))))
        drawn = picture(await post(client, model_name="SD1.5-inpainting", output_format="png"))
        assert pixels(drawn).std() > 10
        streamed = await post(client, model_name="SD1.5-inpainting", stream=True, output_format="png")
        result = next(line for line in streamed.text.split("\n\n") if line.startswith("event: result"))
        again = decoded(result.split('"image": "')[1].split('"')[0])
        assert np.array_equal(pixels(again), pixels(drawn))
        file = result.split('"image": "')[1].split('"')[0]
        told = (await client.post("/v1/images/info", json={"image": file})).json()
        assert told["needs"] == []
        assert "strength" not in told["request"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_refiner_keeps_what_is_black(client: httpx.AsyncClient, streamed: bool) -> None:
    """The mask goes from stage to stage with the latents, also through the ingress."""
    sent, mask = SENT.resize((256, 256)), LEFT.resize((256, 256), Image.Resampling.NEAREST)
    fields = {"image": encoded(png(sent)), "mask_image": encoded(png(mask)), "output_format": "png", "steps": 6}
    fields |= {"model_name": "SDXL1.0-base", "width": 256, "height": 256, "enable_refiner": True}
    reply = await post(client, stream=streamed, **fields)
    file = events(reply.text)[-1][1]["images"][0]["image"] if streamed else reply.json()["images"][0]["image"]
    drawn, before = pixels(decoded(file)), pixels(sent)
    assert np.array_equal(drawn[:, 128:], before[:, 128:])
    assert np.abs(drawn[:, :128] - before[:, :128]).mean() > 5


async def test_a_mask_too_large_for_a_body_is_a_413(connect: ClientFactory) -> None:
    """With the server's own limit, in JSON and in a form."""
    limit = Settings.model_fields["max_body_bytes"].default
    huge = "A" * 40_000_000
    async with connect(max_body_bytes=limit) as client:
        check_error(await post(client, image=encoded(png(SENT)), mask_image=huge), 413, 40004, None)
        files = {"image": ("a.png", png(SENT), "image/png"), "mask": ("m.png", huge.encode(), "image/png")}
        check_error(await client.post("/v1/images/edits", files=files, data={"prompt": "a cat"}), 413, 40004, None)


async def test_a_mask_of_too_many_pixels_is_a_413_that_names_it(connect: ClientFactory) -> None:
    wide = encoded(png(Image.new("1", (2000, 1000))))
    async with connect(max_image_pixels=10**6) as client:
        reply = await post(client, image=encoded(png(SENT)), mask_image=wide)
        assert "2000x1000" in check_error(reply, 413, 40004, "mask_image")
