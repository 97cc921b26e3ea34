"""One real Ray instance for the whole suite."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from config.catalog import ROOT
from deployments.local import running_graph
from tests import hub_cache

CONFIG = Path(__file__).with_name("graph.yaml")


@pytest.fixture(scope="session")
def graph_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "graph.log"


@pytest.fixture(scope="session")
def url(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory, graph_log: Path) -> Iterator[str]:
    """Base URL of the running graph; a failed start shows the graph's own log."""
    home = hub_cache.fill(tmp_path_factory.mktemp("hf"), tiny_models)
    programs = tmp_path_factory.mktemp("tvm")
    wanted = ["--catalog", "tiny", "--model", "SD1.5", "--size", "512x512", "--rows", "2"]
    command = [sys.executable, "-m", "pipelines.backends.tvm.compile", *wanted, "--cache", str(programs)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "SDGRAPH_MAX_BODY_BYTES": str(8 * 2**20)}
    environment |= {"SDGRAPH_TVM_CACHE": str(programs)}
    try:
        with running_graph(CONFIG, 8123, environment, timeout_s=400, log=graph_log) as base:
            yield base
    finally:
        print(graph_log.read_text()[-5000:])


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as opened:
        yield opened
