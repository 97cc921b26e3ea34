"""A Ray cluster as KubeRay starts one, on this machine: `ray start` for each node, the Serve config by its REST API.

The head keeps what it knows in a Redis, so that it can be killed and started anew. Nodes have their own proxies, which
listen on ports of their own, as they share this machine's loopback.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from deployments.launcher import DEFAULTS, ENVIRONMENT, ROOT
from tests.support.redis_server import PASSWORD, RedisServer, free_port

STARTS = 4
"""The kubelet starts a node's pod again too: on a busy machine Ray's own time limits may end it while it starts."""
RAY = Path(sys.executable).with_name("ray")


@dataclass
class Node:
    """All processes of one node."""

    started: subprocess.Popen[bytes]

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Those whose title begins with one of `titles`, such as `ray::ProxyActor`; all without titles."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                ours = os.getsid(process.pid) == self.started.pid
                if ours and (not titles or " ".join(process.cmdline()).startswith(titles)):
                    found.append(process)
        return found

    def kill(self) -> None:
        """As when the power goes."""
        family = self.processes()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.started.wait()
        psutil.wait_procs(family, timeout=30)


@dataclass
class Nodes:
    """A head without CPUs and a worker, which has all replicas."""

    folder: Path
    redis: RedisServer
    environment: Mapping[str, str]
    logs: Path
    gcs: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    head_proxy: int = field(default_factory=free_port)
    worker_proxy: int = field(default_factory=free_port)

    started: list[Node] = field(default_factory=list)
    """Every node that was ever started."""
    head: Node = field(init=False)
    worker: Node = field(init=False)

    def start_head(self) -> None:
        """The head, on the ports it always has."""
        (self.folder / "ray_current_cluster").unlink(missing_ok=True)  # a new pod's folder is empty
        command = ["--head", "--port", str(self.gcs), "--num-cpus", "0", "--include-dashboard", "true"]
        command += ["--dashboard-port", str(self.dashboard), "--ray-client-server-port", str(free_port())]
        command += ["--redis-password", PASSWORD, "--temp-dir", str(self.folder)]
        self.head = self._start(*command, RAY_REDIS_ADDRESS=f"127.0.0.1:{self.redis.port}")

    def start_worker(self) -> None:
        """The node that has the replicas."""
        self.worker = self._start("--address", f"127.0.0.1:{self.gcs}", "--num-cpus", "16")

    def _start(self, *arguments: str, **environment: str) -> Node:
        ports = {"--dashboard-agent-listen-port": free_port(), "--metrics-export-port": free_port()}
        command = [str(RAY), "start", *arguments, "--node-ip-address", "127.0.0.1", "--block", "--disable-usage-stats"]
        command += [part for name, port in ports.items() for part in (name, str(port))]
        command += ["--min-worker-port", "0", "--max-worker-port", "0", "--object-store-memory", "150000000"]
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        # What KubeRay sets for a cluster whose head keeps its memory in a Redis.
        settings = {"PYTHONUNBUFFERED": "1"}  # what it says is read while it runs
        tolerant = {"RAY_external_storage_namespace": "sdgraph", "RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
        proxies = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(self.worker_proxy)}
        settings |= {**DEFAULTS, **inherited, **_without_address(), **tolerant, **proxies}
        for _ in range(STARTS):
            log = self.logs / f"node-{len(list(self.logs.iterdir()))}.log"
            with log.open("wb") as output:
                started = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**settings, **self.environment, **environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            node = Node(started)
            self.started.append(node)
            while started.poll() is None:
                if "Ray runtime started" in log.read_text():
                    return node
                time.sleep(0.1)
            node.kill()
        raise AssertionError(f"no node after {STARTS} tries: {log.read_text()[-2000:]}")

    def deploy(self, config: dict[str, Any]) -> None:
        """As the operator does."""
        url = f"http://127.0.0.1:{self.dashboard}/api/serve/applications/"
        while True:
            with suppress(httpx.TransportError):  # the dashboard comes a little after the node
                reply = httpx.put(url, json=config, timeout=60)
                if reply.is_success:
                    return
                assert reply.status_code >= 500, reply.text
            time.sleep(0.5)


def _without_address() -> dict[str, str]:
    return {name: value for name, value in ENVIRONMENT.items() if name != "RAY_ADDRESS"}


@contextmanager
def running(folder: Path, redis: RedisServer, environment: Mapping[str, str], logs: Path) -> Iterator[Nodes]:
    """Both nodes, until the block ends."""
    nodes = Nodes(folder, redis, environment, logs)
    try:
        nodes.start_head()
        nodes.start_worker()
        yield nodes
    finally:
        for node in reversed(nodes.started):
            node.kill()
