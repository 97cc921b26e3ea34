"""What browsers ask: CORS, OPTIONS, HEAD."""

from __future__ import annotations

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware

from deployments.app import proxy_middlewares
from deployments.proxy.answers import ProxyAnswers
from tests.support.http import PATH, check, post
from tests.support.ingress import ClientFactory

SITE = "https://page.example"
PREFLIGHT = {"origin": SITE, "access-control-request-method": "POST"}


async def test_pages_of_an_allowed_site_may_send_requests(connect: ClientFactory) -> None:
    async with connect(cors_origins=(SITE,)) as client:
        asked = await client.options(PATH, headers=PREFLIGHT | {"access-control-request-headers": "authorization"})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == SITE
        assert "authorization" in asked.headers["access-control-allow-headers"]
        assert "POST" in asked.headers["access-control-allow-methods"]
        for fields, status in (({}, 200), ({"sampler": "nope"}, 400)):
            client.headers["origin"] = SITE
            reply = await post(client, **fields)
            assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, SITE)
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
        other = await client.options(PATH, headers=PREFLIGHT | {"origin": "https://other.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers


async def test_any_site_may_send_requests_if_the_setting_is_a_star(connect: ClientFactory) -> None:
    async with connect(cors_origins=("*",)) as client:
        reply = await client.get("/v1/models", headers={"origin": SITE})
        assert reply.headers["access-control-allow-origin"] == "*"
        large = await client.post(PATH, content=b"x" * (2**20 + 1), headers={"origin": SITE})
        assert (large.status_code, large.headers["access-control-allow-origin"]) == (413, "*")


async def test_no_other_site_may_send_requests_by_default(client: httpx.AsyncClient) -> None:
    assert "access-control-allow-origin" not in (await client.get("/v1/models", headers={"origin": SITE})).headers


def test_pages_can_read_the_proxys_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CORSMiddleware not in {layer.cls for layer in proxy_middlewares()}
    monkeypatch.setenv("SDGRAPH_CORS_ORIGINS", f"{SITE}/, https://b.example")
    layers = proxy_middlewares()  # innermost first
    (cors,) = [layer for layer in layers if layer.cls is CORSMiddleware]
    assert layers.index(cors) > [layer.cls for layer in layers].index(ProxyAnswers), "around what answers by itself"
    assert cors.kwargs["allow_origins"] == [SITE, "https://b.example"]


@pytest.mark.parametrize(("path", "method"), [(PATH, "POST"), ("/v1/models", "GET"), ("/healthz", "GET")])
async def test_options_say_what_a_route_takes(client: httpx.AsyncClient, path: str, method: str) -> None:
    """SillyTavern asks so whether a stable-diffusion.cpp server is there."""
    reply = await client.options(path)
    assert (reply.status_code, reply.content) == (204, b"")
    assert method in reply.headers["allow"]


async def test_other_methods_and_paths_stay_errors(client: httpx.AsyncClient) -> None:
    check(await client.options("/nope"), 404, 40000, None)
    check(await client.get(PATH), 405, 40000, None)
    assert (await client.head("/readyz")).status_code == 200
