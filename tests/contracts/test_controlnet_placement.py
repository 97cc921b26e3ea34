"""ControlNets in a deployment of their own, forgetful or not, and in the UNet's replica: the same picture."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.replicas.base import Runtime
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.contracts.conftest import ClientFactory, run_locally
from tests.contracts.test_generation import picture, pixels

PHOTO = io.BytesIO()
Image.effect_noise((90, 70), 80).convert("RGB").save(PHOTO, "PNG")
FIELDS: dict[str, Any] = {"model_name": "SD1.5-ControlNet", "prompt": "a fox", "width": 128, "height": 128}
FIELDS |= {"steps": 4, "seed": 3, "controlnet_name": "canny"}


@pytest.mark.parametrize("placement", ["deployment", "colocated"])
@pytest.mark.parametrize("remembered", [0, 64])
async def test_placement(
    connect: ClientFactory, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, placement: str, remembered: int
) -> None:
    """A replica that remembers no map asks for it at every tick, and gets it."""
    monkeypatch.setattr("deployments.replicas.controlnet.REMEMBERED_HINTS", remembered)
    part = catalog.only(("SD1.5-ControlNet",))
    args = AppArgs.model_validate({"controlnet_placement": placement})
    bound = bind_components(args, part, Runtime(device="cpu", torch_threads=2))
    names = {app._bound_deployment.name for app in bound.values()}
    assert ("controlnet-sd15" in names) == (placement == "deployment")
    handles = run_locally(bound, f"{placement}-{remembered}")
    async with connect(handles=handles) as client:
        wire = {"controlnet_image": base64.b64encode(PHOTO.getvalue()).decode(), "output_format": "png"}
        drawn = picture(await client.post("/v1/image/generation", json=FIELDS | wire))
    expected = Text2Image(catalog).generate(GenerationParams(**FIELDS, controlnet_image=PHOTO.getvalue())).image
    assert np.abs(pixels(drawn) - pixels(expected)).max() <= 1
