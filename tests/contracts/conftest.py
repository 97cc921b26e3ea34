"""The ingress over Serve's local testing mode: real deployments and handles in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from config.catalog import Catalog
from deployments.app import AppArgs, bind_components
from deployments.graph import Graph
from deployments.replicas.base import Runtime
from tests.support.bound import run_locally
from tests.support.ingress import ClientFactory, open_client
from tests.support.keys import line
from tests.support.redis_server import redis_server


@pytest.fixture(scope="session")
def handles(catalog: Catalog) -> dict[str, Any]:
    """Component id -> local handle, of every component of the tiny catalog, torch alone."""
    bound = bind_components(AppArgs(grouping="role"), catalog, Runtime(device="cpu", torch_threads=1))
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


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """The keys of `tests/support/keys.py`."""
    path = tmp_path / "api-keys"
    path.write_text("# for the tests\n" + line("alice", "secret") + line("bob", "other"))
    return path


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server of our own, on loopback."""
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server.url
