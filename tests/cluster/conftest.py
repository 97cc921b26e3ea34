"""Two nodes, a Redis behind the head, a volume that can hang, a disk that can be filled: one graph for all outages."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from config.catalog import ROOT
from deployments.app import AppArgs, deployment_names
from tests.cluster.nodes import Nodes, running
from tests.support import volume
from tests.support.disk import small_disk, why_no_disk
from tests.support.library import LORA, UNET, put
from tests.support.live import wait_until_whole
from tests.support.redis_server import RedisServer, redis_server

NO_DISK = why_no_disk()
NO_VOLUME = volume.why_not()
LORAS = ("One", "Two", "Three", "Four", "Five", "Six")


@dataclass(frozen=True)
class Outages:
    """What can be taken away from a graph that runs."""

    nodes: Nodes
    redis: RedisServer
    temp: Path
    """Ray's folder."""
    programs: Path
    """Of compiled UNets: full since before the first of them was complete."""
    server: psutil.Process | None
    """Of the volume that the library lies on; None where this machine cannot have one."""

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
    """SD1.5 of the catalog, and a checkpoint and LoRAs of the library on the volume that can hang."""
    put(tiny_models / "sd15" / UNET, short / "files" / "Slow.safetensors")
    for name in LORAS:
        put(tiny_models / "lora-detail-sd15" / LORA, short / "files" / f"{name}.safetensors")
    keys = short / "api-keys"
    keys.write_text(f"tests {hashlib.sha256(b'secret').hexdigest()}\n")
    keys.chmod(0o600)
    (short / "redis").mkdir()
    logs = short / "logs"
    logs.mkdir()
    with ExitStack() as stack:
        temp, programs = short / "ray", short / "tvm"
        if NO_DISK is None:
            stack.enter_context(small_disk(temp, "256m"))
            stack.enter_context(small_disk(programs, "64k"))
        library, server = short / "files", None
        if NO_VOLUME is None:
            library = short / "library"
            server = stack.enter_context(volume.hanging_volume(short / "files", library))
        redis = stack.enter_context(redis_server(short / "redis"))
        environment = {
            "SDGRAPH_API_KEYS_FILE": str(keys),
            "SDGRAPH_LIMITS_STORE": f"{redis.url}/1",
            "SDGRAPH_RATE_LIMIT": "100000/minute",
            "SDGRAPH_TVM_CACHE": str(programs),
            "SDGRAPH_TVM_PRECISION": "float32",
        }
        nodes = stack.enter_context(running(temp, redis, environment, logs))
        made = Outages(nodes, redis, temp, programs, server)
        try:
            nodes.deploy(_config(nodes, library))
            for url in (made.heads, made.workers):
                wait_until_whole(url)
            yield made
        finally:
            for log in sorted(logs.iterdir()):
                print(log.read_text()[-2000:])


def _config(nodes: Nodes, library: Path) -> dict[str, Any]:
    args = {"catalog": "tiny", "models": ["SD1.5", "Slow"], "library": str(library)}
    args |= {"tvm": True, "tvm_models": ["SD1.5"]}
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


def compile_into(folder: Path) -> subprocess.CompletedProcess[str]:
    """`make compile` of one size."""
    wanted = ["--catalog", "tiny", "--model", "SD1.5", "--size", "512x512", "--rows", "2", "--precision", "float32"]
    command = [sys.executable, "-m", "pipelines.backends.tvm.compile", *wanted, "--cache", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
