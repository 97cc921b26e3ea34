"""What the server says it offers is what it accepts."""

from __future__ import annotations

import httpx
import pytest

from config.catalog import Catalog
from pipelines.acceleration import Acceleration
from pipelines.sampling.samplers import SAMPLERS
from tests.support.ingress import ClientFactory

SAMPLER_NAMES = """DDIM, DDPM, DEIS 2M, DPM 2M, DPM 2S, DPM SDE, DPM SDE Karras, DPM++ 2M, DPM++ 2M Karras,
DPM++ 2M SDE, DPM++ 2M SDE Heun, DPM++ 2M SDE Heun Karras, DPM++ 2M SDE Karras, DPM++ 2S, DPM2, DPM2 Karras, DPM2 a,
DPM2 a Karras, EDM_Euler, Euler, Euler a, Heun, LCM, LMS, LMS Karras, PNDM, UniPC 2M"""

STYLE_NAMES = """monad, base, 3D Model, Analog Film, Anime, Cinematic, Comic Book, Craft Clay, Digital Art, Enhance,
Fantasy Art, Isometric Style, Line Art, Lowpoly, Neon Punk, Origami, Photographic, Pixel Art, Texture, Advertising, Food
Photography, Real Estate, Abstract, Cubist, Graffiti, Hyperrealism, Impressionist, Pointillism, Pop Art, Psychedelic,
Renaissance, Steampunk, Surrealist, Typography, Watercolor, Fighting Game, GTA, Super Mario, Minecraft, Pokemon, Retro
Arcade, Retro Game, RPG Fantasy Game, Strategy Game, Street Fighter, Legend of Zelda, Architectural, Disco, Dreamscape,
Dystopian, Fairy Tale, Gothic, Grunge, Horror, Minimalist, Monochrome, Nautical, Space, Stained Glass, Techwear Fashion,
Tribal, Zentangle, Collage, Flat Papercut, Kirigami, Paper Mache, Paper Quilling, Papercut Collage, Papercut Shadow Box,
Stacked Papercut, Thick Layered Papercut, Alien, Film Noir, HDR, Long Exposure, Neon Noir, Silhouette, Tilt-Shift"""


MODELS = ["SDXL1.0-base", "SD2", "SD1.5", "SSD", "SDXL-turbo", "SDXL-ControlNet", "SD1.5-ControlNet"]
CONTROLS = ["canny", "depth", "openpose", "softedge", "lineart"]


def names(text: str) -> list[str]:
    return " ".join(text.split()).split(", ")


async def names_at(client: httpx.AsyncClient, path: str, key: str = "name") -> list[str]:
    body = (await client.get(path)).json()
    assert body["object"] == "list"
    return [entry[key] for entry in body["data"]]


async def test_the_contracts_samplers(client: httpx.AsyncClient) -> None:
    assert await names_at(client, "/v1/samplers") == list(SAMPLERS)
    assert set(names(SAMPLER_NAMES)) <= set(SAMPLERS), "more may be offered, none may be missing"


async def test_the_contracts_styles(client: httpx.AsyncClient, catalog: Catalog) -> None:
    assert await names_at(client, "/v1/styles") == names(STYLE_NAMES)
    assert catalog.style_choices().resolve("Pokémon") == "Pokemon"
    for alias, name in {"3d-model": "3D Model", "modeling-compound": "Craft Clay", "tile-texture": "Texture"}.items():
        assert catalog.style_choices().resolve(alias) == name


async def test_models_that_can_be_asked_for(client: httpx.AsyncClient) -> None:
    assert await names_at(client, "/v1/models", "id") == MODELS
    base = (await client.get("/v1/models")).json()["data"][0]
    assert base["object"] == "model"
    assert base["family"] == "sdxl"
    assert base["defaults"]["width"] == 1024
    assert "1152x896" in base["sizes"]
    assert "1344x768" in base["tvm_sizes"]
    assert base["controlnets"] == CONTROLS[:4]
    assert base["loras"] == ["Add_Detail", "Pixel_Art"]


async def test_embeddings_are_listed(catalog: Catalog, connect: ClientFactory) -> None:
    data = catalog.model_dump()
    weights = {"bases": ["unet-sd15"], "source": {"folder": "models"}, "file": "x.safetensors"}
    data["embeddings"] = [{"name": "x", "weights": [weights]}, {"name": "y", "unavailable": "nowhere"}]
    async with connect(catalog=Catalog.model_validate(data)) as client:
        body = (await client.get("/v1/embeddings")).json()
        models = {model["id"]: model["embeddings"] for model in (await client.get("/v1/models")).json()["data"]}
    assert body["data"] == [
        {"name": "x", "available": True, "reason": None},
        {"name": "y", "available": False, "reason": "nowhere"},
    ]
    assert (models["SD1.5"], models["SDXL1.0-base"]) == (["x"], [])


async def test_loras_say_why_they_are_not_served(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/loras")).json()
    assert [entry["name"] for entry in body["data"] if entry["available"]] == ["Add_Detail", "Pixel_Art"]
    assert all(entry["available"] or entry["reason"] for entry in body["data"])


async def test_controlnets(client: httpx.AsyncClient) -> None:
    data = (await client.get("/v1/controlnets")).json()["data"]
    assert [entry["name"] for entry in data if entry["models"] == ["SD1.5", "SD1.5-ControlNet"]] == CONTROLS
    assert [entry["name"] for entry in data if entry["models"] == ["SDXL-ControlNet", "SDXL1.0-base"]] == CONTROLS[:4]
    assert {entry["preprocess"] for entry in data} == {True}, "the tiny catalog has all annotators"


@pytest.mark.parametrize(
    ("states", "status", "said"),
    [
        ({"vae": "HEALTHY", "unet": "UPSCALING"}, 200, "ready"),
        ({"vae": "HEALTHY", "unet": "UPDATING: A replica failed to start"}, 503, "waiting"),
    ],
)
async def test_readiness_tells_the_state_of_each_deployment(
    connect: ClientFactory, states: dict[str, str], status: int, said: str
) -> None:
    async def readiness() -> tuple[bool, dict[str, str]]:
        return status == 200, states

    async with connect(readiness=readiness) as client:
        reply = await client.get("/readyz")
        assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert reply.status_code == status
    assert reply.json() == {"status": said, "deployments": states}


async def test_the_documentation_shows_the_request(client: httpx.AsyncClient) -> None:
    assert "swagger" in (await client.get("/docs")).text
    paths = (await client.get("/openapi.json")).json()["paths"]
    schema = paths["/v1/image/generation"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["$ref"].endswith("GenerationRequest")


async def test_models_say_what_a_gpu_does_for_them(connect: ClientFactory) -> None:
    async with connect(acceleration=Acceleration(compiled_blocks=True)) as client:
        models = (await client.get("/v1/models")).json()["data"]
    expected = {"graphs": True, "channels_last": False, "compiled_blocks": True}
    assert [model["on_a_gpu"] for model in models] == [expected] * len(models)
