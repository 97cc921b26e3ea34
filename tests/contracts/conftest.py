"""The ingress over Serve's local testing mode: real deployments and handles in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import httpx
import pytest

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from tests.support.bound import run_locally
from tests.support.ingress import ClientFactory, open_client


@pytest.fixture(scope="session")
def handles(catalog: Catalog) -> dict[str, Any]:
    """Component id -> local handle, of every component of the tiny catalog, torch alone."""
    bound = bind_components(AppArgs(grouping="role"), catalog, Runtime(device="cpu", torch_threads=2))
    return run_locally(bound, "local")


@pytest.fixture(scope="session")
def graph(handles: dict[str, Any]) -> Graph:
    """The graph of them."""
    return Graph(handles)


@pytest.fixture
def connect(graph: Graph, catalog: Catalog) -> ClientFactory:
    """A client of an ingress with limits of the test's own."""
    return partial(open_client, graph=graph, catalog=catalog)


@pytest.fixture
async def client(connect: ClientFactory) -> AsyncIterator[httpx.AsyncClient]:
    async with connect() as opened:
        yield opened
