"""Everything about Ray that Ray does not document: private names, texts of messages, environment variables (GRA-11).

tests/upstream/test_ray.py has a test for each; when a new Ray breaks one, this is the file to change.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, cast

import psutil
import ray
from ray import serve
from ray._common.utils import get_default_ray_temp_dir
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.context import _get_serve_request_context
from ray.serve.exceptions import RayServeException
from starlette.types import Send

C = TypeVar("C", bound=type)

ENVIRONMENT: Mapping[str, str] = {
    "RAY_ADDRESS": "local",  # a cluster of our own, never one that happens to run here
    "RAY_AUTH_MODE": "disabled",  # unset, a local start may leave a token in the user's home
    # Middlewares in Serve's HTTP proxy.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.app:proxy_middlewares",
    # A sleeping deployment wakes when its waiting requests are reported: every 10 s by default.
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    # Replicas whose weights are missing are started again until the weights come.
    "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1000000",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""How `make` and the launcher start Ray on one machine."""
LOOPBACK: Mapping[str, str] = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Makes a node that cannot be part of a cluster: its address is 127.0.0.1, and its ports are on loopback (SEC-5)."""
TOKEN_FILE = Path(os.path.expanduser("~/.ray/auth_token"))
"""Where Ray looks for a token if the environment has none; `ray get-auth-token --generate` writes it."""

SERVING_STATES = ("HEALTHY", "UPSCALING", "DOWNSCALING")
"""Statuses of a deployment that can serve; one that is scaled to zero is healthy."""
CONTROLLER_TIMEOUT_S = 2.0
"""Seconds to wait for an answer of Serve's controller, which takes milliseconds while the head is up (GRA-19)."""
FAILED_TO_START = "failed to start"
"""Serve's words, in a deployment's status, for replicas that raise when they are made; they stay until one starts."""
PROXY_ERROR_TYPE = "text/plain"
"""Content type of the errors that Serve's proxy answers by itself; the application never sends one like it."""


def has_token() -> bool:
    """Whether Ray finds a token of this user, in the environment or in `TOKEN_FILE`."""
    return any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or TOKEN_FILE.exists()


def as_ingress(ingress: C) -> C:
    """Let Serve ask the class for its ASGI application inside the replica (`__serve_build_asgi_app__`).

    `serve.ingress` without an application is meant for builders such as Ray's own LLM server. The usual way pickles
    the application where the graph is built; ours is made for its ingress, which exists in the replica alone.
    """
    decorated: C = serve.ingress()(ingress)
    return decorated


def current_request_id() -> str:
    """The id of the request this code runs for, empty outside a request. Serve hands it to every replica."""
    return str(_get_serve_request_context().request_id or "")


def cause_of(error: BaseException) -> BaseException:
    """The original error behind the wrappers of Ray, Serve and task groups.

    Ray wraps a replica's exception, once an edge; a task group groups them; and Serve has a wrapper for a call that
    could not begin because one it depends on died.
    """
    while True:
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) and error.cause is not error:
            error = error.cause
        elif isinstance(error, RayServeException) and isinstance(error.__cause__, RayActorError):
            error = error.__cause__
        elif isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        else:
            return error


def replica_died(error: BaseException) -> bool:
    """Whether a call failed because the process, or the node, that ran it is gone."""
    return isinstance(cause_of(error), RayActorError)


def raised_elsewhere(error: BaseException) -> bool:
    """Whether another process raised it. Ray gives such an error the class of its cause too (`as_instanceof_cause`)."""
    return isinstance(error, RayTaskError)


def gpu_share() -> float:
    """GPUs that Ray gave the actor this code runs in, such as 0.25; none outside an actor.

    The GPUs that torch sees do not tell: since 2.60 Ray leaves every GPU visible to actors that asked for none
    (ray#54868, ENG-12).
    """
    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return 0.0
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0))


class DeploymentStates:
    """The states that Serve's controller reports for the deployments of the application this code runs in.

    The controller runs on the head node, which may be down while replicas serve. Its last answer holds meanwhile.
    """

    def __init__(self) -> None:
        """The controller is not asked before the first call, because this object is pickled for the ingress."""
        self._said: Mapping[str, str] = {}
        self._said_at = 0.0
        self._asking: asyncio.Future[Mapping[str, str]] | None = None

    async def __call__(self) -> tuple[bool, Mapping[str, str]]:
        """Whether every deployment can serve, and the state of each in Serve's own words."""
        if self._asking is None:
            self._asking = asyncio.get_running_loop().run_in_executor(_asking_threads(), _states)
            self._asking.add_done_callback(self._answered)
        with suppress(Exception):  # it died, or Serve is going down
            await asyncio.wait_for(asyncio.shield(self._asking), CONTROLLER_TIMEOUT_S)
        states, silent_s = self._said, time.monotonic() - self._said_at
        if states and silent_s > 2 * CONTROLLER_TIMEOUT_S:
            note = f"Serve's controller has not answered for {silent_s:.0f} s; this is what it said last"
            states = {name: f"{state} ({note})" for name, state in states.items()}
        return bool(states) and all(state.startswith(SERVING_STATES) for state in states.values()), states

    def _answered(self, asked: asyncio.Future[Mapping[str, str]]) -> None:
        self._asking = None
        if not asked.cancelled() and asked.exception() is None:
            self._said, self._said_at = asked.result(), time.monotonic()


@functools.cache
def _asking_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "controller")


def _states() -> Mapping[str, str]:
    application = serve.get_replica_context().app_name
    deployments = serve.status().applications[application].deployments
    return {name: f"{d.status.value}: {d.message}".rstrip(": ") for name, d in deployments.items()}


def transport_of(send: Send) -> asyncio.Transport | None:
    """The connection behind the `send` that uvicorn, on which Serve's proxy runs, gives its outermost layer."""
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if not (hasattr(transport, "get_write_buffer_size") and hasattr(transport, "abort")):
        return None
    return cast(asyncio.Transport, transport)  # uvloop's own has the same methods


def ray_processes(*titles: str) -> list[tuple[str, psutil.Process]]:
    """Ray's processes below this one whose title begins with one of `titles`, such as `ServeReplica:sdgraph:vae`.

    Ray gives an actor's process its name as title; behind a dot comes what it does at the moment. Those of a graph
    that somebody else started on this machine are not ours to count or to kill.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if title.startswith(tuple(f"ray::{wanted}" for wanted in titles)):
            found.append((title.removeprefix("ray::").split(".")[0].strip(), process))
    return found


def metrics_targets() -> list[str]:
    """Addresses, `host:port`, of all that exports metrics of the Ray that runs here, as Prometheus finds them."""
    file = Path(get_default_ray_temp_dir()) / "prom_metrics_service_discovery.json"
    return [target for group in json.loads(file.read_text()) for target in group["targets"]]
