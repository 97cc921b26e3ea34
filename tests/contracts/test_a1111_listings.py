"""What A1111's clients list before they draw, and that what is listed can be sent back."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from config.catalog import Catalog
from pipelines.sampling.samplers import SAMPLERS
from tests.support.ingress import ClientFactory

SMALL = {"prompt": "a cat", "width": 128, "height": 128, "steps": 3}


async def get(client: httpx.AsyncClient, name: str) -> Any:
    reply = await client.get(f"/sdapi/v1/{name}")
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_checkpoints_are_the_models_by_their_own_names(client: httpx.AsyncClient, catalog: Catalog) -> None:
    listed = await get(client, "sd-models")
    assert [entry["model_name"] for entry in listed] == [model.name for model in catalog.available_models()]
    assert all(set(e) == {"title", "model_name", "hash", "sha256", "filename", "config"} for e in listed)
    assert all(e["title"] == f"{e['model_name']} [{e['hash']}]" and "/" not in e["filename"] for e in listed)
    assert len({entry["hash"] for entry in listed}) == len({m.unet for m in catalog.available_models()})
    for entry in listed:
        for spelling in (entry["title"], entry["model_name"].lower(), entry["hash"], f"{entry['model_name']}.ckpt"):
            reply = await client.post("/sdapi/v1/options", json={"sd_model_checkpoint": spelling})
            assert reply.status_code == 200, reply.text
            chosen = (await get(client, "options"))["sd_checkpoint_hash"]
            assert chosen == entry["hash"]


async def test_every_listed_sampler_and_schedule_can_be_sent(client: httpx.AsyncClient) -> None:
    names = [entry["name"] for entry in await get(client, "samplers")]
    assert {"DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "Euler a", "Euler", "DDIM", "PLMS", "UniPC", "LCM"} <= set(names)
    assert not [name for name in names if name.endswith("Karras")]
    schedules = await get(client, "schedulers")
    assert [(entry["name"], entry["label"]) for entry in schedules] == [
        *(("automatic", "Automatic"), ("uniform", "Uniform"), ("karras", "Karras")),
    ]
    karras = [name.removesuffix(" Karras") for name in SAMPLERS if name.endswith(" Karras")]
    width = {"width": 130}  # refused after the sampler was read
    for name in names:
        for schedule in schedules:
            body = SMALL | width | {"sampler_name": name, "scheduler": schedule["name"]}
            param = (await client.post("/sdapi/v1/txt2img", json=body)).json()["param"]
            ours = {"DPM++ SDE": "DPM SDE"}.get(name, name)
            assert param == ("scheduler" if schedule["name"] == "karras" and ours not in karras else "width"), body


async def test_what_prompts_may_name(client: httpx.AsyncClient, catalog: Catalog) -> None:
    served = {lora.name for lora in catalog.loras if lora.unavailable is None}
    loras = await get(client, "loras")
    assert {entry["name"] for entry in loras} == served
    assert all(set(entry) == {"name", "alias", "path", "metadata"} and "/" not in entry["path"] for entry in loras)
    embeddings = await get(client, "embeddings")
    assert set(embeddings["loaded"]) == {e.name for e in catalog.embeddings if e.unavailable is None}
    styles = await get(client, "prompt-styles")
    assert [style["name"] for style in styles] == [style.name for style in catalog.styles]
    assert set(styles[0]) == {"name", "prompt", "negative_prompt"}


async def test_vaes_and_upscalers(client: httpx.AsyncClient) -> None:
    vaes = [entry["model_name"] for entry in await get(client, "sd-vae")]
    assert {"vae-sd15", "vae-sdxl"} <= set(vaes)
    reply = await client.post("/sdapi/v1/options", json={"sd_vae": "vae-sd15"})
    assert reply.status_code == 200, "the default model's own"
    assert (await client.post("/sdapi/v1/options", json={"sd_vae": "vae-sdxl"})).status_code == 400
    assert [entry["name"] for entry in await get(client, "upscalers")][:3] == ["None", "Lanczos", "Nearest"]
    assert {"name": "Latent (nearest-exact)"} in await get(client, "latent-upscale-modes")


@pytest.mark.parametrize("name", ["hypernetworks", "face-restorers", "realesrgan-models"])
async def test_lists_of_what_is_not_supported_are_empty(client: httpx.AsyncClient, name: str) -> None:
    assert await get(client, name) == []


async def test_routes_that_clients_call_on_start_answer(client: httpx.AsyncClient) -> None:
    assert "controlnet m2m" in (await get(client, "scripts"))["txt2img"], "by this webuiapi knows of ControlNets"
    assert [entry["name"] for entry in await get(client, "script-info")] == ["controlnet"] * 2
    assert (await get(client, "cmd-flags"))["api"] is True
    assert set(await get(client, "memory")) == {"ram", "cuda"}
    for name in ("checkpoints", "loras", "vae", "embeddings"):
        reply = await client.post(f"/sdapi/v1/refresh-{name}")
        assert (reply.status_code, reply.json()) == (200, None)
    assert (await client.get("/controlnet/version")).json() == {"version": 3}
    modules = (await client.get("/controlnet/module_list")).json()
    assert modules["module_list"][:2] == ["none", "canny"]
    assert set(modules["module_detail"]) == set(modules["module_list"])
    assert "canny" in (await client.get("/controlnet/model_list")).json()["model_list"]


async def test_pages_of_other_sites_and_clients_that_ask_by_options(connect: ClientFactory) -> None:
    async with connect(cors_origins=("https://lite.koboldai.net",)) as client:
        for path in ("sd-models", "txt2img"):
            reply = await client.options(f"/sdapi/v1/{path}")
            assert reply.status_code == 204
        reply = await client.get("/sdapi/v1/sd-models", headers={"origin": "https://lite.koboldai.net"})
        assert reply.headers["access-control-allow-origin"] == "https://lite.koboldai.net"
