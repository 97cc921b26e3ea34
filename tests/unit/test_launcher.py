"""Starting the graph as a child process."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml

from deployments.app import AppArgs
from deployments.launcher import LOCAL_CONFIG, StartError, laptop_config, main, running_graph, with_library


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


def test_a_library_is_served_beside_the_configs_catalog(tmp_path: Path) -> None:
    config = yaml.safe_load(with_library(LOCAL_CONFIG, tmp_path, tmp_path / "build").read_text())
    args = AppArgs.model_validate(config["applications"][0]["args"])
    assert args.library == (tmp_path.resolve(),)
    assert args.model_copy(update={"library": ()}) == AppArgs(catalog="embedded", auth="none", grouping="role")


def test_make_serve_names_a_library_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"library '.*nowhere' is not a folder"):
        main(["serve", str(LOCAL_CONFIG), "--library", str(tmp_path / "nowhere")])
