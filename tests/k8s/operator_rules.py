"""What KubeRay 1.7 enforces at run time, or does in silence, that no schema holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version

from tests.support.manifests import Document, environment, groups, quantity

REFUSED_VARIABLES = {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "RAY_enable_autoscaler_v2"}
RAY_CLIENT = 10001


def operator_rules(service: Document) -> Iterator[str]:
    """Complaints about a RayService."""
    spec, cluster = service["spec"], service["spec"]["rayClusterConfig"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", service["metadata"]["name"]):
        yield "name: at most 47 characters of a DNS label"
    if cluster["rayVersion"] != version("ray"):
        yield f"rayVersion {cluster['rayVersion']} is not the tested {version('ray')}"
    if cluster["autoscalerOptions"]["version"] != "v2":
        yield "autoscalerOptions.version: v2"
    if "/tmp" not in [mount["mountPath"] for mount in cluster["autoscalerOptions"].get("volumeMounts", [])]:
        yield "autoscaler: /tmp must be writable"
    if {"serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold"} & spec.keys():
        yield "deprecated thresholds"
    if "enableK8sTokenAuth" in cluster.get("authOptions", {}) or cluster["authOptions"].get("mode") != "token":
        yield "authOptions.mode must be token"
    if "upgradeStrategy" in cluster:
        yield "rayClusterConfig.upgradeStrategy must be unset"
    upgrade = spec.get("upgradeStrategy", {})
    if upgrade.get("type") == "NewClusterWithIncrementalUpgrade":
        options = upgrade["clusterUpgradeOptions"]
        if not 0 <= options["stepSizePercent"] <= options["maxSurgePercent"] <= 100 or options["intervalSeconds"] <= 0:
            yield "clusterUpgradeOptions: 0 <= stepSizePercent <= maxSurgePercent <= 100, intervalSeconds > 0"
        if not options.get("gatewayClassName"):
            yield "clusterUpgradeOptions.gatewayClassName is empty"
        if "initial_replicas" in spec["serveConfigV2"]:
            yield "initial_replicas becomes a floor after an incremental upgrade"
    if "ray.io/initializing-timeout" in service["metadata"].get("annotations", {}):
        yield "initializing-timeout deletes the cluster for good"
    for name, group in groups(service):
        start = group["rayStartParams"]
        if "resources" in group and {"num-cpus", "num-gpus", "memory", "resources"} & start.keys():
            yield f"{name}: resources and rayStartParams are both set"
        if "labels" in start:
            yield f"{name}: rayStartParams.labels is refused"
        if any(not isinstance(value, str) for value in start.values()):
            yield f"{name}: rayStartParams are strings"
        if name != "head" and not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{name}: minReplicas <= replicas <= maxReplicas"
        if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy must be unset or Never"
        pod = group["template"]["spec"]
        if refused := environment(pod).keys() & REFUSED_VARIABLES:
            yield f"{name}: {sorted(refused)} must not be set"
        yield from _object_store(name, start, pod)
    yield from _head(cluster["headGroupSpec"]["template"]["spec"]["containers"][0])


def _object_store(name: str, start: Document, pod: Document) -> Iterator[str]:
    """Where /dev/shm is too small for what Ray wants, it warns and takes a file on the node's disk."""
    (shm,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
    if float(start.get("object-store-memory", "inf")) > 0.9 * quantity(shm["sizeLimit"]):
        yield f"{name}: object-store-memory must be set, to at most nine tenths of /dev/shm"


def _head(container: Document) -> Iterator[str]:
    if quantity(container["resources"]["limits"]["cpu"]) < 2:
        yield "head: below 2 CPUs it misses Ray's own 30 s for its parts to report, and dies"
    if any(port["containerPort"] == RAY_CLIENT for port in container["ports"]):
        yield "head: nobody uses Ray Client, whose port runs code"
