"""Starting the graph as a child process."""

from __future__ import annotations

import socket

import pytest

from deployments.launcher import LOCAL_CONFIG, StartError, running_graph


def test_a_port_in_use_is_named_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(StartError, match=f"port {port} .* in use"), running_graph(LOCAL_CONFIG, port):
            pytest.fail("it started")
