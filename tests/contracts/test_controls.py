"""`controlnets` over HTTP: what the document says of it, what files tell of it, and OpenAI's forms."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np

from tests.support.http import check, decoded, encoded, photo, picture, pixels, post

CONTROLS: list[dict[str, Any]] = [
    {"name": "canny", "image": encoded(photo()), "weight": 0.5, "end": 0.5},
    {"name": "softedge", "image": encoded(photo(70, 50)), "preprocess": False, "start": 0.25, "guess": True},
]
IN_A_PLAN = [{name: value for name, value in control.items() if name != "image"} for control in CONTROLS]


async def test_a_picture_is_drawn_again_from_its_file(client: httpx.AsyncClient) -> None:
    drawn = await post(client, controlnets=CONTROLS, output_format="png")
    file = drawn.json()["images"][0]["image"]
    told = (await client.post("/v1/images/info", json={"image": file})).json()
    assert told["request"]["controlnets"] == IN_A_PLAN
    assert told["needs"] == ["controlnets.0.image", "controlnets.1.image"]
    for control, sent in zip(told["request"]["controlnets"], CONTROLS, strict=True):
        control["image"] = sent["image"]
    again = await client.post("/v1/image/generation", json=told["request"])
    assert np.abs(pixels(picture(again)) - pixels(picture(drawn))).max() <= 1
    infotext = told["parameters"]
    assert infotext["ControlNet 0"] == (
        "Module: canny, Model: controlnet-sd15-canny, Weight: 0.5, Guidance Start: 0, Guidance End: 0.5, "
        "Control Mode: Balanced"
    )
    assert infotext["ControlNet 1"].startswith("Module: none, ")
    assert infotext["ControlNet 1"].endswith("Control Mode: ControlNet is more important")


async def test_nulls_are_absent_and_unknown_fields_mistakes(client: httpx.AsyncClient) -> None:
    nulls = dict.fromkeys(["weight", "start", "end", "preprocess", "guess"])
    sparse = await post(client, controlnets=[nulls | {"name": "canny", "image": CONTROLS[0]["image"]}])
    full = await post(client, controlnets=[{"name": "Canny", "image": CONTROLS[0]["image"], "weight": 1.0}])
    assert np.array_equal(pixels(picture(sparse)), pixels(picture(full)))
    plain = await post(client)
    for none in ([], None):
        assert np.array_equal(pixels(picture(await post(client, controlnets=none))), pixels(picture(plain)))
    mistaken = await post(client, controlnets=[CONTROLS[0] | {"wieght": 1}])
    assert "controlnets.0.wieght" in check(mistaken, 422, 40001, "controlnets")
    lacking = await post(client, controlnets=[{"name": "canny"}])
    assert "controlnets.0.image: Field required" in check(lacking, 422, 40001, "controlnets")


async def test_openais_routes_take_controls_in_json_and_in_forms(client: httpx.AsyncClient) -> None:
    fields: dict[str, Any] = {"model": "SD1.5", "prompt": "a cat", "size": "128x128", "seed": 3, "steps": 3}
    made = await client.post("/v1/images/generations", json=fields | {"controlnets": CONTROLS})
    plain = await client.post("/v1/images/generations", json=fields)
    files = {"image": ("a.png", photo(), "image/png")}
    form = fields | {"controlnets": json.dumps(CONTROLS)}
    edited = await client.post("/v1/images/edits", files=files, data={k: str(v) for k, v in form.items()})
    unsteered = await client.post("/v1/images/edits", files=files, data={k: str(v) for k, v in fields.items()})
    pictures = [pixels(decoded(reply.json()["data"][0]["b64_json"])) for reply in (made, plain, edited, unsteered)]
    assert np.abs(pictures[0] - pictures[1]).mean() > 1, "the controls must show"
    assert np.abs(pictures[2] - pictures[3]).mean() > 1


async def test_the_document_describes_them(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    described = schemas["ControlRequest"]["properties"]
    assert set(described) == {"name", "image", "weight", "start", "end", "preprocess", "guess"}
    assert (described["weight"]["minimum"], described["weight"]["maximum"], described["weight"]["default"]) == (0, 2, 1)
    assert schemas["GenerationRequest"]["properties"]["controlnets"]["maxItems"] == 4
