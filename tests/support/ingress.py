"""An ingress in this process, spoken to by HTTP through ASGI."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from config.catalog import Catalog
from deployments.access.limits import KeyLimits
from deployments.api.app import HttpIngress
from deployments.graph import Graph
from deployments.ingress.health import Readiness
from deployments.ingress.ingress import IngressLimits, LinkStore, SigningFiles
from pipelines.acceleration import Acceleration
from pipelines.planning import PlanLimits

NO_LIMITS = KeyLimits()
ClientFactory = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]
"""`open_client` with a graph and a catalog as defaults."""


async def ready() -> tuple[bool, Mapping[str, str]]:
    """All is well."""
    return True, {"everything": "HEALTHY"}


def make_app(
    *,
    graph: Graph,
    catalog: Catalog,
    keys_file: Path | None = None,
    key_limits: KeyLimits = NO_LIMITS,
    deadline_s: float = 60,
    max_body_bytes: int = 2**20,
    max_image_pixels: int = 10**6,
    max_pixel_steps: int = 10**8,
    readiness: Readiness = ready,
    signing: SigningFiles | None = None,
    cors_origins: tuple[str, ...] = (),
    acceleration: Acceleration | None = None,
    links: LinkStore | None = None,
    compiles_on_demand: bool = False,
) -> FastAPI:
    """The application of an ingress over `graph`, with limits of the test's own."""
    ingress = HttpIngress(
        graph=graph,
        catalog=catalog,
        limits=IngressLimits(PlanLimits(max_pixel_steps), max_body_bytes, max_image_pixels, deadline_s, cors_origins),
        keys_file=keys_file,
        key_limits=key_limits,
        readiness=readiness,
        signing=signing,
        acceleration=acceleration,
        links=links,
        compiles_on_demand=compiles_on_demand,
    )
    app: FastAPI = ingress.__serve_build_asgi_app__()
    return app


@asynccontextmanager
async def open_client(*, base_url: str = "http://127.0.0.1", **limits: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `make_app(**limits)`."""
    app = make_app(**limits)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url=base_url) as client:
        yield client
