"""A library beside the running graph: a checkpoint deployed with it, LoRAs that come and go while it serves."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from tests.support.http import PATH, check, photo, picture, pixels
from tests.support.library import LORA, put
from tests.support.live import draw, request, wait_for
from tests.support.upscalers import FILE, by_spandrel


def available(listing: httpx.Response) -> set[str]:
    return {entry["name"] for entry in listing.json()["data"] if entry["available"]}


def test_a_checkpoint_of_the_folder_is_a_model_with_a_deployment_of_its_own(client: httpx.Client) -> None:
    fields = request("SD1.5", sampler="Euler")
    mine, _ = draw(client, **fields | {"model_name": "My SD"})
    catalogs, _ = draw(client, **fields)
    assert np.abs(mine - catalogs).max() <= 1, "the same weights"
    assert "unet-my-sd-torch" in client.get("/readyz").json()["deployments"]


def test_an_upscaler_of_the_folder_enlarges_pictures_and_second_passes(client: httpx.Client, tiny_models: Path) -> None:
    sent = photo(60, 40)
    reply = client.post("/v1/images/upscale", files={"image": ("a.png", sent, "image/png")}, data={"scale": "2"})
    larger = by_spandrel(tiny_models / "upscaler-x2" / FILE, Image.open(io.BytesIO(sent)).convert("RGB"))
    assert np.abs(pixels(picture(reply)) - pixels(larger)).max() <= 1
    assert "upscaler-my-x2" in client.get("/readyz").json()["deployments"]
    drawn, _ = draw(client, **request("SD1.5"), hires={"upscaler": "my X2", "steps": 2, "strength": 0.5})
    assert drawn.shape == (2 * request("SD1.5")["height"], 2 * request("SD1.5")["width"], 3)


def test_a_copied_lora_is_usable_after_a_refresh_and_by_itself(
    client: httpx.Client, library: Path, tiny_models: Path
) -> None:
    """In the ingress, in the UNet's replica and in the text encoder's; then another file takes its place; then none."""
    fields = request("SD1.5", sampler="Euler")
    expected = {name: draw(client, **fields, loras={name: 0.8})[0] for name in ("Add_Detail", "Pixel_Art")}
    file = library / "loras" / "Mine.safetensors"
    put(tiny_models / "lora-detail-sd15" / LORA, file)
    assert "Mine" in available(client.post("/v1/loras/refresh"))
    for model in ("SD1.5", "My SD"):
        drawn, _ = draw(client, **fields | {"model_name": model}, loras={"Mine": 0.8})
        assert np.abs(drawn - expected["Add_Detail"]).max() <= 1
    put(tiny_models / "lora-pixel-sd15" / LORA, file)
    drawn, _ = draw(client, **fields, loras={"Mine": 0.8})
    assert np.abs(drawn - expected["Pixel_Art"]).max() <= 1, "nobody asked for a refresh"
    file.unlink()
    wait_for(lambda: "Mine" not in available(client.get("/v1/loras")))
    reply = client.post(PATH, json=fields | {"loras": {"Mine": 0.8}})
    assert "loras/Mine.safetensors: it was removed" in check(reply, 400, 40302, "loras")


def test_a_copied_lora_is_found_without_a_refresh(client: httpx.Client, library: Path, tiny_models: Path) -> None:
    file = put(tiny_models / "lora-detail-sd15" / LORA, library / "Other.safetensors")
    file.touch()  # as if it had been written now
    body = request("SD1.5") | {"loras": {"other": 1}}
    wait_for(lambda: client.post(PATH, json=body).status_code == 200)
