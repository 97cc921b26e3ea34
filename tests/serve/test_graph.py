"""The real graph over HTTP: every plain model, eight at once, each component in its own deployment."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from config.catalog import Catalog
from pipelines.control_plan import ControlParams
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.support.http import encoded, photo
from tests.support.live import MODELS, draw, replicas, request


@pytest.fixture(scope="module")
def text2image(catalog: Catalog) -> Text2Image:
    return Text2Image(catalog)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_eight_at_once_equal_each_alone_in_one_process(
    client: httpx.Client, text2image: Text2Image, model: str
) -> None:
    samplers = ["DPM++ 2M SDE Heun Karras", "Euler a", "Heun", "DDIM"]
    requests = [
        request(model, seed=i, sampler=samplers[i % 4], steps=3 + i, cfg_scale=float(i), prompt=f"a lighthouse {i}")
        for i in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda fields: draw(client, **fields), requests))
    for fields, (pixels, reply) in zip(requests, answers, strict=True):
        expected = np.asarray(text2image.generate(GenerationParams(**fields)).image)
        assert np.abs(pixels - expected).max() <= 1
        assert reply.json()["images"][0]["random_seed"] == fields["seed"]
        assert reply.headers["x-backend"] == "torch"


def test_each_component_is_its_own_deployment(client: httpx.Client) -> None:
    states = client.get("/readyz").json()
    assert states["status"] == "ready"
    assert set(states["deployments"]) == {
        "ingress",
        "text-encoder-sd15",
        "text-encoder-sd2",
        "text-encoder-sdxl",
        "unet-my-sd-torch",
        "unet-sd15-torch",
        "unet-sd15-tvm",
        "unet-sd2-torch",
        "unet-sdxl-base-torch",
        "unet-ssd-torch",
        "unet-sdxl-turbo-torch",
        "refiner-sdxl",
        "controlnet-sd15",
        "controlnet-sdxl",
        "vae-sd15",
        "vae-sd2",
        "vae-sdxl",
        "upscaler-my-x2",
    }


def test_a_compiled_unet_draws_what_torch_draws(client: httpx.Client) -> None:
    """In a replica of its own, with the thread environment TVM needs; `auto` decides by what it measured there."""
    fields = request("SD1.5", width=512, height=512)
    (torch_pixels, _), (tvm_pixels, reply) = (draw(client, **fields, backend=name) for name in ("torch", "tvm"))
    assert reply.headers["x-backend"] == "tvm"
    assert np.abs(torch_pixels - tvm_pixels).max() <= 2
    models = {m["id"]: m for m in client.get("/v1/models").json()["data"]}
    (entry,) = models["SD1.5"]["tvm_compiled"]
    assert entry["size"] == "512x512"
    _, reply = draw(client, **fields)
    assert reply.headers["x-backend"] == ("tvm" if entry["speedup"] >= 1.1 else "torch")
    _, reply = draw(client, **request("SD1.5"))
    assert reply.headers["x-backend"] == "torch", "no program for this size"


def test_the_refiner_and_a_starting_picture_pass_through_the_graph(
    client: httpx.Client, text2image: Text2Image
) -> None:
    given = photo(300, 200)
    fields = request(
        "SDXL1.0-base", enable_refiner=True, strength=0.7, steps=10, sampler="Euler a", negative_prompt="fog"
    )
    pixels, reply = draw(client, **fields, image=encoded(given))
    expected = text2image.generate(GenerationParams(**fields, image=given)).image
    assert np.abs(pixels - np.asarray(expected)).max() <= 1
    stages = {entry.split(";")[0] for entry in reply.headers["server-timing"].split(", ")}
    assert stages == {"text_encoder", "vae_encode", "denoise_unet-sdxl-base", "denoise_refiner-sdxl", "vae_decode"}


TWO_CONTROLS: list[dict[str, Any]] = [
    {"name": "canny", "weight": 0.6, "end": 0.5},
    {"name": "depth", "start": 0.25, "preprocess": False, "guess": True},
]


@pytest.mark.parametrize("model", ["SD1.5", "SDXL1.0-base"])
def test_controlled_and_plain_requests_share_the_unet(client: httpx.Client, text2image: Text2Image, model: str) -> None:
    """Residuals come from another process and meet the UNet on its way up, only in the rows that asked for them."""
    given = photo(300, 200)
    controlled = {"SD1.5": "SD1.5-ControlNet", "SDXL1.0-base": "SDXL-ControlNet"}[model]
    requests = [request(model, seed=i, steps=8, sampler="Euler") for i in range(2)]
    for seed, name in enumerate(["canny", "softedge", "depth"]):
        steered = {"model_name": controlled, "controlnet_name": name, "controlnet_preprocess": name == "canny"}
        requests.append(request(model, seed=seed, steps=6, sampler="Euler a") | steered)
    with ThreadPoolExecutor(len(requests)) as pool:
        wire = {"controlnet_image": encoded(given)}
        sent = [r | wire if "controlnet_name" in r else r for r in requests]
        sent.append(requests[0] | {"controlnets": [control | {"image": encoded(given)} for control in TWO_CONTROLS]})
        answers = list(pool.map(lambda fields: draw(client, **fields), sent))
    for fields, (pixels, reply) in zip([*requests, requests[0]], answers, strict=True):
        extra: dict[str, Any] = {"controlnet_image": given} if "controlnet_name" in fields else {}
        if reply is answers[-1][1]:
            extra = {"controlnets": tuple(ControlParams(**control, image=given) for control in TWO_CONTROLS)}
        expected = text2image.generate(GenerationParams(**fields, **extra)).image
        assert np.abs(pixels - np.asarray(expected)).max() <= 1
        assert ("controlnet_prepare" in reply.headers["server-timing"]) == bool(extra)


@pytest.mark.parametrize("model", ["SD1.5", "SDXL1.0-base"])
def test_each_request_brings_its_own_loras(client: httpx.Client, text2image: Text2Image, model: str) -> None:
    """On UNet and text encoders, in the same ticks as requests with others or none."""
    mixtures = [{}, {"Pixel_Art": 0.8}, {"Add_Detail": 0.6}, {"Pixel_Art": 0.5, "Add_Detail": -0.4}]
    requests = [request(model, seed=9, sampler="Euler", loras=mixture) for mixture in mixtures]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda fields: draw(client, **fields)[0], requests))
    for fields, pixels in zip(requests, answers, strict=True):
        expected = np.asarray(text2image.generate(GenerationParams(**fields)).image)
        assert np.abs(pixels - expected).max() <= 1
    assert all(np.abs(answers[0] - other).max() > 1 for other in answers[1:]), "the LoRAs must show"


def test_the_request_id_comes_back_and_reaches_every_replica(client: httpx.Client) -> None:
    fields = request("SD1.5", steps=1)
    reply = client.post("/v1/image/generation", json=fields, headers={"x-request-id": "my-id-7"})
    assert reply.headers.get_list("x-request-id") == ["my-id-7"]


# Minutes of work of another shape: while it is in the engine, the oldest, no request of a second shape gets a tick. Not
# so many that the deadline of ten minutes would be out of reach.
LONG = request("SD1.5", steps=150, sampler="Heun", width=1024, height=1024)


def assert_the_unet_is_free(url: str) -> None:
    """A short request is answered; it would wait for minutes behind LONG, far beyond this timeout."""
    with httpx.Client(base_url=url, timeout=60) as client:
        draw(client, **request("SD1.5", steps=2))


def test_a_client_that_disconnects_frees_the_unet(url: str) -> None:
    with httpx.Client(base_url=url) as leaving, pytest.raises(httpx.ReadTimeout):
        leaving.post("/v1/image/generation", json=LONG, timeout=3.0)
    assert_the_unet_is_free(url)


def test_a_watched_request_streams_through_the_proxy(client: httpx.Client) -> None:
    body = request("SDXL1.0-base", steps=8, enable_refiner=True) | {"stream": True, "preview": True}
    with client.stream("POST", "/v1/image/generation", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        names = [line.removeprefix("event: ") for line in reply.iter_lines() if line.startswith("event: ")]
    assert names[0] == "progress"
    assert names[-1] == "result"
    assert names.count("progress") >= 9
    assert "preview" in names
    (ingress,) = replicas("ingress")
    assert not any("libtorch" in mapped.path for mapped in ingress.memory_maps()), "the ingress never loads torch"


def test_closing_a_stream_frees_its_rows_within_a_tick(client: httpx.Client, url: str, graph_log: Path) -> None:
    """The replica says at which step the job left; news of a step and of the closing each take less than a tick."""
    with client.stream("POST", "/v1/image/generation", json=LONG | {"stream": True}) as reply:
        news = (json.loads(line.removeprefix("data: ")) for line in reply.iter_lines() if '"denoising"' in line)
        seen = next(event["step"] for event in news if event["step"] >= 2)
    assert_the_unet_is_free(url)
    left = re.findall(r"job cancelled at step (\d+)/150", graph_log.read_text())
    assert left, "the replica did not notice"
    assert seen <= int(left[-1]) <= seen + 2


def test_documentation(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/docs").status_code == 200
    assert "/v1/image/generation" in client.get("/openapi.json").json()["paths"]
