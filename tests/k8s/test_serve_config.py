"""Serve configs are strict; the production one is what the RayService carries, and small enough for its groups."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.catalog import ROOT
from config.settings import Settings
from deployments.app import AppArgs
from deployments.strict_config import problems
from tests.support.bound import deployment_names
from tests.support.manifests import documents, groups, ray_service

SERVE_CONFIG = ROOT / "serve_config.yaml"
DEADLINE_S = Settings().deadline_s
DEFAULT_CPUS = 0  # app.py's default for deployments that a config does not tune


@pytest.mark.parametrize(
    "path", [SERVE_CONFIG, *sorted((ROOT / "config").glob("serve.*.yaml"))], ids=lambda path: path.name
)
def test_the_config_is_strictly_valid(path: Path) -> None:
    assert list(problems(yaml.safe_load(path.read_text()))) == []


MUTANTS: list[tuple[list[Any], Any, str]] = [
    (["http_option"], {}, "$.http_option is no field"),
    (["applications", 0, "import_pth"], "x", "import_pth is no field"),
    (["applications", 0, "deployments", 0, "max_ongoing_request"], 1, "max_ongoing_request is no field"),
    (["applications", 0, "deployments", 0, "ray_actor_options", "num_gpu"], 1, "num_gpu is no field"),
    (
        ["applications", 0, "deployments", 0, "autoscaling_config", "min_replica"],
        1,
        "min_replica is no",
    ),
    (["applications", 0, "deployments", 0, "autoscaling_config", "min_replicas"], 99, "ingress:"),
    (["applications", 0, "deployments", 0, "autoscaling_config", "max_replicas"], "4x", "ingress:"),
    (["applications", 0, "deployments", 1, "ray_actor_options", "num_gpus"], 1.5, "must be whole above 1"),
    (["applications", 0, "deployments", 1, "ray_actor_options", "num_gpus"], -1, "num_gpus"),
    (["applications", 0, "import_path"], "nowhere", "import_path"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), MUTANTS)
def test_the_checker_is_alive(path: list[Any], value: Any, complaint: str) -> None:
    config = copy.deepcopy(yaml.safe_load(SERVE_CONFIG.read_text()))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert any(complaint in problem for problem in problems(config)), list(problems(config))


@pytest.mark.parametrize("overlay", ["prod", "staging"])
def test_the_ray_service_carries_it_byte_for_byte(overlay: str) -> None:
    assert (ROOT / "k8s" / "base" / "serve_config.yaml").read_bytes() == SERVE_CONFIG.read_bytes(), "run `make k8s`"
    assert ray_service(documents(overlay))["spec"]["serveConfigV2"] == SERVE_CONFIG.read_text()


@pytest.mark.parametrize("overlay", ["prod", "dev-cpu"])
def test_it_tunes_every_deployment_of_the_graph(overlay: str) -> None:
    config = yaml.safe_load(ray_service(documents(overlay))["spec"]["serveConfigV2"])
    assert list(problems(config)) == []
    (application,) = config["applications"]
    names = deployment_names(AppArgs.model_validate(application["args"]))
    assert {d["name"] for d in application["deployments"]} == names


@pytest.mark.parametrize("overlay", ["prod", "staging", "dev-cpu"])
def test_every_deployment_fits_a_group_even_at_its_most(overlay: str) -> None:
    service = ray_service(documents(overlay))
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    room: dict[str, dict[str, float]] = {}
    pod: dict[str, dict[str, float]] = {}
    for name, group in groups(service):
        if name != "head":
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            role = group["labels"]["sdgraph/role"]
            pod[role] = {"cpus": float(limits["cpu"]), "gpus": float(limits.get("nvidia.com/gpu", 0))}
            room[role] = {what: share * group["maxReplicas"] for what, share in pod[role].items()}
    for deployment in application["deployments"]:
        options = deployment["ray_actor_options"]
        role = options["label_selector"]["sdgraph/role"]
        need = {"cpus": options.get("num_cpus", DEFAULT_CPUS), "gpus": options.get("num_gpus", 0)}
        most = (deployment.get("autoscaling_config") or {}).get("max_replicas", 1)
        for what, share in need.items():
            assert share <= pod[role][what], f"{deployment['name']} fits no pod of group {role}"
            room[role][what] -= share * most
    assert all(left >= -1e-9 for shares in room.values() for left in shares.values()), room


def test_everything_is_bounded_and_rare_components_go_to_zero() -> None:
    (application,) = yaml.safe_load(SERVE_CONFIG.read_text())["applications"]
    for deployment in application["deployments"]:
        assert deployment["max_ongoing_requests"] > 0
        assert deployment["max_queued_requests"] > 0
        assert deployment["graceful_shutdown_timeout_s"] > DEADLINE_S, "a picture under way is finished first"
        assert deployment["autoscaling_config"]["max_replicas"] >= 2
    idle = {d["name"] for d in application["deployments"] if d["autoscaling_config"]["min_replicas"] == 0}
    assert {"refiner-sdxl", "unet-sd15-torch", "unet-sd2-torch"} <= idle
    assert "ingress" not in idle
    by_work = {d["name"] for d in application["deployments"] if "policy" in d["autoscaling_config"]}
    assert by_work == {d["name"] for d in application["deployments"] if d["name"].startswith(("unet-", "refiner-"))}


@pytest.mark.parametrize("path", ["serve_config.yaml", "config/serve.gpu.yaml", "k8s/base/serve_config.yaml"])
def test_configs_that_ask_for_gpus_keep_controlnets_beside_their_unet(path: str) -> None:
    """Their residuals are 54 MB a row and tick for SDXL, and leave the card only where processes differ."""
    text = (ROOT / path).read_text()
    assert "num_gpus" in text
    (application,) = yaml.safe_load(text)["applications"]
    assert application["args"]["controlnet_placement"] == "colocated"
    assert not any(deployment["name"].startswith("controlnet") for deployment in application["deployments"])
    assert "# ControlNets run in the UNet's process" in text, "and say why"
