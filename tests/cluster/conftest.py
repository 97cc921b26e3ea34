"""Two nodes with a proxy each, and a Redis behind the head."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.app import AppArgs, deployment_names
from tests.cluster.nodes import Nodes, running
from tests.support.live import wait_until_whole
from tests.support.redis_server import RedisServer, redis_server


@dataclass(frozen=True)
class Outages:
    """What can be taken away from a graph that runs."""

    nodes: Nodes
    redis: RedisServer

    @property
    def heads(self) -> str:
        """Base URL of the head's proxy."""
        return f"http://127.0.0.1:{self.nodes.head_proxy}"

    @property
    def workers(self) -> str:
        """Base URL of the other node's."""
        return f"http://127.0.0.1:{self.nodes.worker_proxy}"

    def client(self, url: str, timeout_s: float = 200) -> httpx.Client:
        """One with a key."""
        return httpx.Client(base_url=url, timeout=timeout_s, headers={"authorization": "Bearer secret"})


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    """A folder with a name so short that Ray's sockets fit into it."""
    folder = Path(tempfile.mkdtemp(prefix="sd-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def outages(short: Path, tiny_models: Path) -> Iterator[Outages]:
    """SD1.5 on the worker, with a key; requests are counted in the Redis that the head uses too."""
    keys = short / "api-keys"
    keys.write_text(f"tests {hashlib.sha256(b'secret').hexdigest()}\n")
    keys.chmod(0o600)
    (short / "redis").mkdir()
    logs = short / "logs"
    logs.mkdir()
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server(short / "redis"))
        environment = {
            "SDGRAPH_API_KEYS_FILE": str(keys),
            "SDGRAPH_LIMITS_STORE": f"{redis.url}/1",
            "SDGRAPH_RATE_LIMIT": "100000/minute",
        }
        nodes = stack.enter_context(running(short / "ray", redis, environment, logs))
        made = Outages(nodes, redis)
        try:
            nodes.deploy(_config(nodes))
            for url in (made.heads, made.workers):
                wait_until_whole(url)
            yield made
        finally:
            for log in sorted(logs.iterdir()):
                print(log.read_text()[-2000:])


def _config(nodes: Nodes) -> dict[str, Any]:
    args = {"catalog": "tiny", "models": ["SD1.5"]}
    application = {
        "name": "sdgraph",
        "route_prefix": "/",
        "import_path": "deployments.app:build_app",
        "args": args,
        # A CPU each: the head has none.
        "deployments": [
            {"name": name, "ray_actor_options": {"num_cpus": 1}} for name in deployment_names(AppArgs(**args))
        ],
    }
    http = {"host": "127.0.0.1", "port": nodes.head_proxy, "request_timeout_s": 300}
    return {"proxy_location": "EveryNode", "http_options": http, "applications": [application]}
