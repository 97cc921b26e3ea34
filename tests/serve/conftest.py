"""One real Ray instance for the whole suite."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from config.catalog import ROOT
from deployments.launcher import running_graph, with_library
from tests.support.http import encoded, photo
from tests.support.library import UNET, put
from tests.support.live import draw, request
from tests.support.redis_server import RedisServer, redis_server
from tests.support.upscalers import FILE

CONFIG = Path(__file__).with_name("graph.yaml")
TOKEN = "7" * 64
"""Ray's."""


@pytest.fixture(scope="session")
def graph_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "graph.log"


@dataclass(frozen=True)
class Collector:
    """An OpenTelemetry collector on loopback that keeps what it is sent.

    Attributes:
        endpoint: base URL.
        spans: trace id -> name of each span, with its attributes.
    """

    endpoint: str
    spans: dict[bytes, list[tuple[str, dict[str, str]]]]


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    spans: dict[bytes, list[tuple[str, dict[str, str]]]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    attributes = {a.key: a.value.string_value for a in span.attributes}
                    spans.setdefault(span.trace_id, []).append((span.name, attributes))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Collector(f"http://127.0.0.1:{server.server_port}", spans)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def library(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder beside the catalog, with one UNet and an upscaler when the graph starts."""
    folder = tmp_path_factory.mktemp("library")
    put(tiny_models / "sd15" / UNET, folder / "checkpoints" / "My SD.safetensors")
    put(tiny_models / "upscaler-x2" / FILE, folder / "My x2.safetensors")
    return folder


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def url(
    library: Path, tmp_path_factory: pytest.TempPathFactory, graph_log: Path, collector: Collector, redis: RedisServer
) -> Iterator[str]:
    """Base URL of the running graph; a failed start shows the graph's own log."""
    programs = tmp_path_factory.mktemp("tvm")
    wanted = ["--catalog", "tiny", "--model", "SD1.5", "--size", "512x512", "--rows", "2", "--precision", "float32"]
    command = [sys.executable, "-m", "pipelines.backends.tvm.compile", *wanted, "--cache", str(programs)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    environment = {"SDGRAPH_MAX_BODY_BYTES": str(8 * 2**20)}
    environment |= {"SDGRAPH_TVM_PRECISION": "float32"}  # pictures are compared to the bit or nearly, on any machine
    environment |= {"RAY_metrics_report_interval_ms": "1000"}  # ten seconds by default
    environment |= {"RAY_AUTH_TOKEN": TOKEN, "SDGRAPH_LIMITS_STORE": f"{redis.url}/1"}
    environment |= {"SDGRAPH_TVM_CACHE": str(programs), "SDGRAPH_LOG_FORMAT": "json", "RAY_DEDUP_LOGS": "0"}
    environment |= {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "deployments.telemetry.tracing:otlp",
        "RAY_SERVE_TRACING_SAMPLING_RATIO": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
    }
    try:
        with running_graph(
            with_library(CONFIG, library, programs), 8123, environment, timeout_s=400, log=graph_log
        ) as base:
            yield base
    finally:
        print(graph_log.read_text()[-5000:])


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as opened:
        yield opened


COUNT = 20
AT_ONCE = 4


@dataclass(frozen=True)
class Eventful:
    """Requests that go through every kind of replica, and what they draw while nothing happens."""

    bodies: list[dict[str, Any]]
    pictures: list[np.ndarray]


@pytest.fixture(scope="session")
def eventful(url: str) -> Eventful:
    """Text encoder, ControlNet, UNet, refiner, VAE both ways."""
    picture = encoded(photo(300, 200))
    steered = {"model_name": "SDXL-ControlNet", "controlnet_name": "canny", "controlnet_image": picture}
    rest = {"enable_refiner": True, "image": picture, "strength": 0.8, "sampler": "Euler a", "steps": 10}
    bodies = [request("SDXL1.0-base", seed=i, prompt=f"lighthouse {i % 3}") | steered | rest for i in range(COUNT)]
    return Eventful(bodies, send_all(url, bodies))


def send_all(
    url: str, bodies: list[dict[str, Any]], after: int = 0, then: Callable[[], object] = int
) -> list[np.ndarray]:
    """Every picture; when `after` of them are there, `then` is called while the others are under way."""
    done, lock = 0, threading.Lock()

    def one(body: dict[str, Any]) -> np.ndarray:
        nonlocal done
        with httpx.Client(base_url=url, timeout=660) as client:
            pixels, _ = draw(client, **body)
        with lock:
            done += 1
            if done == after:
                then()
        return pixels

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, bodies))
