"""serve_config.yaml on a Ray cluster of this machine with 16 cards that do not exist, weights replaced by tiny ones.

Accepted as it is, placed as declared, idle deployments go to sleep and wake, a lost node costs no picture. What one
machine cannot have is changed: one proxy instead of one a node, loopback, and delays of seconds instead of minutes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from config.catalog import ROOT
from deployments.launcher import DEFAULTS, ENVIRONMENT, running_graph
from tests.support import hub_cache
from tests.support.http import check, encoded, photo, picture, pixels
from tests.support.live import wait_for

pytestmark = pytest.mark.slow

PORT = 8124
SERVE_CONFIG = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
DECLARED = {d["name"]: d for d in SERVE_CONFIG["applications"][0]["deployments"]}
SLEEPERS = {name for name, d in DECLARED.items() if d["autoscaling_config"]["min_replicas"] == 0}


def for_one_machine() -> dict[str, Any]:
    config = copy.deepcopy(SERVE_CONFIG)
    config["proxy_location"] = "HeadOnly"
    config["http_options"] |= {"host": "127.0.0.1", "port": PORT}
    for deployment in config["applications"][0]["deployments"]:
        scaling = deployment["autoscaling_config"]
        for delay in ("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s"):
            if delay in scaling:
                scaling[delay] = 5
    return config


@dataclass
class Cluster:
    """A cluster in a process of its own, which does what it is told line by line (`tests/cluster/machines.py`)."""

    process: subprocess.Popen[str]
    address: str

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def replicas(self) -> list[dict[str, Any]]:
        """Of every replica that runs: deployment, the label of its node, the resources it holds."""
        found: list[dict[str, Any]] = self.ask(do="replicas")
        return found

    def running(self) -> set[str]:
        return {replica["deployment"] for replica in self.replicas()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def cluster(folder: Path, tiny_models: Path) -> Iterator[Cluster]:
    """Replicas have the environment of their node's processes, as in pods."""
    keys = folder / "api-keys"
    keys.write_text(f"tests {hashlib.sha256(b'secret').hexdigest()}\n")
    environment = {
        "HF_HOME": str(hub_cache.fill(folder / "hf", tiny_models)),
        "HF_HUB_OFFLINE": "1",
        "SDGRAPH_API_KEYS_FILE": str(keys),
        "SDGRAPH_RATE_LIMIT": "",
    }
    with (folder / "cluster.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.machines"],
            cwd=ROOT,
            env={**DEFAULTS, **os.environ, **ENVIRONMENT, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    try:
        yield Cluster(process, json.loads(process.stdout.readline())["address"])
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


@pytest.fixture(scope="module")
def client(cluster: Cluster, folder: Path) -> Iterator[httpx.Client]:
    config, log = folder / "serve_config.yaml", folder / "graph.log"
    config.write_text(yaml.safe_dump(for_one_machine()))
    try:
        with (
            running_graph(
                config,
                PORT,
                {"RAY_ADDRESS": cluster.address, "SDGRAPH_TVM_PRECISION": "float32"},
                timeout_s=500,
                log=log,
            ) as url,
            httpx.Client(base_url=url, timeout=200, headers={"authorization": "Bearer secret"}) as opened,
        ):
            yield opened
    finally:
        print(log.read_text()[-5000:])


def draw(client: httpx.Client, prefix: str = "", **changes: Any) -> np.ndarray:
    body = {"model_name": "SD1.5", "prompt": "a lighthouse", "width": 128, "height": 128, "steps": 4, "seed": 1}
    reply = client.post(f"{prefix}/v1/image/generation", json=body | {"output_format": "png"} | changes)
    return pixels(picture(reply))


def test_it_is_accepted_and_every_deployment_lies_where_it_was_declared(client: httpx.Client, cluster: Cluster) -> None:
    """Labels of nodes, CPUs and shares of cards, of each as it wakes."""
    seen: dict[str, dict[str, Any]] = {}

    def all_seen() -> bool:
        seen.update({replica["deployment"]: replica for replica in cluster.replicas()})
        return seen.keys() == DECLARED.keys()

    with ThreadPoolExecutor(1) as pool:
        woken = pool.submit(wake, client)
        wait_for(all_seen)
        woken.result()
    for name, replica in seen.items():
        options = DECLARED[name]["ray_actor_options"]
        assert replica["role"] == options["label_selector"]["sdgraph/role"], name
        assert replica["resources"].get("CPU", 0) == options["num_cpus"], name
        assert replica["resources"].get("GPU", 0) == options.get("num_gpus", 0), name


def wake(client: httpx.Client) -> None:
    """One request for each model, all at once: each waits for what it needs to start."""
    control = {"controlnet_name": "canny", "controlnet_image": encoded(photo(200, 200))}
    requests: list[dict[str, Any]] = [
        {"model_name": "SD1.5"},
        {"model_name": "SD2"},
        {"model_name": "SSD"},
        {"model_name": "SDXL-turbo"},
        {"model_name": "SDXL1.0-base", "enable_refiner": True, "steps": 10},
        {"model_name": "SD1.5-ControlNet"} | control,
        {"model_name": "SDXL-ControlNet"} | control,
    ]
    with ThreadPoolExecutor(len(requests)) as pool:
        list(pool.map(lambda fields: draw(client, **fields), requests))


def test_idle_deployments_go_to_sleep_and_wake(client: httpx.Client, cluster: Cluster) -> None:
    first = draw(client)
    wait_for(lambda: not cluster.running() & SLEEPERS)
    assert cluster.running() == DECLARED.keys() - SLEEPERS
    wait_for(lambda: client.get("/readyz").status_code == 200)  # asleep is ready
    again = draw_awaking(client, cluster, {"unet-sd15-torch", "text-encoder-sd15", "vae-sd15"})
    assert np.abs(first - again).max() <= 1


def draw_awaking(client: httpx.Client, cluster: Cluster, names: set[str]) -> np.ndarray:
    """A picture for which each of these deployments wakes up.

    They are watched meanwhile: the first may sleep again before the last has woken.
    """
    seen: set[str] = set()

    def all_seen() -> bool:
        seen.update(cluster.running())
        return seen >= names

    with ThreadPoolExecutor(1) as pool:
        drawn = pool.submit(draw, client)
        wait_for(all_seen)
        return drawn.result()


def test_an_update_and_a_scale_down_drain(client: httpx.Client, cluster: Cluster) -> None:
    """Replicas of SDXL's UNet are replaced, doubled and halved under load: no request notices."""
    body = {"model_name": "SDXL1.0-base", "steps": 30, "sampler": "Euler"}
    expected = [draw(client, **body, seed=seed) for seed in range(4)]
    stop = threading.Event()
    pictures: list[tuple[int, np.ndarray]] = []

    def keep_drawing(seed: int) -> None:
        while not stop.is_set():
            pictures.append((seed, draw(client, **body, seed=seed)))

    def deploy(**changes: Any) -> None:
        config = for_one_machine()
        (unet,) = (d for d in config["applications"][0]["deployments"] if d["name"] == "unet-sdxl-base-torch")
        unet["ray_actor_options"]["num_cpus"] = 3
        unet["autoscaling_config"] |= changes
        assert cluster.ask(do="deploy", config=config) == "accepted"

    def unets() -> list[dict[str, Any]]:
        return [r for r in cluster.replicas() if r["deployment"] == "unet-sdxl-base-torch"]

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(keep_drawing, seed) for seed in range(4)]
        try:
            deploy(max_replicas=1)
            wait_for(lambda: [r["resources"]["CPU"] for r in unets()] == [3])
            deploy(min_replicas=2, max_replicas=2)
            wait_for(lambda: len(unets()) == 2)
            deploy(max_replicas=1)
            wait_for(lambda: len(unets()) == 1)
        finally:
            stop.set()
        for future in futures:
            future.result()
    assert len(pictures) >= 8
    for seed, drawn in pictures:
        assert np.abs(expected[seed] - drawn).max() <= 1


def test_missing_weights_affect_only_requests_that_need_them(
    client: httpx.Client, cluster: Cluster, folder: Path
) -> None:
    """A second graph starts without SD2: readiness says why, its requests are told, the rest serves; then it comes."""
    (weights,) = (folder / "hf" / "hub").glob("models--*stable-diffusion-2")
    away = weights.rename(weights.with_name("away"))
    config = for_one_machine()
    args = {"catalog": "hub", "models": ["SD1.5", "SD2"]}
    late = {"name": "late", "route_prefix": "/late", "import_path": "deployments.app:build_app", "args": args}
    config["applications"].append(late)
    assert cluster.ask(do="deploy", config=config) == "accepted"

    def states() -> dict[str, str]:
        reply = client.get("/late/readyz")
        return reply.json()["deployments"] if reply.status_code == 503 and "object" not in reply.json() else {}

    wait_for(lambda: "component unet-sd2" in states().get("unet-sd2-torch", ""))
    assert "stable-diffusion-2" in states()["unet-sd2-torch"]
    wait_for(lambda: states().get("vae-sd15", "").startswith("HEALTHY"))
    draw(client, "/late")
    body = {"model_name": "SD2", "prompt": "a lighthouse", "width": 128, "height": 128, "steps": 4}
    reply = client.post("/late/v1/image/generation", json=body)  # the client's patience ends long before the deadline
    assert re.search("'(unet|vae|text-encoder)-sd2", check(reply, 503, 42903, None))
    assert int(reply.headers["retry-after"]) > 0
    away.rename(weights)
    wait_for(lambda: client.get("/late/readyz").status_code == 200)
    assert client.post("/late/v1/image/generation", json=body).status_code == 200
    assert cluster.ask(do="deploy", config=for_one_machine()) == "accepted"


def test_a_lost_node_costs_no_picture(client: httpx.Client, cluster: Cluster) -> None:
    """The node of SDXL's UNet goes, with all that ran there; pictures under way are drawn elsewhere."""
    bodies = [{"model_name": "SDXL1.0-base", "seed": seed, "steps": 12} for seed in range(8)]
    expected = [draw(client, **body) for body in bodies]
    (unet,) = (r for r in cluster.replicas() if r["deployment"] == "unet-sdxl-base-torch")
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(draw, client, **body) for body in bodies * 3]
        wait(futures, return_when=FIRST_COMPLETED)
        assert cluster.ask(do="lose", node=unet["node"]) == "lost"
        pictures = [future.result() for future in futures]
    for before, after in zip(expected * 3, pictures, strict=True):
        assert np.abs(before - after).max() <= 1
    (moved,) = (r for r in cluster.replicas() if r["deployment"] == "unet-sdxl-base-torch")
    assert moved["node"] != unet["node"]
    assert moved["role"] == "large"
