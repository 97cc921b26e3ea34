"""`POST /v1/images/upscale` and upscalers in a second pass: every form, what files say, keys, faults, bad input."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from ray.exceptions import ActorDiedError

from config.catalog import Catalog
from deployments.access.limits import KeyLimits
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.ingress import wake
from deployments.replicas.base import Runtime
from tests.support.bound import run_locally
from tests.support.graph import FakeGraph, never, raising
from tests.support.http import check, decoded, encoded, events, photo, picture, pixels, post
from tests.support.ingress import ClientFactory, open_client
from tests.support.library import extended, put
from tests.support.upscalers import FILE, X2, X4, by_spandrel

UPSCALE = "/v1/images/upscale"
MACHINE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
ENHANCED = "http://cv.iptc.org/newscodes/digitalsourcetype/algorithmicallyEnhanced"


@pytest.fixture(scope="module")
def with_models(catalog: Catalog, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """The tiny catalog with a library of two upscalers and one that reads grey pictures."""
    folder = tmp_path_factory.mktemp("library")
    for name in (X4, X2):
        put(tiny_models / f"upscaler-{name[-2:]}" / FILE, folder / "upscalers" / f"{name}.safetensors")
    return extended(catalog, [folder], folder / "digests.json").only(("SD1.5",))


@pytest.fixture(scope="module")
def model_graph(with_models: Catalog) -> Iterator[Graph]:
    bound = bind_components(AppArgs(grouping="role"), with_models, Runtime("cpu", torch_threads=1))
    return Graph(run_locally(bound, "upscale"))


@pytest.fixture
def connect_models(model_graph: Graph, with_models: Catalog) -> ClientFactory:
    return partial(open_client, graph=model_graph, catalog=with_models)


def bytes_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


SENT = bytes_of(Image.open(io.BytesIO(photo())).convert("RGB").resize((40, 30)))


async def upscaled(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(UPSCALE, json={"image": encoded(SENT)} | fields)


async def test_a_model_enlarges_json_forms_and_bytes_alike(connect_models: ClientFactory, tiny_models: Path) -> None:
    expected = by_spandrel(tiny_models / "upscaler-x4" / FILE, Image.open(io.BytesIO(SENT)))
    fields: dict[str, Any] = {"upscaler": "tiny X4", "scale": 4}
    async with connect_models() as client:
        reply = await upscaled(client, **fields)
        body = reply.json()
        form = await client.post(UPSCALE, files={"image": ("a.png", SENT, "image/png")}, data=fields)
        raw = await client.post(UPSCALE, json={"image": encoded(SENT)} | fields, headers={"accept": "image/webp"})
    assert (body["width"], body["height"], body["upscaler"]) == (160, 120, X4)
    assert set(body) == {"images", "inference_time", "width", "height", "upscaler"}
    assert "upscale;" in reply.headers["server-timing"].replace("-", ";")
    for drawn in (picture(reply), picture(form)):
        assert drawn.format == "PNG"
        assert np.abs(pixels(drawn) - pixels(expected)).max() <= 1
    assert raw.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(raw.content)).size == (160, 120)


async def test_defaults_are_the_first_model_and_twice(connect_models: ClientFactory) -> None:
    async with connect_models() as client:
        body = (await upscaled(client, upscaler=None, scale=None, output_format="")).json()
        listed = (await client.get("/v1/upscalers")).json()["data"]
    by_name = {entry["name"]: entry for entry in listed}
    assert (body["width"], body["upscaler"]) == (80, X2)
    assert by_name[X2] == {"name": X2, "aliases": [], "kind": "model", "upscale": True, "hires": True, "default": True}
    assert by_name["lanczos"]["kind"] == "resize"
    assert not by_name["latent"]["upscale"]
    assert [entry["name"] for entry in listed if entry["default"]] == [X2]


@pytest.mark.parametrize("name", ["lanczos", "nearest"])
async def test_pillow_serves_without_any_weights(client: httpx.AsyncClient, name: str) -> None:
    fields = {"scale": 1.5} | ({} if name == "lanczos" else {"upscaler": "Nearest"})
    reply = await upscaled(client, **fields)
    method = Image.Resampling.LANCZOS if name == "lanczos" else Image.Resampling.NEAREST
    expected = Image.open(io.BytesIO(SENT)).convert("RGB").resize((60, 45), method)
    assert np.array_equal(pixels(picture(reply)), pixels(expected))
    assert reply.json()["upscaler"] == name


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_what_files_say(connect_models: ClientFactory, output_format: str) -> None:
    async def told(client: httpx.AsyncClient, image: str, upscaler: str) -> dict[str, Any]:
        reply = await client.post(UPSCALE, json={"image": image, "upscaler": upscaler, "output_format": output_format})
        return (await client.post("/v1/images/info", json={"image": reply.json()["images"][0]["image"]})).json()

    async with connect_models() as client:
        of_photo = await told(client, encoded(SENT), X2)
        resized = await told(client, encoded(SENT), "lanczos")
        drawn = await post(client, sampler="Euler a", output_format=output_format)
        ours = drawn.json()["images"][0]["image"]
        of_ours, again = await told(client, ours, X2), await told(client, ours, "lanczos")
        repeated = await client.post("/v1/image/generation", json=of_ours["request"] | {"output_format": output_format})
    assert (of_photo["digital_source_type"], resized["digital_source_type"]) == (COMPOSITE, ENHANCED)
    assert of_ours["digital_source_type"] == again["digital_source_type"] == MACHINE
    assert of_photo["plan"]["source"]["sha256"] == hashlib.sha256(SENT).hexdigest()
    assert (of_photo["plan"]["upscaler"], of_photo["width"], of_photo["request"]) == (X2, 80, None)
    assert of_ours["parameters"]["Postprocess upscale by"] == "2"
    assert of_ours["parameters"]["Postprocess upscaler"] == X2
    assert again["parameters"]["Postprocess upscaler"] == "Lanczos"
    assert of_ours["parameters"]["Sampler"] == "Euler a", "how it was drawn is still told"
    assert np.abs(pixels(picture(repeated)) - pixels(picture(drawn))).mean() < 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_model_enlarges_for_a_second_pass(connect_models: ClientFactory, streamed: bool) -> None:
    hires = {"upscaler": "TINY x2", "scale": 1.5, "steps": 2, "strength": 0.5}
    async with connect_models() as client:
        reply = await post(client, hires=hires, stream=streamed, output_format="png")
    if streamed:
        drawn = decoded(events(reply.text)[-1][1]["images"][0]["image"])
    else:
        drawn = picture(reply)
        assert reply.headers["server-timing"].count("upscale") == 1
    assert drawn.size == (192, 192)


async def test_a_second_pass_wakes_its_model_and_says_which_it_was(model_graph: Graph, with_models: Catalog) -> None:
    hires = {"upscaler": X2, "scale": 2.0, "steps": 2, "strength": 0.5}
    graph = FakeGraph(model_graph)
    async with open_client(graph=graph, catalog=with_models) as client:
        image = (await post(client, hires=hires)).json()["images"][0]["image"]
        told = (await client.post("/v1/images/info", json={"image": image})).json()
    assert "upscaler" in {call["deployment"] for call in graph.named("ping")}
    assert told["request"]["hires"] == hires
    assert told["parameters"]["Hires upscaler"] == X2
    assert told["plan"]["stages"][1]["enlargement"]["component"] == "upscaler-tiny-x2"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"upscaler": "8x-Magic"}, "upscaler", "Only ['lanczos', 'nearest', 'Tiny x2', 'Tiny x4'] allowed now"),
        ({"upscaler": "latent"}, "upscaler", "Unexpected upscaler 'latent'"),
        ({"scale": 0.5}, "scale", "greater than or equal to 1"),
        ({"scale": 9}, "scale", "less than or equal to 8"),
        ({"scale": 8, "image": encoded(photo(600, 500))}, "scale", "makes 4800x4000 of 600x500, and a picture has at"),
        ({"image": encoded(b"no picture at all")}, "image", "image is not"),
        ({"image": None}, "image", "image is missing"),
        ({"output_format": "gif"}, "output_format", "Only ['jpeg', 'png', 'webp'] allowed now"),
    ],
)
async def test_what_is_refused(connect_models: ClientFactory, fields: dict[str, Any], param: str, message: str) -> None:
    async with connect_models() as client:
        assert message in check(await upscaled(client, **fields), 400, 40302, param)


async def test_a_quota_counts_the_pixels_that_are_made(connect: ClientFactory, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice {hashlib.sha256(b'secret').hexdigest()}\n")
    keys.chmod(0o600)
    limits = KeyLimits(rate="4/minute", pixel_steps_per_day=80 * 60 * 2)
    async with connect(keys_file=keys, key_limits=limits) as client:
        assert (await upscaled(client)).status_code == 401
        client.headers["authorization"] = "Bearer secret"
        assert (await upscaled(client)).status_code == 200
        assert "takes 19200" in check(await upscaled(client, scale=4), 429, 42901, None)
        assert (await upscaled(client)).status_code == 200
        assert (await upscaled(client)).status_code == 429
        assert "4 per 1 minute" in check(await upscaled(client), 429, 42901, None)


async def test_a_replica_that_died_is_tried_again_and_one_that_hangs_is_late(
    model_graph: Graph, with_models: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wake, "PING_AFTER_S", 0.0)
    tries = 0

    async def dies_once(**arguments: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ActorDiedError
        return await model_graph.upscale_file(**arguments)

    graph = FakeGraph(model_graph, upscale_file=dies_once)
    async with open_client(graph=graph, catalog=with_models) as client:
        assert (await upscaled(client)).status_code == 200
        assert tries == 2
        assert {call["deployment"] for call in graph.named("ping")} == {"upscaler"}
        assert (await upscaled(client, upscaler="lanczos")).status_code == 200
        assert tries == 2
    async with open_client(graph=FakeGraph(upscale_file=raising(ActorDiedError())), catalog=with_models) as client:
        check(await upscaled(client), 503, 42903, None)
    hanging = FakeGraph(upscale_file=never)
    async with open_client(graph=hanging, catalog=with_models, deadline_s=0.2) as client:
        check(await upscaled(client), 504, 50006, None)
    assert hanging.responses[0].cancelled
