"""Requests to a graph that runs on a real Ray instance, and waiting for what it does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import psutil

from deployments.ray_compat import ray_processes
from tests.support.http import PATH, picture, pixels

MODELS = {"SD1.5": 128, "SD2": 128, "SDXL1.0-base": 256, "SSD": 256, "SDXL-turbo": 256}
"""The plain models of the tiny catalog, with a small size of each."""


def request(model: str, **changes: Any) -> dict[str, Any]:
    """A small request."""
    size = MODELS[model]
    fields = {"model_name": model, "prompt": "a lighthouse", "width": size, "height": size, "steps": 6, "seed": 5}
    return fields | changes


def draw(client: httpx.Client, path: str = PATH, **fields: Any) -> tuple[np.ndarray, httpx.Response]:
    """Pixels `[height, width, 3]` of a request's picture, and the reply."""
    reply = client.post(path, json=fields | {"output_format": "png"})
    return pixels(picture(reply)), reply


def wait_for(happened: Callable[[], bool]) -> None:
    """Returns when it has happened; the suite's own timeout ends a wait for what never happens."""
    while not happened():
        time.sleep(0.2)


def is_whole(url: str) -> bool:
    """Whether every deployment can serve."""
    try:
        return httpx.get(f"{url}/readyz", timeout=10).status_code == 200
    except httpx.HTTPError:  # the proxy is away
        return False


def wait_until_whole(url: str) -> None:
    """Returns when every deployment can serve."""
    wait_for(lambda: is_whole(url))


def replicas(deployment: str, application: str = "sdgraph") -> list[psutil.Process]:
    """Processes of a deployment, of a graph that this process started."""
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    found = ray_processes(f"ServeReplica:{application}:{deployment}")
    return [process for _, process in found if process.pid in ours]
