"""The hub catalog over a filled cache, grouped by role, through HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from tests.support import hub_cache
from tests.support.bound import name_of, run_locally
from tests.support.http import PATH, check, picture, pixels
from tests.support.ingress import ClientFactory, open_client

FIELDS: dict[str, Any] = {"prompt": "a lighthouse", "steps": 6, "seed": 5, "output_format": "png"}


@pytest.fixture(scope="module")
def hub_catalog(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    """Two of its models, and no network."""
    home = hub_cache.fill(tmp_path_factory.mktemp("hf"), tiny_models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield Catalog.load("hub").only(("SD1.5", "SDXL1.0-base"))


@pytest.fixture(scope="module")
def connect_hub(hub_catalog: Catalog) -> ClientFactory:
    bound = bind_components(AppArgs(grouping="role"), hub_catalog, Runtime("cpu", torch_threads=1))
    assert {name_of(app) for app in bound.values()} == {"text-encoder", "unet-torch", "refiner", "vae"}
    return partial(open_client, graph=Graph(run_locally(bound, "hub")), catalog=hub_catalog)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_name": "SD1.5", "width": 128, "height": 128},
        {"model_name": "SDXL1.0-base", "width": 256, "height": 256, "enable_refiner": True},
    ],
    ids=lambda fields: str(fields["model_name"]),
)
async def test_the_hub_catalog_is_served_from_its_cache(connect_hub: ClientFactory, fields: dict[str, Any]) -> None:
    async with connect_hub() as client:
        drawn = [pixels(picture(await client.post(PATH, json=FIELDS | fields))) for _ in range(2)]
    assert drawn[0].std() > 10
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


async def test_a_model_that_was_not_chosen_is_not_served(connect_hub: ClientFactory) -> None:
    async with connect_hub() as client:
        reply = await client.post(PATH, json=FIELDS | {"model_name": "SD2"})
    assert "['SDXL1.0-base', 'SD1.5']" in check(reply, 400, 40301, "model_name")
