"""ControlNets in a deployment of their own, forgetful or not, and in the UNet's replica: the same picture."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from deployments.replicas.controlnet import ControlNetDeployment
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.support.bound import name_of, run_locally
from tests.support.http import encoded, photo, picture, pixels
from tests.support.ingress import ClientFactory

PHOTO = photo()
FIELDS: dict[str, Any] = {"model_name": "SD1.5-ControlNet", "prompt": "a fox", "width": 128, "height": 128}
FIELDS |= {"steps": 4, "sampler": "Euler", "controlnet_name": "canny"}


@pytest.mark.parametrize("placement", ["deployment", "colocated"])
async def test_both_placements_draw_what_one_process_draws(
    connect: ClientFactory, catalog: Catalog, placement: str
) -> None:
    part = catalog.only(("SD1.5-ControlNet",))
    args = AppArgs.model_validate({"controlnet_placement": placement})
    bound = bind_components(args, part, Runtime(device="cpu", torch_threads=2))
    assert ("controlnet-sd15" in {name_of(app) for app in bound.values()}) == (placement == "deployment")
    async with connect(graph=Graph(run_locally(bound, placement))) as client:
        wire = {"controlnet_image": encoded(PHOTO), "output_format": "png", "seed": 3}
        drawn = picture(await client.post("/v1/image/generation", json=FIELDS | wire))
    params = GenerationParams(**FIELDS, seed=3, controlnet_image=PHOTO)
    expected = Text2Image(catalog).generate(params).image
    assert np.abs(pixels(drawn) - pixels(expected)).max() <= 1


async def test_a_replica_that_forgot_a_map_asks_for_it(
    connect: ClientFactory, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two maps take turns in a replica that remembers one: each is sent again, and the pictures stay the same."""
    monkeypatch.setattr("deployments.replicas.controlnet.REMEMBERED_HINTS", 1)
    answers: list[tuple[int, bool]] = []
    residuals = ControlNetDeployment.residuals

    async def counted(self: ControlNetDeployment, **arguments: Any) -> Any:
        answer = await residuals(self, **arguments)
        answers.append((len(arguments["hints"]), answer is not None))
        return answer

    monkeypatch.setattr(ControlNetDeployment, "residuals", counted)
    bound = bind_components(AppArgs(), catalog.only(("SD1.5-ControlNet",)), Runtime(device="cpu", torch_threads=2))
    photos = {3: PHOTO, 4: photo(50, 60)}
    async with connect(graph=Graph(run_locally(bound, "forgetful"))) as client:
        replies = await asyncio.gather(
            *(
                client.post(
                    "/v1/image/generation",
                    json=FIELDS | {"controlnet_image": encoded(given), "output_format": "png", "seed": seed},
                )
                for seed, given in photos.items()
            )
        )
    requests = [GenerationParams(**FIELDS, seed=seed, controlnet_image=given) for seed, given in photos.items()]
    for reply, expected in zip(replies, Text2Image(catalog).generate_many(requests), strict=True):
        assert np.abs(pixels(picture(reply)) - pixels(expected.image)).max() <= 1
    assert (0, False) in answers, "it was asked about a map it had forgotten"
    assert any(sent and answered for sent, answered in answers), "and was sent the map"
    assert all(answered for sent, answered in answers if sent), "a call that brings its maps is answered"
