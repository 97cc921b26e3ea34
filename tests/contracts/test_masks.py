"""Masks as clients send them: Hyperbolic's white, OpenAI's transparency."""

from __future__ import annotations

import io

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.http import decoded, encoded, picture, pixels, post


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


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
