"""What a client sees of long and weighted prompts: headers, refusals, tags that are LoRAs."""

from __future__ import annotations

import httpx
import numpy as np

from tests.support.http import PATH, SMALL, check, events, picture, pixels, post

LONG = "a cat on a mat, " * 12


async def test_a_header_tells_how_long_the_prompt_is(client: httpx.AsyncClient) -> None:
    tokens = 12 * len("acatonamat,")  # the tiny tokenizer knows single bytes
    for fields, told in [
        ({"prompt": "a cat"}, "6/77 chunks=1"),
        ({"prompt": LONG}, f"{tokens + 2}/77 chunks=2"),
        ({"prompt": LONG, "long_prompt": "cut"}, f"{tokens + 2}/77 chunks=1 cut"),
        ({"negative_prompt": LONG}, f"{tokens + 2}/77 chunks=2"),
        ({"prompt": "a BREAK b", "prompt_syntax": "weighted"}, "4/77 chunks=2"),
    ]:
        assert (await post(client, **fields)).headers["x-prompt-tokens"] == told
    body = {"model": "SD1.5", "prompt": LONG, "size": "128x128", "seed": 1}
    reply = await client.post("/v1/images/generations", json=body)
    assert reply.headers["x-prompt-tokens"] == f"{tokens + 2}/77 chunks=2"


async def test_a_watched_prompt_is_told_at_the_end(client: httpx.AsyncClient) -> None:
    """The headers of a stream are sent before a text is counted."""
    told = f"{12 * len('acatonamat,') + 2}/77 chunks=2"
    name, result = events((await post(client, prompt=LONG, stream=True)).text)[-1]
    assert (name, result["prompt_tokens"]) == ("result", told)
    body = {"model": "SD1.5", "prompt": LONG, "size": "128x128", "seed": 1, "stream": True}
    text = (await client.post("/v1/images/generations", json=body)).text
    name, completed = events(text.replace("data: [DONE]\n\n", ""))[-1]
    assert (name, completed["prompt_tokens"]) == ("image_generation.completed", told)


async def test_with_a_refiner_the_header_tells_of_the_bases_texts(client: httpx.AsyncClient) -> None:
    fields = {"model_name": "SDXL1.0-base", "width": 256, "height": 256, "enable_refiner": True, "steps": 5}
    reply = await post(client, prompt_2=LONG, **fields)
    assert reply.headers["x-prompt-tokens"] == "134/77 chunks=2"


async def test_a_prompt_of_one_chunk_is_drawn_as_without_chunks(client: httpx.AsyncClient) -> None:
    """Brackets are text unless weights are asked for, and cutting changes nothing where nothing is too long."""
    plain = pixels(picture(await post(client, prompt="a (red:1.5) cat", output_format="png")))
    cut = pixels(picture(await post(client, prompt="a (red:1.5) cat", long_prompt="cut", output_format="png")))
    assert np.array_equal(plain, cut)
    fields = {"prompt_syntax": "WEIGHTED", "emphasis": "no norm", "output_format": "png"}
    assert np.abs(plain - pixels(picture(await post(client, prompt="a (red:1.5) cat", **fields)))).max() > 1
    escaped = pixels(picture(await post(client, prompt=r"a \(red:1.5\) cat", **fields)))
    assert np.array_equal(plain, escaped)


async def test_a_lora_tag_is_a_lora(client: httpx.AsyncClient) -> None:
    """Alone, twice, and beside the field, whose weight it adds to."""
    fields = {"output_format": "png", "prompt_syntax": "weighted"}
    field = pixels(picture(await post(client, prompt="a cat ", loras={"Pixel_Art": 0.75}, output_format="png")))
    for prompt, loras in [
        ("a cat <lora:Pixel_Art:0.75>", {}),
        ("<lora:pixel_art:0.5>a cat <lora:Pixel_Art:0.25>", {}),
        ("a cat <lora:Pixel_Art:0.25>", {"Pixel_Art": 0.5}),
    ]:
        assert np.array_equal(field, pixels(picture(await post(client, prompt=prompt, loras=loras, **fields))))
    parts = {"Pixel_Art": {"text_encoder": 0.4, "unet": 0.8}}
    field_of_parts = pixels(picture(await post(client, prompt="a cat ", loras=parts, output_format="png")))
    of_parts = pixels(picture(await post(client, prompt="a cat <lora:Pixel_Art:0.4:0.8>", **fields)))
    assert np.array_equal(of_parts, field_of_parts)
    assert np.abs(of_parts - field).max() > 1
    plain = pixels(picture(await post(client, prompt="a cat <lora:Pixel_Art:0>", **fields)))
    assert np.abs(plain - field).max() > 1
    assert np.array_equal(plain, pixels(picture(await post(client, prompt="a cat", output_format="png"))))


async def test_a_watched_prompt_that_is_too_long_ends_in_an_error_event(client: httpx.AsyncClient) -> None:
    """Texts are measured where the tokenizer is, so the stream has begun."""
    reply = await client.post(PATH, json=SMALL | {"prompt": "a, " * 700, "stream": True})
    name, data = events(reply.text)[-1]
    assert (name, data["param"], data["code"]) == ("error", "prompt", 40302)
    check(await post(client, prompt="a, " * 700), 400, 40302, "prompt")


async def test_the_documentation_describes_every_field(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for name, field in schemas["GenerationRequest"]["properties"].items():
        assert len(field.get("description", "")) > 10, name
