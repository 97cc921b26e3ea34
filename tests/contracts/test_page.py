"""The files of the page at `/`."""

from __future__ import annotations

import gzip
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from config.catalog import Catalog
from deployments.api.body_limit import BodyLimit
from deployments.api.page import FOLDER
from deployments.proxy.answers import ProxyAnswers
from tests.support.graph import FakeGraph
from tests.support.http import check
from tests.support.ingress import make_app, open_client


async def addresses(client: httpx.AsyncClient) -> list[str]:
    """What the page loads."""
    return sorted(set(re.findall(r'(?:src|href)="(page/[^"]+)"', (await client.get("/")).text)))


@pytest.fixture
async def page(catalog: Catalog) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(graph=FakeGraph(), catalog=catalog) as client:
        yield client


async def test_the_page_names_every_file_and_every_file_is_there(page: httpx.AsyncClient) -> None:
    loaded = await addresses(page)
    files = {path.name for path in FOLDER.iterdir()} - {"index.html"}
    assert {address.rsplit("/", 1)[1] for address in loaded} == files, "a module that is not preloaded waits for others"
    for address in loaded:
        reply = await page.get(f"/{address}")
        assert reply.status_code == 200
        assert reply.content == (FOLDER / Path(address).name).read_bytes()
        assert reply.headers["cache-control"] == "public, max-age=31536000, immutable"
        for imported in re.findall(r'from "\./(.+?)"', reply.text):
            assert imported in files, address


async def test_a_browser_asks_again_for_the_page_and_is_told_that_it_is_the_same(page: httpx.AsyncClient) -> None:
    first = await page.get("/")
    assert first.headers["cache-control"] == "no-cache"
    assert first.headers["content-type"] == "text/html; charset=utf-8"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = await page.get("/", headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    assert (await page.get("/", headers={"if-none-match": '"other"'})).status_code == 200
    plain = await page.get("/", headers={"accept-encoding": "identity"})
    assert plain.headers["etag"] != first.headers["etag"], "gzip is another representation"
    assert plain.text == first.text
    assert "content-encoding" not in plain.headers


async def test_head_has_the_headers_of_get(page: httpx.AsyncClient) -> None:
    for path in ["/", *(f"/{address}" for address in await addresses(page))]:
        got, told = await page.get(path), await page.head(path)
        assert (told.status_code, told.content) == (200, b"")
        assert dict(told.headers) == dict(got.headers)


async def test_the_proxys_layers_pass_empty_answers_on(catalog: Catalog) -> None:
    """An answer without a body must not look like a replica that died."""
    app = BodyLimit(ProxyAnswers(make_app(graph=FakeGraph(), catalog=catalog)), max_bytes=1000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        got = await client.get("/")
        assert (got.status_code, got.headers["content-encoding"]) == (200, "gzip")
        assert (await client.head("/")).headers["content-length"] == got.headers["content-length"]
        assert (await client.get("/", headers={"if-none-match": got.headers["etag"]})).status_code == 304


async def test_nothing_is_loaded_from_another_site(page: httpx.AsyncClient) -> None:
    policy = (await page.get("/")).headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    for path in FOLDER.iterdir():
        found = set(re.findall(r"https?://[^\s\"'`)]+", path.read_text())) - {"http://www.w3.org/2000/svg"}
        assert found == set(), path.name


async def test_the_page_reads_the_request_of_the_openapi_document(page: httpx.AsyncClient) -> None:
    document = (await page.get("/openapi.json")).json()["components"]["schemas"]
    reply = await page.get("/page/request.json")
    told = reply.json()
    assert told["GenerationRequest"] == document["GenerationRequest"]
    assert "PartWeights" in told, "what it refers to"
    assert set(told) < set(document)
    assert reply.headers["cache-control"] == "no-cache"
    known = await page.head("/page/request.json", headers={"if-none-match": reply.headers["etag"]})
    assert known.status_code == 304


async def test_a_file_of_another_version_is_not_kept_and_an_unknown_one_is_not_found(page: httpx.AsyncClient) -> None:
    assert (await page.get("/page/000000000000/main.js")).headers["cache-control"] == "no-cache"
    check(await page.get("/page/000000000000/nope.js"), 404, 40000, None)
    check(await page.post("/"), 405, 40000, None)
    assert (await page.options("/")).status_code == 204


async def test_the_page_asks_for_no_key(catalog: Catalog, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"me {'0' * 64}\n")
    async with open_client(graph=FakeGraph(), catalog=catalog, keys_file=keys) as client:
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401


def test_the_page_is_small() -> None:
    files = [path.read_bytes() for path in FOLDER.iterdir()]
    assert sum(map(len, files)) <= 100_000
    assert sum(len(gzip.compress(data)) for data in files) <= 40_000
    assert max(data.count(b"\n") for data in files) <= 350
