"""Starting the graph as a child process."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deployments.launcher import LOCAL_CONFIG, StartError, laptop_config, main, running_graph


def test_a_port_in_use_is_named_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(StartError, match=f"port {port} .* in use"), running_graph(LOCAL_CONFIG, port):
            pytest.fail("it started")


def test_make_serve_refuses_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(SystemExit, match=f"port {port} .* in use"):
            main(["serve", str(laptop_config(tmp_path, port))])
