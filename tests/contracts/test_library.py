"""Files of a library over HTTP: found without a restart, named with a reason where they are not served."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.ingress import library as watching
from deployments.replicas.base import Runtime
from tests.support.bound import run_locally
from tests.support.http import check, encoded, photo, picture, pixels, post
from tests.support.ingress import ClientFactory, open_client
from tests.support.library import LORA, UNET, extended, put, settled, write

FOLDERS = {"Add_Detail": "detail", "Pixel_Art": "pixel"}
FIELDS: dict[str, Any] = {"sampler": "Euler", "output_format": "png"}


@pytest.fixture(scope="module")
def folder(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet alone, a damaged file, and room for LoRAs."""
    library = tmp_path_factory.mktemp("library")
    put(tiny_models / "sd15" / UNET, library / "checkpoints" / "My SD.safetensors")
    put(tiny_models / "controlnet-sd15-canny" / "diffusion_pytorch_model.safetensors", library / "My Edges.safetensors")
    write(library / "checkpoints" / "cut.safetensors", (tiny_models / "sd15" / UNET).read_bytes()[:5000])
    return library


@pytest.fixture(scope="module")
def built(catalog: Catalog, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return extended(catalog, [folder], tmp_path_factory.mktemp("digests") / "digests.json").only(
        ("SD1.5", "My SD", "SD1.5-ControlNet")
    )


@pytest.fixture(scope="module")
def graph(built: Catalog) -> Graph:
    bound = bind_components(AppArgs(grouping="role"), built, Runtime("cpu", torch_threads=1))
    return Graph(run_locally(bound, "library"))


@pytest.fixture
def connect_library(graph: Graph, built: Catalog, monkeypatch: pytest.MonkeyPatch) -> ClientFactory:
    monkeypatch.setattr(watching, "RESCAN_S", 0.0)
    return partial(open_client, graph=graph, catalog=built)


@pytest.fixture
def lora(tiny_models: Path, folder: Path) -> Iterator[Path]:
    """A LoRA that came after the graph was built; its weights are Add_Detail's."""
    file = put(tiny_models / "lora-detail-sd15" / LORA, folder / "loras" / "Mine.safetensors")
    yield file
    file.unlink(missing_ok=True)


async def drawn(client: httpx.AsyncClient, **fields: Any) -> np.ndarray:
    return pixels(picture(await post(client, **FIELDS | fields)))


async def test_a_library_checkpoint_draws_what_the_catalogs_model_of_the_same_weights_draws(
    connect_library: ClientFactory,
) -> None:
    async with connect_library() as client:
        mine, catalogs = await drawn(client, model_name="my sd"), await drawn(client, model_name="SD1.5")
    assert np.array_equal(mine, catalogs), "the same weights"


async def test_a_controlnet_is_a_control_of_the_models_that_take_one(connect_library: ClientFactory) -> None:
    fields = {"model_name": "SD1.5-ControlNet", "controlnet_image": encoded(photo()), "controlnet_preprocess": False}
    async with connect_library() as client:
        mine, catalogs = [await drawn(client, **fields, controlnet_name=name) for name in ("my edges", "canny")]
        names = {entry["name"] for entry in (await client.get("/v1/controlnets")).json()["data"]}
    assert "My Edges" in names
    assert np.array_equal(mine, catalogs), "the same weights"


async def test_a_lora_that_is_added_replaced_and_removed_is_used_in_its_present_state(
    connect_library: ClientFactory, tiny_models: Path, folder: Path
) -> None:
    async with connect_library() as client:
        message = check(await post(client, loras={"Mine": 0.8}), 400, 40302, "loras")
        assert "Unexpected loras 'Mine'" in message
        file = put(tiny_models / "lora-detail-sd15" / LORA, folder / "loras" / "Mine.safetensors")
        try:
            for name in FOLDERS:
                put(tiny_models / f"lora-{FOLDERS[name]}-sd15" / LORA, file)
                expected = await drawn(client, loras={name: 0.8})
                for model in ("SD1.5", "My SD"):
                    assert np.array_equal(await drawn(client, model_name=model, loras={"mine": 0.8}), expected)
        finally:
            file.unlink()
        message = check(await post(client, loras={"Mine": 0.8}), 400, 40302, "loras")
        assert "loras 'Mine' is not available: loras/Mine.safetensors: it was removed" in message
        assert (await post(client)).status_code == 200, "others never notice"


async def test_listings_tell_what_is_served_and_why_the_rest_is_not(
    connect_library: ClientFactory, lora: Path, folder: Path
) -> None:
    write(folder / "loras" / "empty.safetensors", b"")
    async with connect_library() as client:
        models = (await client.get("/v1/models")).json()
        loras = {entry["name"]: entry for entry in (await client.get("/v1/loras")).json()["data"]}
    assert [entry["id"] for entry in models["data"]] == ["SD1.5", "SD1.5-ControlNet", "My SD"]
    assert models["data"][2]["loras"] == ["Add_Detail", "Pixel_Art", "Mine"]
    told = {entry["id"]: entry["reason"] for entry in models["unavailable"]}
    assert "checkpoints/cut.safetensors: it is truncated or damaged" in told["cut"]
    assert told["SD2"] == "not served by this graph"
    assert loras["Mine"]["models"] == ["SD1.5", "SD1.5-ControlNet", "My SD"]
    assert loras["empty"] | {"kind": None} == {
        "name": "empty",
        "kind": None,
        "available": False,
        "reason": "loras/empty.safetensors: it is empty",
    }


async def test_what_is_not_served_is_refused_with_its_file_and_reason(
    connect_library: ClientFactory, folder: Path
) -> None:
    write(folder / "loras" / "broken.safetensors", b"\0" * 100)
    async with connect_library() as client:
        message = check(await post(client, loras={"BROKEN": 1}), 400, 40302, "loras")
        assert "loras/broken.safetensors: it is truncated or damaged: it begins with zeros" in message
        message = check(await post(client, model_name="Cut"), 400, 40301, "model_name")
        assert "checkpoints/cut.safetensors: it is truncated or damaged" in message


async def test_an_embedding_that_comes_later_is_read_in_prompts(connect_library: ClientFactory, folder: Path) -> None:
    async with connect_library() as client:
        plain = await drawn(client, prompt="a cat in <late-style>")
        file = folder / "embeddings" / "late-style.safetensors"
        file.parent.mkdir()
        save_file({"emb_params": torch.full((2, 32), 0.3)}, file)
        settled(file)
        changed = await drawn(client, prompt="a cat in <late-style>")
        listed = {e["name"]: e for e in (await client.get("/v1/embeddings")).json()["data"]}
        assert listed["late-style"]["available"]
        assert np.abs(plain - changed).max() > 1, "it must show"
        file.unlink()
        assert np.array_equal(plain, await drawn(client, prompt="a cat in <late-style>")), "it is text again"


async def test_a_refresh_waits_until_a_file_is_completely_copied(connect_library: ClientFactory, lora: Path) -> None:
    lora.touch()
    async with connect_library() as client:
        listed = {e["name"]: e for e in (await client.post("/v1/loras/refresh")).json()["data"]}
    assert listed["Mine"]["available"]


async def test_a_refresh_requires_a_key(connect_library: ClientFactory, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"tests {hashlib.sha256(b'secret').hexdigest()}\n")
    async with connect_library(keys_file=keys) as client:
        check(await client.post("/v1/loras/refresh"), 401, 40101, None)
        reply = await client.post("/v1/loras/refresh", headers={"authorization": "Bearer secret"})
        assert reply.status_code == 200


async def test_a_file_replaced_under_a_plan_is_a_503_that_names_it(
    connect_library: ClientFactory, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the ingress's look and the replica's."""

    async def holds(*_: object) -> bool:
        lora.touch()
        return True

    async with connect_library() as client:
        os.utime(lora, (7, 7))  # no version that an earlier request left loaded
        monkeypatch.setattr(watching.LibraryWatch, "holds", holds)
        reply = await post(client, loras={"Mine": 0.31})
        assert "lora Mine, file loras/Mine.safetensors" in check(reply, 503, 42903, None)
        assert int(reply.headers["retry-after"]) > 0


async def test_without_a_library_a_refresh_lists_the_catalogs(graph: Graph, catalog: Catalog) -> None:
    async with open_client(graph=graph, catalog=catalog) as client:
        reply = await client.post("/v1/loras/refresh")
        assert reply.json() == (await client.get("/v1/loras")).json()
