"""What `build_app` binds, looked at without starting it, and run in this process. Ray's private parts for tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from ray import serve
from ray.serve import Application

from deployments.app import AppArgs, build_app


def name_of(app: Application) -> str:
    """Name of a bound deployment."""
    return str(app._bound_deployment.name)


def options_of(app: Application) -> dict[str, Any]:
    """Actor options of a bound deployment."""
    return dict(app._bound_deployment.ray_actor_options)


def deployment_names(args: AppArgs) -> set[str]:
    """Names of every deployment of a graph."""
    with tempfile.NamedTemporaryFile("w") as keys:
        keys.write(f"nobody {'0' * 64}\n")
        keys.flush()
        with patch.dict(os.environ, {"SDGRAPH_API_KEYS_FILE": keys.name}):
            app = build_app(args)
    graph = app._bound_deployment.init_kwargs["graph"]
    return {name_of(deployment) for deployment in graph.deployments} | {name_of(app)}


def run_locally(bound: Mapping[str, Application], name: str) -> dict[str, Any]:
    """Component id -> a handle in this process (Serve's local testing mode), of what `bind_components` bound."""
    apps = {id(app): app for app in bound.values()}
    running = {
        key: serve.run(app, name=f"{name}-{i}", route_prefix=None, _local_testing_mode=True)
        for i, (key, app) in enumerate(apps.items())
    }
    return {component: running[id(app)] for component, app in bound.items()}
