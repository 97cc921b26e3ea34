"""OpenAI's `response_format: url` where the server has an object store: signed links that end by themselves."""

from __future__ import annotations

import io
import logging
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta

import httpx
import numpy as np
import pytest
from PIL import Image

from deployments.ingress.limits import LinkStore
from deployments.ingress.links import PictureLinks
from tests.support.http import decoded, pixels
from tests.support.ingress import ClientFactory
from tests.support.object_store import ObjectStore, object_store

ROUTE = "/v1/images/generations"
ASKED = {"prompt": "a cat", "size": "128x128", "num_inference_steps": 3, "seed": 7}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with object_store() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
async def linking(connect: ClientFactory, store: ObjectStore) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(links=LinkStore("s3://pictures/of/ours", 60)) as client:
        yield client


async def test_a_link_leads_to_the_same_picture_and_expires(linking: httpx.AsyncClient, store: ObjectStore) -> None:
    inline = (await linking.post(ROUTE, json=ASKED)).json()["data"][0]
    assert store.objects == {}, "pictures that are sent inline are kept nowhere"
    reply = await linking.post(ROUTE, json=ASKED | {"response_format": "url", "n": 2})
    first, second = reply.json()["data"]
    assert (first["seed"], second["seed"]) == (7, 8)
    assert "b64_json" not in first
    assert len(store.objects) == 2
    async with httpx.AsyncClient() as anybody:
        assert first["url"].startswith(f"{store.url}/pictures/of/ours/")
        fetched = await anybody.get(first["url"])
        assert (fetched.status_code, fetched.headers["content-type"]) == (200, "image/png")
        assert np.array_equal(pixels(Image.open(io.BytesIO(fetched.content))), pixels(decoded(inline["b64_json"])))
        assert b"trainedAlgorithmicMedia" in fetched.content
        elsewhere = first["url"].replace(first["url"].split("/")[-1].partition("?")[0], "another.png")
        assert (await anybody.get(elsewhere)).status_code == 403
        store.ahead = timedelta(seconds=61)
        assert (await anybody.get(first["url"])).text == "expired"


async def test_with_an_unreachable_store_pictures_are_sent_inline(
    connect: ClientFactory, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    async with connect(links=LinkStore("s3://pictures", 60)) as client:
        with caplog.at_level(logging.WARNING):
            (picture,) = (await client.post(ROUTE, json=ASKED | {"response_format": "url"})).json()["data"]
    assert picture["url"].startswith("data:image/png;base64,")
    assert "sent inline" in caplog.text


@pytest.mark.parametrize("address", ["nonsense", "file:///tmp", "https://example.com/pictures", "s3://"])
def test_an_address_of_no_store_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="SDGRAPH_PICTURE_STORE"):
        PictureLinks(LinkStore(address, 60))


def test_the_address_is_in_no_message_of_its_settings() -> None:
    assert "bucket" not in repr(LinkStore("s3://bucket", 60))
