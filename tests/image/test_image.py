"""The image in two pods of the dev-cpu overlay, each in a network namespace, started and probed as KubeRay does it.

What is not here: KubeRay itself, its autoscaler's sidecar, a CNI, a node's image store. k8s/README.md says so.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
import yaml

from config.catalog import ROOT
from tests.image.building import build, buildah
from tests.image.containers import Container, container, enter, network, root_of
from tests.image.machine import why_not
from tests.support.http import picture
from tests.support.manifests import Document, documents, groups, quantity, ray_service

T = TypeVar("T")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),  # the first build fetches every package
]
CLIENT, HEAD, WORKER = "10.77.0.254", "10.77.0.1", "10.77.0.2"
ADDRESSES = {"client": CLIENT, "head": HEAD, "worker": WORKER}
STARTS = 5
DASHBOARD = f"http://{HEAD}:8265"
PICTURES = f"http://{WORKER}:8000/v1/image/generation"
REQUEST = {"model_name": "SD1.5", "prompt": "a cat on a gold background", "width": 256, "height": 256, "steps": 4}
READY = (
    "wget --tries 1 -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success && "
    "wget --tries 1 -T 10 -q -O- http://localhost:8000/-/healthz | grep success"
)
"""KubeRay's readiness probe of workers."""


@dataclass(frozen=True)
class Pods:
    """A head and a worker that run."""

    head: Container
    worker: Container
    token: str
    key: str
    threads: ThreadPoolExecutor
    """Threads in a network namespace of their own, from which the pods are reachable."""

    def ask(self, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call from a client's place in the network."""
        return self.threads.submit(call, *arguments, **options).result()

    def draw(self, **fields: Any) -> httpx.Response:
        """The reply to a small request with a key."""
        return self.ask(self.post, fields)

    def post(self, fields: dict[str, Any]) -> httpx.Response:
        """The same, in a thread of `threads`."""
        return httpx.post(PICTURES, json=REQUEST | fields, headers=bearer(self.key), timeout=300)

    def watch(self, fields: dict[str, Any], began: threading.Event) -> str:
        """The last event of a watched request; tells of the first one."""
        body = REQUEST | fields | {"stream": True}
        last = ""
        with httpx.stream("POST", PICTURES, json=body, headers=bearer(self.key), timeout=300) as reply:
            for line in reply.iter_lines():
                if line.startswith("event: "):
                    last = line
                    began.set()
        return last

    def configure(self, config: dict[str, Any]) -> bool:
        """What the operator does with a RayService's Serve config, until it succeeds."""
        url = f"{DASHBOARD}/api/serve/applications/"
        try:
            reply = self.ask(httpx.put, url, json=config, headers=bearer(self.token), timeout=120)
        except httpx.TransportError:
            return False
        assert reply.status_code < 500 or reply.status_code == 503, reply.text
        return bool(reply.is_success)


def bearer(secret: str) -> dict[str, str]:
    """The header that carries a key or a token."""
    return {"authorization": f"Bearer {secret}"}


def ray_start(group: Document, address: str | None) -> list[str]:
    """The container's command as KubeRay makes it of a group: `ray start` of a head, or of a worker of `address`."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    options = {"block": "", "dashboard-agent-listen-port": "52365", "metrics-export-port": "8080"}
    options |= {"memory": str(int(quantity(limits["memory"]))), "num-cpus": limits["cpu"]}
    options |= {"head": "", "no-monitor": ""} if address is None else {"address": f"{address}:6379"}
    options |= group["rayStartParams"]
    if labels := group.get("labels"):
        options["labels"] = ",".join(f"{name}={value}" for name, value in labels.items())
    flags = " ".join(f"--{name}={value}" if value else f"--{name}" for name, value in sorted(options.items()))
    return ["/bin/bash", "-c", "--", f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start {flags}"]


def ray_environment(token: str, kind: str) -> dict[str, str]:
    """Variables that KubeRay adds."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ADDRESS": f"{HEAD if kind == 'worker' else '127.0.0.1'}:6379",
        "RAY_IP": HEAD,
        "FQ_RAY_IP": HEAD,
        "RAY_PORT": "6379",
        "RAY_CLUSTER_NAME": "sdgraph",
        "RAY_CLOUD_INSTANCE_ID": kind,
        "RAY_NODE_TYPE_NAME": f"{kind}-group",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_SERVE_KV_TIMEOUT_S": "5",
        "RAY_gcs_server_request_timeout_seconds": "5",
        "RAY_timeout_ms_task_wait_for_death_info": "0",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
    }


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    """Both run and are joined, and Serve has the overlay's config from the dashboard."""
    folder = tmp_path_factory.mktemp("image")
    if reason := why_not(folder / "trial"):
        pytest.skip(reason)
    name = build(ROOT / "build" / "image")
    configuration = json.loads(buildah("inspect", "--type=image", name))["OCIv1"]["config"]
    service = ray_service(documents("dev-cpu"))
    of = dict(groups(service))
    token, key = secrets.token_hex(32), secrets.token_hex(32)
    keys = folder / "keys"
    keys.mkdir()
    (keys / "api-keys").write_text(f"tester {hashlib.sha256(key.encode()).hexdigest()}\n")
    with ExitStack() as stack:
        spaces = stack.enter_context(network(ADDRESSES))
        threads = ThreadPoolExecutor(4, initializer=enter, initargs=(spaces["client"],))
        stack.callback(threads.shutdown)
        files = stack.enter_context(root_of(name))

        def start(kind: str, group: Document, address: str | None) -> Container:
            """A container that came up: Ray gives its parts 30 s, KubeRay replaces a pod for which that was short."""
            command, variables = ray_start(group, address), ray_environment(token, kind)
            pod, image = group["template"]["spec"], (files, configuration)
            for number in range(STARTS):
                one = stack.enter_context(
                    container(
                        f"{kind}-{number}",
                        image,
                        pod,
                        spaces[kind],
                        ADDRESSES[kind],
                        folder,
                        command,
                        variables,
                        {"api-keys": keys},
                    )
                )
                while one.process.poll() is None:
                    if threads.submit(healthy, ADDRESSES[kind]).result():
                        return one
                    time.sleep(0.5)
            raise AssertionError(f"{kind}: {STARTS} containers ended: {one.printed()[-4000:]}")

        head = start("head", of["head"], None)  # KubeRay's init container of workers waits for it
        worker = start("worker", of["cpu"], HEAD)
        made = Pods(head, worker, token, key, threads)
        until(lambda: made.configure(yaml.safe_load(service["spec"]["serveConfigV2"])), head, worker)
        until(lambda: worker.execute("bash", "-c", READY).returncode == 0, head, worker)
        until(lambda: made.ask(httpx.get, f"http://{WORKER}:8000/readyz").status_code == 200, head, worker)
        yield made


def healthy(address: str) -> bool:
    """KubeRay's start-up and liveness probe."""
    try:
        return httpx.get(f"http://{address}:52365/api/healthz", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def until(happened: Callable[[], bool], *alive: Container) -> None:
    """Returns when it has happened; fails when one of these containers ends before."""
    while not happened():
        for one in alive:
            assert one.process.poll() is None, f"{one.name} ended: {one.printed()[-4000:]}"
        time.sleep(0.5)


def test_a_key_draws(pods: Pods) -> None:
    pictures = [picture(pods.draw(seed=4, output_format="png")) for _ in range(2)]
    assert pictures[0].size == (256, 256)
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(pictures[1]))


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}])
def test_who_has_no_key_is_refused(pods: Pods, headers: dict[str, str]) -> None:
    reply = pods.ask(httpx.post, PICTURES, json=REQUEST, headers=headers)
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == "Bearer"


def test_ray_wants_the_token(pods: Pods) -> None:
    assert pods.ask(httpx.get, f"{DASHBOARD}/api/serve/applications/").status_code == 401
    refused = pods.head.execute("env", "RAY_AUTH_TOKEN=wrong", "ray", "status")
    assert refused.returncode != 0
    assert pods.head.execute("ray", "status").returncode == 0


def test_pods_are_confined(pods: Pods) -> None:
    for pod in (pods.head, pods.worker):
        status = dict(line.split(":", 1) for line in pod.execute("cat", "/proc/1/status").stdout.splitlines())
        said = {name: status[name].split()[0] for name in ("Uid", "Gid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")}
        nothing = "0" * 16
        assert said == {
            "Uid": "1000",
            "Gid": "1000",
            "CapEff": nothing,
            "CapBnd": nothing,
            "NoNewPrivs": "1",
            "Seccomp": "2",
        }
        assert writable(pod) == {"/tmp", "/dev/shm"}


def writable(pod: Container) -> set[str]:
    """Where the pod's user could write a file, of all mounts but those of the kernel."""
    mounts = [line.split()[4] for line in pod.execute("cat", "/proc/self/mountinfo").stdout.splitlines()]
    folders = [mount for mount in mounts if not mount.startswith(("/proc", "/sys", "/dev/pts", "/dev/mqueue"))]
    folders += ["/opt/sdgraph", "/opt/venv", "/home/sdgraph", "/var/tmp", "/run"]
    script = 'for f; do test -d "$f" && touch "$f/.probe" 2>/dev/null && rm "$f/.probe" && echo "$f"; done; true'
    return set(pod.execute("bash", "-c", script, "bash", *folders).stdout.split())


def test_nothing_wanted_to_write_elsewhere(pods: Pods) -> None:
    for pod in (pods.head, pods.worker):
        assert "Read-only file system" not in pod.printed()
        assert pod.execute("bash", "-c", "grep -rl 'Read-only file system' /tmp/ray").stdout == ""


def test_there_is_no_compiler(pods: Pods) -> None:
    for compiler in ("cc", "gcc", "g++", "clang", "as", "ld"):
        assert pods.worker.execute("bash", "-c", f"command -v {compiler}").returncode != 0


def test_log_lines_are_what_kubectl_logs_shows(pods: Pods) -> None:
    request_id = pods.draw().headers["x-request-id"]

    def said() -> set[str]:
        lines = [
            line[line.index("{") :] for line in pods.worker.printed().splitlines() if request_id in line and "{" in line
        ]
        return {json.loads(line)["logger"] for line in lines}

    until(lambda: {"deployments.api.access_log", "deployments.telemetry.stages"} <= said(), pods.worker)


def test_no_secret_is_in_the_logs(pods: Pods) -> None:
    pods.draw()
    for pod in (pods.head, pods.worker):
        for secret in (pods.key, pods.token):
            assert secret not in pod.printed()
            assert pod.execute("grep", "-rlF", secret, "/tmp").stdout == ""


def test_a_drained_worker_finishes_its_pictures(pods: Pods) -> None:
    """The kubelet's SIGTERM, with one picture awaited and one watched under way; the proxy says that it leaves."""
    spec = dict(groups(ray_service(documents("dev-cpu"))))["cpu"]["template"]["spec"]
    assert "lifecycle" not in spec["containers"][0], "this test would have to run it"
    began = threading.Event()
    long = {"width": 512, "height": 512, "steps": 60}
    awaited = pods.threads.submit(pods.post, long)
    watched = pods.threads.submit(pods.watch, long, began)
    assert began.wait(300)
    pods.worker.kill(signal.SIGTERM)
    until(lambda: pods.ask(httpx.get, f"http://{WORKER}:8000/-/healthz").status_code == 503, pods.worker)
    assert picture(awaited.result()).size == (512, 512)
    assert watched.result() == "event: result"


def test_a_head_ends_by_itself(pods: Pods) -> None:
    pods.head.kill(signal.SIGTERM)
    pods.head.process.wait()
