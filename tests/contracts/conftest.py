"""The ingress over Serve's local testing mode: real deployments and handles in this process, HTTP through ASGI."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve import Application

from config.catalog import Catalog
from deployments.access.limits import KeyLimits
from deployments.app import AppArgs, bind_components
from deployments.ingress.ingress import Ingress, IngressLimits
from deployments.replicas.base import Runtime
from pipelines.planning import PlanLimits

NO_LIMITS = KeyLimits()
ClientFactory = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


def run_locally(bound: Mapping[str, Application], name: str) -> dict[str, Any]:
    """Component id -> local handle of what `bind_components` bound."""
    apps = {id(app): app for app in bound.values()}
    running = {
        key: serve.run(app, name=f"{name}-{i}", route_prefix=None, _local_testing_mode=True)
        for i, (key, app) in enumerate(apps.items())
    }
    return {component: running[id(app)] for component, app in bound.items()}


@pytest.fixture(scope="session")
def handles(catalog: Catalog) -> dict[str, Any]:
    """Component id -> local handle, everything but the refiner of two models."""
    bound = bind_components(AppArgs(grouping="role"), catalog, Runtime(device="cpu", torch_threads=2))
    return run_locally(bound, "local")


async def ready() -> tuple[bool, Mapping[str, str]]:
    return True, {"everything": "HEALTHY"}


@pytest.fixture
def connect(handles: dict[str, Any], catalog: Catalog) -> ClientFactory:
    """A client of an ingress with limits of the test's own."""

    @asynccontextmanager
    async def open_client(
        *,
        keys_file: Path | None = None,
        key_limits: KeyLimits = NO_LIMITS,
        base_url: str = "http://127.0.0.1",
        deadline_s: float = 60,
        handles: Mapping[str, Any] = handles,
        max_body_bytes: int = 2**20,
        max_image_pixels: int = 10**6,
        catalog: Catalog = catalog,
        compiled: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[httpx.AsyncClient]:
        limits = IngressLimits(PlanLimits(10**8), max_body_bytes, max_image_pixels, deadline_s)
        ingress = Ingress(handles, catalog, limits, keys_file, key_limits, ready, compiled)
        transport = httpx.ASGITransport(ingress.__serve_build_asgi_app__(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            yield client

    return open_client


@pytest.fixture
async def client(connect: ClientFactory) -> AsyncIterator[httpx.AsyncClient]:
    async with connect() as opened:
        yield opened
