"""Who can reach what Ray opens on this machine, and whether anything that is shown or kept has a secret in it."""

from __future__ import annotations

import ipaddress
import re
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from ray._common.utils import get_default_ray_temp_dir
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

from deployments.ray_compat import metrics_targets, ray_processes
from tests.serve.conftest import TOKEN, Collector
from tests.support.live import draw, request, wait_for
from tests.support.redis_server import PASSWORD

KEY = "a key that a caller sends"


def ports(process: psutil.Process) -> list[tuple[str, int]]:
    """Addresses and ports on which a process listens."""
    connections = process.net_connections("tcp")
    return [(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN]


def is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def open_ports() -> dict[str, list[int]]:
    """Title of each replica -> what it listens on beyond loopback."""
    return {
        title: [port for address, port in ports(process) if not is_loopback(address)]
        for title, process in ray_processes("ServeReplica:")
    }


def test_ray_listens_on_loopback_but_for_a_port_of_each_replica(client: httpx.Client) -> None:
    replicas = {process.pid for _, process in ray_processes("ServeReplica:")}
    others = [process for process in psutil.Process().children(recursive=True) if process.pid not in replicas]
    seen = {address for process in others for address, _ in ports(process)}
    assert {address for address in seen if not is_loopback(address)} == set()
    assert seen, "the dashboard's port at least"
    assert {len(found) for found in open_ports().values()} == {1}


def test_that_port_wants_the_token(client: httpx.Client) -> None:
    (port,) = next(iter(open_ports().values()))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = ASGIServiceStub(channel).HandleRequest
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.RpcError) as refused:
                call(ASGIRequest(), metadata=metadata, timeout=30)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_no_secret_is_in_logs_metrics_traces_or_status(
    client: httpx.Client, graph_log: Path, collector: Collector
) -> None:
    """A caller's key, Ray's token, Redis' password."""
    headers = {"authorization": f"Bearer {KEY}"}
    refused = client.post("/v1/image/generation", json=request("SD1.5", sampler="none"), headers=headers)
    assert refused.status_code == 400
    with httpx.Client(base_url=client.base_url, headers=headers, timeout=120) as caller:
        _, reply = draw(caller, **request("SD1.5"))
    request_id = reply.headers["x-request-id"]
    wait_for(lambda: request_id in graph_log.read_text())
    wait_for(lambda: any(request_id in str(spans) for spans in collector.spans.values()))
    shown = {"spans": str(collector.spans), "log": graph_log.read_text(errors="replace")}
    shown["metrics"] = "".join(httpx.get(f"http://{target}/metrics").text for target in metrics_targets())
    logs = Path(get_default_ray_temp_dir()) / "session_latest" / "logs"
    shown |= {str(file): file.read_text(errors="replace") for file in logs.rglob("*") if file.is_file()}
    shown["status"] = status(graph_log)
    assert "unet-sd15" in shown["status"]
    assert "ray_sdgraph" in shown["metrics"]
    assert [(name, secret) for name, text in shown.items() for secret in (KEY, TOKEN, PASSWORD) if secret in text] == []


def status(graph_log: Path) -> str:
    """What `serve status` and `serve config` print."""
    found = re.search(r"http://127\.0\.0\.1:\d+", graph_log.read_text())
    dashboard = found[0] if found else "http://127.0.0.1:8265"
    serve = Path(sys.executable).with_name("serve")
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    printed = ""
    for command in ("status", "config"):
        done = subprocess.run(
            [serve, command, "--address", dashboard], env=environment, capture_output=True, text=True, check=True
        )
        printed += done.stdout
    return printed
