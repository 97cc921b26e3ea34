"""ControlNets in a deployment of their own, forgetful or not, and in the UNet's replica: the same picture."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from deployments.replicas.controlnet import ControlNetDeployment
from pipelines.control_plan import ControlParams
from pipelines.enlargement import HiresParams
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.support.bound import name_of, run_locally
from tests.support.http import decoded, encoded, events, photo, picture, pixels
from tests.support.ingress import ClientFactory
from tests.support.pictures import png

PHOTO = photo()
FIELDS: dict[str, Any] = {"model_name": "SD1.5-ControlNet", "prompt": "a fox", "width": 128, "height": 128}
FIELDS |= {"steps": 4, "sampler": "Euler", "controlnet_name": "canny"}


TWO_MAPS: list[dict[str, Any]] = [
    {"name": "canny", "image": PHOTO, "weight": 0.8, "end": 0.5},
    {"name": "softedge", "image": photo(70, 50), "preprocess": False, "guess": True},
]


def wire(fields: dict[str, Any]) -> dict[str, Any]:
    """The same in JSON: pictures in base64."""

    def told(value: Any) -> Any:
        if isinstance(value, list):
            return [wire(one) for one in value]
        return encoded(value) if isinstance(value, bytes) else value

    return {name: told(value) for name, value in fields.items()}


def params(fields: dict[str, Any]) -> GenerationParams:
    """The same without HTTP."""
    controls = tuple(ControlParams(**control) for control in fields.get("controlnets", ()))
    hires = HiresParams.model_validate(fields["hires"]) if "hires" in fields else None
    return GenerationParams(**fields | {"controlnets": controls, "hires": hires})


@pytest.mark.parametrize("placement", ["deployment", "colocated"])
async def test_both_placements_draw_what_one_process_draws(
    connect: ClientFactory, catalog: Catalog, placement: str
) -> None:
    part = catalog.only(("SD1.5-ControlNet",))
    args = AppArgs.model_validate({"controlnet_placement": placement})
    bound = bind_components(args, part, Runtime(device="cpu", torch_threads=1))
    assert ("controlnet-sd15" in {name_of(app) for app in bound.values()}) == (placement == "deployment")
    async with connect(graph=Graph(run_locally(bound, placement))) as client:
        wire = {"controlnet_image": encoded(PHOTO), "output_format": "png", "seed": 3}
        drawn = picture(await client.post("/v1/image/generation", json=FIELDS | wire))
    params = GenerationParams(**FIELDS, seed=3, controlnet_image=PHOTO)
    expected = Text2Image(catalog).generate(params).image
    assert np.abs(pixels(drawn) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("placement", ["deployment", "colocated"])
async def test_several_maps_a_mask_and_a_second_pass_in_both_placements(
    connect: ClientFactory, catalog: Catalog, placement: str
) -> None:
    """Maps of each size, and of the part that is drawn, are made where the ControlNets are; a stream draws the same."""
    part = catalog.only(("SD1.5", "SD1.5-ControlNet"))
    args = AppArgs.model_validate({"controlnet_placement": placement})
    bound = bind_components(args, part, Runtime(device="cpu", torch_threads=1))
    white = Image.new("L", (48, 48), 255)
    mask = Image.new("L", Image.open(io.BytesIO(PHOTO)).size)
    mask.paste(white, (20, 10))
    requests: list[dict[str, Any]] = [
        {"controlnets": TWO_MAPS, "hires": {"scale": 1.5, "steps": 2}},
        {"controlnets": TWO_MAPS[:1], "image": PHOTO, "mask_image": png(mask), "inpaint_area": "masked"},
    ]
    fields = {name: value for name, value in FIELDS.items() if name != "controlnet_name"}
    fields |= {"model_name": "SD1.5", "output_format": "png", "seed": 3}
    async with connect(graph=Graph(run_locally(bound, f"several-{placement}")), catalog=part) as client:
        bodies = [fields | wire(request) for request in requests]
        replies = await asyncio.gather(*(client.post("/v1/image/generation", json=body) for body in bodies))
        told = events((await client.post("/v1/image/generation", json=bodies[0] | {"stream": True})).text)
    drawn = Text2Image(part).generate_many([params(fields | request) for request in requests])
    for reply, expected in zip(replies, drawn, strict=True):
        assert np.abs(pixels(picture(reply)) - pixels(expected.image)).max() <= 1
    watched = decoded(told[-1][1]["images"][0]["image"])
    assert np.abs(pixels(watched) - pixels(drawn[0].image)).max() <= 1


@pytest.mark.parametrize("several", [False, True])
async def test_a_replica_that_forgot_a_map_asks_for_it(
    connect: ClientFactory, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    """Two maps take turns in a replica that remembers one: each is sent again, and the pictures stay the same.

    Of several maps of a row too, of which that replica never has all.
    """
    monkeypatch.setattr("deployments.replicas.controlnet.REMEMBERED_HINT_BYTES", 1)
    answers: list[tuple[int, bool]] = []
    residuals = ControlNetDeployment.residuals

    async def counted(self: ControlNetDeployment, **arguments: Any) -> Any:
        answer = await residuals(self, **arguments)
        answers.append((len(arguments["hints"]), answer is not None))
        return answer

    monkeypatch.setattr(ControlNetDeployment, "residuals", counted)
    bound = bind_components(AppArgs(), catalog.only(("SD1.5-ControlNet",)), Runtime(device="cpu", torch_threads=1))
    photos = {3: PHOTO, 4: photo(50, 60)}
    fields = FIELDS
    if several:
        fields = {k: v for k, v in FIELDS.items() if k != "controlnet_name"} | {"model_name": "SD1.5"}
    own = [
        {"seed": seed, **({"controlnets": [TWO_MAPS[1] | {"image": given}, *TWO_MAPS]} if several else one)}
        for seed, given in photos.items()
        for one in [{"controlnet_image": given}]
    ]
    async with connect(graph=Graph(run_locally(bound, f"forgetful-{several}"))) as client:
        bodies = [fields | wire(request) | {"output_format": "png"} for request in own]
        replies = await asyncio.gather(*(client.post("/v1/image/generation", json=body) for body in bodies))
    requests = [params(fields | request) for request in own]
    for reply, expected in zip(replies, Text2Image(catalog).generate_many(requests), strict=True):
        assert np.abs(pixels(picture(reply)) - pixels(expected.image)).max() <= 1
    assert (0, False) in answers, "it was asked about a map it had forgotten"
    assert any(sent and answered for sent, answered in answers), "and was sent the map"
    assert all(answered for sent, answered in answers if sent), "a call that brings its maps is answered"
