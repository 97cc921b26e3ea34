"""What this project assumes of Ray 2.60 and Ray does not promise: one test for each assumption, named after it.

`deployments/ray_compat.py` is where most of them are used. A test that fails after an upgrade names what changed; where
Ray mended something, what worked round it can go. They are slow tests (a small Ray instance of their own, two minutes):
only another version of Ray makes them fail.

What needs minutes, or a node that is lost, is shown elsewhere:

* a deployment that sleeps, and goes back to sleep: tests/cluster, `test_idle_deployments_go_to_sleep_and_wake`
* failed starts that end when the weights come:
  tests/cluster, `test_missing_weights_affect_only_requests_that_need_them`
* the error of a call whose argument was on a lost node: tests/cluster, `test_a_lost_node_costs_no_picture`
* bodies without a limit: tests/serve, `test_a_chunked_body_of_100_mb_is_refused_while_it_is_read`
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import ipaddress
import os
import re
import runpy
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx
import psutil
import pytest
import ray
from fastapi import FastAPI
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from pydantic import BaseModel
from ray import cloudpickle, serve
from ray._common.usage import usage_lib
from ray._private import ray_constants, services, worker
from ray._private.authentication import authentication_token_setup
from ray._private.telemetry import open_telemetry_metric_recorder
from ray._raylet import AuthenticationTokenLoader
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve import RunTarget
from ray.serve._private import constants, deployment_state
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.build_app import build_app as serve_build_app
from ray.serve._private.common import DeploymentStatus, ReplicaMetricReport
from ray.serve._private.deployment_state import DeploymentState
from ray.serve._private.http_util import get_http_response_status, send_http_response_on_exception
from ray.serve._private.metrics_utils import InMemoryMetricsStore
from ray.serve._private.proxy import HTTPProxy
from ray.serve._private.router import AsyncioRouter
from ray.serve.config import AutoscalingPolicy
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from config.catalog import ROOT
from deployments.app import AppArgs, build_app
from deployments.graph import Graph
from deployments.ray_compat import (
    ENVIRONMENT,
    FAILED_TO_START,
    LOOPBACK,
    PROXY_ERROR_TYPE,
    SERVING_STATES,
    TOKEN_FILE,
    as_ingress,
    cause_of,
    current_request_id,
    gpu_share,
    ray_processes,
    replica_died,
)
from tests.support.live import wait_for
from tests.upstream.replicas import Front, OnPurposeError, ShareHolder, Worker

# --- without a cluster ---

pytestmark = pytest.mark.slow


class EndOfTestError(Exception):
    """Raised where a test has seen enough."""


class Arguments(BaseModel):
    number: int = 0


@pytest.mark.parametrize(("annotation", "given"), [(Arguments, Arguments), ("Arguments", dict)])
def test_a_typed_builder_must_not_have_string_annotations(annotation: Any, given: type) -> None:
    """With `from __future__ import annotations` it gets a plain dict. build_app stands in a file without."""
    seen: list[type] = []

    def builder(args: Any) -> serve.Application:
        seen.append(type(args))
        return serve.deployment(Worker).bind()

    builder.__annotations__["args"] = annotation
    call_user_app_builder_with_args_if_necessary(builder, {"number": 1})
    assert seen == [given]
    assert build_app.__annotations__["args"] is AppArgs


class UnpicklableApp(FastAPI):
    def __reduce__(self) -> Any:
        raise EndOfTestError


def test_an_ingress_made_without_an_application_is_pickled_without_one() -> None:
    """The usual way pickles the application, before there is a replica that it could answer for."""

    class Late:
        def __serve_build_asgi_app__(self) -> FastAPI:
            return UnpicklableApp()

    class Usual: ...

    with pytest.raises(EndOfTestError):
        serve.ingress(UnpicklableApp())(Usual)
    assert cloudpickle.loads(cloudpickle.dumps(as_ingress(Late))).__mro__[1].__name__ == "Late"


def test_an_ingress_without_an_application_must_know_how_to_build_one() -> None:
    with pytest.raises(ValueError, match="__serve_build_asgi_app__"):
        as_ingress(type("Speechless", (), {}))


def test_a_plain_class_is_pickled_by_reference_and_a_decorated_one_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry filled by importing a module is empty in replicas of a class that its module decorates."""
    (tmp_path / "decorated_here.py").write_text(
        "from ray import serve\nclass Plain: ...\n@serve.deployment\nclass Decorated: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("decorated_here")
    plain, decorated = (
        cloudpickle.dumps(deployment.func_or_class) for deployment in (serve.deployment(module.Plain), module.Decorated)
    )
    monkeypatch.delitem(sys.modules, "decorated_here")
    assert isinstance(cloudpickle.loads(decorated), type)
    assert "decorated_here" not in sys.modules
    cloudpickle.loads(plain)
    assert "decorated_here" in sys.modules


def test_bound_deployments_inside_our_graph_are_replaced_by_handles() -> None:
    """Also where two components share a deployment: they share its handle, which knows the deployment's name."""
    one, two = (serve.deployment(Worker, name=name).bind() for name in ("one", "two"))
    graph = Graph({"a": one, "b": one, "c": two}, {"c": one})
    app = serve.deployment(Front, name="front").bind(worker=graph)
    built = serve_build_app(app, name="upstream")
    assert {deployment.name for deployment in built.deployments} == {"one", "two", "front"}
    (front,) = (deployment for deployment in built.deployments if deployment.name == "front")
    replaced = front.init_kwargs["worker"]
    assert isinstance(replaced, Graph)
    assert [type(handle) for handle in replaced.deployments] == [DeploymentHandle] * 2
    assert [handle.deployment_name for handle in replaced.deployments] == ["one", "two"]


def test_there_is_no_request_id_outside_a_request() -> None:
    assert current_request_id() == ""


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"),
        ("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S"),
        (
            "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S",
            "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S",
        ),
        ("RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT", "MAX_PER_REPLICA_RETRY_COUNT"),
    ],
)
def test_serve_reads_these_environment_variables(name: str, constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    default = runpy.run_path(str(constants.__file__))[constant]
    monkeypatch.setenv(name, ENVIRONMENT[name])
    value = runpy.run_path(str(constants.__file__))[constant]
    assert value != default
    assert value == type(value)(ENVIRONMENT[name])


def test_retries_of_a_replicas_start_are_bounded_by_the_environment_variable_too() -> None:
    """The smaller of the two bounds counts, so app.py and the environment both raise theirs."""
    config = SimpleNamespace(deployment_config=SimpleNamespace(max_constructor_retry_count=10**6))
    target = SimpleNamespace(target_num_replicas=1)
    state = SimpleNamespace(_deployed_info=config, _target_state=target)
    bound = DeploymentState._failed_to_start_threshold.fget(state)
    assert bound == deployment_state.MAX_PER_REPLICA_RETRY_COUNT


def test_every_other_environment_variable_has_a_test_of_its_own() -> None:
    others = {name for name in ENVIRONMENT if not name.startswith("RAY_SERVE_")}
    assert others == {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"}


def test_ray_address_local_starts_an_instance_of_our_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where another one runs on this machine too."""
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:6399")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    other = services.canonicalize_bootstrap_address("127.0.0.1:6399")
    assert services.canonicalize_bootstrap_address(None, str(tmp_path)) == other
    monkeypatch.setenv("RAY_ADDRESS", ENVIRONMENT["RAY_ADDRESS"])
    assert services.canonicalize_bootstrap_address(None, str(tmp_path)) is None


def test_ray_auth_mode_disabled_leaves_no_token_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", ENVIRONMENT["RAY_AUTH_MODE"])
    enable = MagicMock()
    monkeypatch.setattr(authentication_token_setup, "_enable_token_auth", enable)
    assert not authentication_token_setup.enable_token_auth_by_default()
    enable.assert_not_called()
    monkeypatch.delenv("RAY_AUTH_MODE")
    authentication_token_setup.enable_token_auth_by_default()
    enable.assert_called_once()


def test_where_ray_looks_for_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In these three places: with none of them it has none."""
    assert authentication_token_setup._get_default_token_path() == TOKEN_FILE
    loader = AuthenticationTokenLoader.instance()
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("a token")

    def found() -> bool:
        loader.reset_cache()
        return bool(loader.has_token(ignore_auth_mode=True))

    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert found()
    moved = file.rename(tmp_path / "moved")
    assert not found()
    for name, value in {"RAY_AUTH_TOKEN": "a token", "RAY_AUTH_TOKEN_PATH": str(moved)}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert found()
    assert not found()


def test_the_address_of_a_node_that_cannot_be_one_of_several_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, value),) = LOOPBACK.items()
    assert name == ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    for set_to, expected in ((value, False), ("1", True)):
        monkeypatch.setenv(name, set_to)
        assert runpy.run_path(str(ray_constants.__file__))["ENABLE_RAY_CLUSTER"] is expected
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    monkeypatch.setattr(worker, "_global_node", None)
    assert ipaddress.ip_address(services.get_node_ip_address()).is_loopback


def test_ray_usage_stats_enabled_0_sends_nothing_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", ENVIRONMENT["RAY_USAGE_STATS_ENABLED"])
    assert not usage_lib.usage_stats_enabled()
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    assert usage_lib.usage_stats_enabled()


def test_the_states_of_a_deployment_that_serves() -> None:
    """The others mean that it does not, or not yet."""
    known = {status.value for status in DeploymentStatus}
    assert known - set(SERVING_STATES) == {"UPDATING", "UNHEALTHY", "DEPLOY_FAILED"}
    assert known > set(SERVING_STATES)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TimeoutError(), 408),
        (BackPressureError(9, 9), 503),
        (BackPressureError(9, 9, status_code=429, retry_after_s=1), 429),
    ],
)
def test_the_proxys_own_errors_are_plain_text(error: Exception, status: int) -> None:
    start, _ = send_http_response_on_exception(get_http_response_status(error, 1.0, "id"), response_started=False)
    assert start["status"] == status
    assert dict(start["headers"])[b"content-type"].decode().startswith(PROXY_ERROR_TYPE)


async def test_the_proxys_404_is_plain_text() -> None:
    answer = HTTPProxy.not_found_response(MagicMock(), MagicMock(path="/nowhere"))
    start = await anext(answer)
    await answer.aclose()
    assert start["status"] == 404
    assert dict(start["headers"])[b"content-type"].decode().startswith(PROXY_ERROR_TYPE)


@pytest.mark.parametrize("error", [ActorDiedError(), ValueError("on purpose")])
def test_the_proxy_sends_nothing_for_a_dead_replica(error: Exception) -> None:
    assert send_http_response_on_exception(get_http_response_status(error, None, "id"), response_started=False) == []


async def test_what_starlettes_outermost_layer_answers_is_raised_again() -> None:
    """Serve logs it as a crash (below), so the routes answer their errors themselves."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/raise",
        "headers": [],
        "query_string": b"",
        "http_version": "1.1",
    }
    with pytest.raises(OnPurposeError):
        await Front().__serve_build_asgi_app__()(scope, receive, send)
    assert sent[0]["status"] == 500


async def test_fastapi_answers_undecodable_bytes_with_a_400_of_its_own() -> None:
    """The contract wants 422."""
    app = FastAPI()

    @app.post("/")
    async def take(body: Arguments) -> int:
        return body.number

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        reply = await client.post("/", content=b'{"number": "\xff"}', headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert isinstance(reply.json()["detail"], str)
        assert (await client.post("/", content=b"{")).status_code == 422


def router(**parts: Any) -> Any:
    """Serve's router with some of its parts replaced."""
    made = MagicMock()
    made._request_router_initialized = asyncio.Event()
    made._request_router_initialized.set()
    made._route_and_send_request_once = lambda *args: AsyncioRouter._route_and_send_request_once(made, *args)
    made._make_upstream_crash_error = lambda error: AsyncioRouter._make_upstream_crash_error(made, error)
    for name, part in parts.items():
        setattr(made, name, part)
    return made


async def test_a_call_counts_as_waiting_only_when_its_arguments_are_there() -> None:
    """So a sleeping VAE would begin to start after the UNet has finished; `Wake` pings every deployment at once."""
    order: list[str] = []

    async def resolve(_: Any) -> None:
        order.append("arguments are there")

    @contextlib.contextmanager
    def queued(*_: Any) -> Iterator[None]:
        order.append("counted")
        yield

    async def choose(*_: Any, **__: Any) -> None:
        order.append("replica chosen")
        raise EndOfTestError

    made = router(
        _resolve_args_with_metrics=resolve,
        _metrics_manager=SimpleNamespace(wrap_queued_request=queued),
        _active_request_router=MagicMock(_choose_replica_for_request=choose),
    )
    with pytest.raises(EndOfTestError):
        await AsyncioRouter.route_and_send_request(made, MagicMock(), "response")
    assert order == ["arguments are there", "counted", "replica chosen"]


async def test_a_call_whose_argument_is_an_unavailable_actors_is_sent_again_for_ever() -> None:
    """`Pending` looks at the arguments for this reason alone."""
    tries = 0

    async def resolve(_: Any) -> None:
        nonlocal tries
        tries += 1
        raise EndOfTestError if tries == 100 else ActorUnavailableError("its node is gone", b"0" * 16)

    with pytest.raises(EndOfTestError):
        await AsyncioRouter.route_and_send_request(router(_resolve_args_with_metrics=resolve), MagicMock(), "response")
    assert tries == 100


def test_autoscaling_policies_are_pickled_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller needs neither the module nor what it imports of ours; so `autoscaling` imports nothing of ours."""
    (tmp_path / "policy_here.py").write_text("class Policy:\n    def __call__(self, context):\n        return 3, {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    pickled = AutoscalingPolicy(policy_function="policy_here:Policy").get_serialized_policy_def()
    monkeypatch.delitem(sys.modules, "policy_here")
    (tmp_path / "policy_here.py").unlink()
    assert cloudpickle.loads(pickled)()(None) == (3, {})
    ours = AutoscalingPolicy(policy_function="deployments.autoscaling:OutstandingWork").get_serialized_policy_def()
    monkeypatch.setitem(sys.modules, "deployments.autoscaling", None)  # importing it would raise
    assert cloudpickle.loads(ours)(target_s=3)


def test_raw_metrics_are_lists_of_values_the_newest_last() -> None:
    """Of each metric, of each replica; whatever the order in which reports came."""
    store = InMemoryMetricsStore()
    for at, value in ((2.0, 20.0), (3.0, 30.0), (1.0, 10.0)):
        store.add_metrics_point({"work": value}, at)
    report = ReplicaMetricReport(replica_id="r1", metrics=dict(store.data), timestamp=3.0)
    state = SimpleNamespace(_running_replicas=["r1", "r2"], _replica_metrics={"r1": report})
    raw = DeploymentAutoscalingState._get_raw_custom_metrics(state)
    assert raw.keys() == {"work"}
    assert raw["work"].keys() == {"r1"}
    assert raw["work"]["r1"][-1].value == 30.0


def test_rays_agent_forgets_a_gauge_that_is_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters stay. Replicas set their gauges at every health check for this reason."""
    now = 0.0
    monkeypatch.setattr(open_telemetry_metric_recorder, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(open_telemetry_metric_recorder.OpenTelemetryMetricRecorder, "_metrics_initialized", True)
    recorder = open_telemetry_metric_recorder.OpenTelemetryMetricRecorder()
    reader = InMemoryMetricReader()
    recorder.meter = MeterProvider([reader]).get_meter("test")
    recorder.register_gauge_metric("level", "A level.")
    recorder.register_counter_metric("calls", "Calls.")

    def exported() -> set[str]:
        data = reader.get_metrics_data()
        scopes = [scope for of in (data.resource_metrics if data else []) for scope in of.scope_metrics]
        return {metric.name for scope in scopes for metric in scope.metrics if list(metric.data.data_points)}

    for name in ("level", "calls"):
        recorder.set_metric_value(name, {}, 1.0)
    assert exported() == {"ray_level", "ray_calls"}
    now = 10 * recorder._gauge_metric_ttl_s
    assert exported() == {"ray_calls"}


# --- on one real Ray instance ---

APP = "upstream"


@dataclass(frozen=True)
class Instance:
    """A running Ray instance with the deployments of `replicas.py`."""

    url: str
    session: Path
    """Where Ray keeps its logs."""
    metrics_url: str
    """What the agent exports."""

    def handle(self, name: str) -> DeploymentHandle:
        return serve.get_deployment_handle(name, APP)


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    """Started once, on loopback; every process of it is ended by its id."""
    middlewares = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "tests.upstream.replicas:proxy_middlewares"}
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, **middlewares, "RAY_metrics_report_interval_ms": "1000"}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        context = ray.init(
            address="local",
            num_cpus=4,
            num_gpus=1,  # as far as Ray knows
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        try:
            yield started(context)
        finally:
            family = set(psutil.Process().children(recursive=True)) - before
            serve.shutdown()
            ray.shutdown()
            _, alive = psutil.wait_procs(family, timeout=10)
            for process in alive:
                process.kill()
            psutil.wait_procs(alive)


def started(context: Any) -> Instance:
    """Serve with every deployment."""
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0},
        "health_check_period_s": 1,
        "graceful_shutdown_timeout_s": 0,
    }
    scaling = {
        "min_replicas": 0,
        "max_replicas": 2,
        "upscale_delay_s": 0,
        "downscale_delay_s": 3600,
        "policy": {"policy_function": "tests.upstream.replicas:as_many_as_reported"},
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    steady = serve.deployment(Worker, name="worker", **options).bind()
    sleeper = serve.deployment(Worker, name="sleeper", autoscaling_config=scaling, **options).bind()
    front = serve.deployment(as_ingress(Front), name="front", **options).bind(worker=steady, sleeper=sleeper)
    mortal = serve.deployment(as_ingress(Front), name="mortal", num_replicas=2, **options).bind()
    doomed = serve.deployment(Worker, name="doomed", **options).bind()
    serve.run_many(
        [
            RunTarget(front, name=APP, route_prefix="/"),
            RunTarget(mortal, name="mortal", route_prefix="/mortal"),
            RunTarget(doomed, name="doomed", route_prefix=None),
        ]
    )
    (node,) = ray.nodes()
    metrics = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    return Instance(f"http://127.0.0.1:{port}", Path(context.address_info["session_dir"]), metrics)


@pytest.fixture(scope="module")
def client(instance: Instance) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=instance.url, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def steady(instance: Instance) -> DeploymentHandle:
    return instance.handle("worker")


def test_the_application_is_built_inside_the_replica(client: httpx.Client) -> None:
    pids = client.get("/pids").json()
    assert pids["builder"] == pids["replica"] != os.getpid()


def test_the_proxy_makes_or_takes_a_request_id_and_every_replica_knows_it(client: httpx.Client) -> None:
    made = client.get("/ids")
    assert made.json() == [made.headers["x-request-id"]] * 2
    taken = client.get("/ids", headers={"x-request-id": "find-me"})
    assert taken.headers.get_list("x-request-id") == ["find-me"]
    assert taken.json() == ["find-me", "find-me"]


def test_an_application_that_sets_the_request_id_doubles_the_header(client: httpx.Client) -> None:
    assert len(client.get("/own-id").headers.get_list("x-request-id")) == 2


def test_a_replica_can_ask_for_the_states_of_its_own_application(client: httpx.Client) -> None:
    """A deployment that starts with no replica (`min_replicas: 0`) is healthy."""
    while not (states := client.get("/states").json())["states"]:  # a busy controller is waited for two seconds
        pass
    assert states == {"healthy": True, "states": dict.fromkeys(("worker", "sleeper", "front"), "HEALTHY")}


def test_serve_shares_its_port_with_whoever_asks_to(instance: Instance) -> None:
    """A second graph would take half of the requests, so the launcher looks whether a port is free first."""
    with socket.socket() as second:
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        second.bind(("127.0.0.1", int(instance.url.rpartition(":")[2])))


def test_a_replicas_process_is_titled_with_its_deployment(steady: DeploymentHandle) -> None:
    ((title, process),) = ray_processes(f"ServeReplica:{APP}:worker")
    assert title == f"ServeReplica:{APP}:worker"
    assert process.pid == steady.pid.remote().result()


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_an_actor_knows_the_share_of_a_gpu_it_was_given(instance: Instance, share: float) -> None:
    actor = ray.remote(ShareHolder).options(num_cpus=0, num_gpus=share).remote()
    assert ray.get(actor.gpu_share.remote()) == share
    assert gpu_share() == 0, "this process is no actor"
    ray.kill(actor)


def test_a_response_handed_on_as_a_keyword_argument_arrives_as_its_result(steady: DeploymentHandle) -> None:
    assert steady.echo.remote(value=steady.pid.remote()).result()[0] == "int"


def test_an_exception_behind_a_response_handed_on_is_a_task_error_with_the_original_as_its_cause(
    steady: DeploymentHandle,
) -> None:
    with pytest.raises(RayTaskError) as raised:
        steady.echo.remote(value=steady.fail.remote()).result()
    assert type(cause_of(raised.value)) is OnPurposeError
    assert not replica_died(raised.value)


def test_cancelling_a_response_raises_cancelled_error_in_the_replica(steady: DeploymentHandle) -> None:
    response = steady.block.remote(name="cancelled")
    steady.begun.remote(name="cancelled").result()
    response.cancel()
    assert steady.ended.remote(name="cancelled").result() == "CancelledError"


def test_a_response_that_waits_for_its_arguments_can_be_cancelled(steady: DeploymentHandle) -> None:
    argument = steady.block.remote(name="argument")
    response = steady.echo.remote(value=argument)
    steady.begun.remote(name="argument").result()
    response.cancel()
    with pytest.raises((RequestCancelledError, asyncio.CancelledError)):
        response.result()
    steady.release.remote(name="argument").result()
    assert argument.result() == "argument", "the argument's own call goes on"


def test_cancelling_a_stream_raises_cancelled_error_in_its_generator(steady: DeploymentHandle) -> None:
    """Not GeneratorExit, as closing a generator does elsewhere."""
    stream = steady.options(stream=True).count.remote(name="stream")
    assert next(stream) == 0
    stream.cancel()
    assert steady.ended.remote(name="stream").result() == "CancelledError"


def test_a_stream_that_is_dropped_goes_on_by_itself(steady: DeploymentHandle) -> None:
    stream = steady.options(stream=True).count.remote(name="dropped")
    assert next(stream) == 0
    del stream
    gc.collect()
    seen = steady.counted.remote(name="dropped").result()
    wait_for(lambda: steady.counted.remote(name="dropped").result() > seen + 20)


def test_an_exception_that_reaches_serve_is_logged_as_a_crash(client: httpx.Client, instance: Instance) -> None:
    assert client.get("/raise").status_code == 500

    def logged() -> bool:
        logs = instance.session.glob(f"logs/serve/replica_{APP}_front_*.log")
        return any(
            re.search(r"ERROR .*Request failed", text) and "OnPurposeError" in text
            for text in map(Path.read_text, logs)
        )

    wait_for(logged)


def test_metrics_are_exported_under_these_names_with_serves_labels(
    steady: DeploymentHandle, instance: Instance
) -> None:
    """`ray_` before every name, `_total` behind a counter's; a histogram's sum is made of its buckets' middles."""
    steady.measure.remote().result()
    expected = {
        "ray_upstream_calls_total": 1.0,
        "ray_upstream_level": 7.0,
        "ray_upstream_seconds_count": 1.0,
        "ray_upstream_seconds_sum": 5.5,  # of one observation of 2, between 1 and 10
    }

    def exported() -> dict[str, float]:
        found = re.findall(r"^(ray_upstream_\w+)\{(.*)\} (\S+)$", httpx.get(instance.metrics_url).text, re.MULTILINE)
        labels = f'application="{APP}"', 'deployment="worker"', 'replica="'
        return {name: float(value) for name, of, value in found if all(label in of for label in labels)}

    wait_for(lambda: exported().keys() >= expected.keys())
    assert {name: value for name, value in exported().items() if name in expected} == expected


def test_a_replica_that_cannot_start_is_said_to_have_failed_to_start(instance: Instance) -> None:
    broken = serve.deployment(Worker, name="broken", ray_actor_options={"num_cpus": 0}).bind("an unknown argument")
    serve.run_many([RunTarget(broken, name="broken", route_prefix=None)], wait_for_applications_running=False)

    def failing() -> bool:
        status = serve.status().applications["broken"].deployments["broken"]
        return FAILED_TO_START in status.message and status.status.value not in SERVING_STATES

    wait_for(failing)
    serve.delete("broken", _blocking=False)


def test_a_call_wakes_a_sleeping_deployment_and_its_replica_reports_to_the_policy(client: httpx.Client) -> None:
    """`record_autoscaling_stats` -> `raw_metrics`: the policy asks for the two replicas that the first one reports."""

    def replicas() -> int:
        return sum(serve.status().applications[APP].deployments["sleeper"].replica_states.values())

    assert replicas() == 0
    assert client.get("/wake").json() != os.getpid()
    wait_for(lambda: replicas() == 2)


def test_a_call_whose_argument_died_raises_a_serve_exception_caused_by_the_death(
    steady: DeploymentHandle, instance: Instance
) -> None:
    doomed = serve.get_app_handle("doomed")
    argument = doomed.block.remote(name="never")
    response = steady.echo.remote(value=argument)
    doomed.begun.remote(name="never").result()
    psutil.Process(doomed.pid.remote().result()).kill()
    with pytest.raises(RayServeException) as raised:
        response.result()
    assert isinstance(raised.value.__cause__, ActorDiedError)
    assert replica_died(raised.value)


def test_the_proxy_sends_nothing_when_an_ingress_dies_and_uvicorn_makes_that_a_plain_error(
    client: httpx.Client,
) -> None:
    reply = client.get("/mortal/die", headers={"x-record": "death"})
    assert (reply.status_code, reply.text) == (500, "Internal Server Error")
    assert reply.headers["content-type"].startswith(PROXY_ERROR_TYPE)
    assert client.get("/sent/death").json() == ["end"]


def test_the_proxy_may_have_sent_headers_before_an_ingress_dies(client: httpx.Client) -> None:
    def sent() -> list[str]:
        recorded: list[str] = client.get("/sent/late death").json()
        return recorded

    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(client.get, "/mortal/headers-then-nothing", headers={"x-record": "late death"})
        wait_for(lambda: sent() == ["http.response.start"])
        for _, process in ray_processes("ServeReplica:mortal:mortal"):
            process.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            reply.result()
    assert sent() == ["http.response.start", "end"]
