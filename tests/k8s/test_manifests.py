"""k8s/: every overlay renders, fits the schemas, keeps the operator's rules, opens no door it should not."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.catalog import ROOT
from tests.k8s import schema
from tests.k8s.conftest import OVERLAYS, Document, documents, groups, pods, ray_service, rendered

MUTANTS = sorted((Path(__file__).parent / "mutants").glob("*.yaml"))
SECRETS_FROM_OUTSIDE = {"ray-auth-token", "sdgraph-api-keys", "sdgraph-redis", "sdgraph-hf-token"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_renders_to_the_same_bytes_twice(overlay: str) -> None:
    again = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "k8s" / "overlays" / overlay)], check=True, capture_output=True, text=True
    )
    assert again.stdout == rendered(overlay)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_document_fits_its_schema(overlay: str) -> None:
    found = {f"{d['kind']} {d['metadata']['name']}": list(schema.errors(d)) for d in documents(overlay)}
    assert len(found) > 8
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda p: p.stem)
def test_the_checker_is_alive(mutant: Path) -> None:
    """A mutant changes one thing in prod's manifests; its first line says what the checks must say."""
    wanted = mutant.read_text().splitlines()[0].removeprefix("# ")
    change = yaml.safe_load(mutant.read_text())
    docs = documents("prod")
    target = next(d for d in docs if d["kind"] == change["kind"] and d["metadata"]["name"] == change["name"])
    *path, last = change["path"]
    inner: Any = target
    for key in path:
        inner = inner[key]
    if "value" in change:
        inner[last] = change["value"]
    else:
        del inner[last]
    complaints = [*schema.errors(target), *complaints_of(docs)]
    assert any(wanted in complaint for complaint in complaints), complaints


def complaints_of(docs: list[Document]) -> Iterator[str]:
    """What the operator, the autoscaler or a careful reader would object to, that no schema holds."""
    yield from _operator_rules(ray_service(docs))
    for name, pod in pods(docs):
        yield from _hardening(name, pod)
    yield from _references(docs)


def _operator_rules(service: Document) -> Iterator[str]:
    spec, cluster = service["spec"], service["spec"]["rayClusterConfig"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", service["metadata"]["name"]):
        yield "name: at most 47 characters of a DNS label"
    if cluster["rayVersion"] != version("ray"):
        yield f"rayVersion {cluster['rayVersion']} is not the tested {version('ray')}"
    if cluster["autoscalerOptions"]["version"] != "v2":
        yield "autoscalerOptions.version: v2"
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
        environment = {entry["name"] for entry in group["template"]["spec"]["containers"][0].get("env", [])}
        if refused := environment & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "RAY_enable_autoscaler_v2"}:
            yield f"{name}: {sorted(refused)} must not be set"


def _hardening(name: str, pod: Document) -> Iterator[str]:
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield f"{name}: must run as a user other than root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{name}: seccomp RuntimeDefault"
    if name != "head" and pod.get("automountServiceAccountToken") is not False:
        yield f"{name}: must not mount a service account's token"
    for container in pod["containers"]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
            yield f"{name}: privileges must be dropped"
        if container["resources"].get("limits") != container["resources"].get("requests"):
            yield f"{name}: requests must equal limits"
        if not re.search(r"@sha256:[0-9a-f]{64}$", container["image"]):
            yield f"{name}: image {container['image']} is not pinned by digest"
    for volume in pod.get("volumes", []):
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"{name}: emptyDir {volume['name']} has no sizeLimit"


def _references(docs: list[Document]) -> Iterator[str]:
    here = {(d["kind"], d["metadata"]["name"]) for d in docs}
    for name, pod in pods(docs):
        mounted = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in mounted:
                    yield f"{name}: no volume {mount['name']}"
        if (account := pod.get("serviceAccountName")) and ("ServiceAccount", account) not in here:
            yield f"{name}: no ServiceAccount {account}"
        for volume in pod.get("volumes", []):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("PersistentVolumeClaim", claim) not in here:
                yield f"{name}: no PersistentVolumeClaim {claim}"
    for secret in _secret_names(docs):
        if secret not in SECRETS_FROM_OUTSIDE:
            yield f"Secret {secret} is not declared external"
    if any(kind == "Secret" for kind, _ in here):
        yield "a Secret's data lies in the manifests"
    ports = {
        kind: {
            port["name"]
            for name, g in groups(ray_service(docs))
            if (name == "head") == (kind == "head")
            for port in g["template"]["spec"]["containers"][0]["ports"]
        }
        for kind in ("head", "worker")
    }
    for monitor in (d for d in docs if d["kind"] == "PodMonitor"):
        node = monitor["spec"]["selector"]["matchLabels"]["ray.io/node-type"]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] not in ports[node]:
                yield f"PodMonitor {monitor['metadata']['name']}: no port {endpoint['port']} on {node} pods"


def _secret_names(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "secretName":
                yield value
            elif key == "secretKeyRef":
                yield value["name"]
            else:
                yield from _secret_names(value)
    elif isinstance(node, list):
        for value in node:
            yield from _secret_names(value)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operators_rules_hardening_and_references(overlay: str) -> None:
    found = list(complaints_of(documents(overlay)))
    if overlay == "dev-cpu":  # an image one built oneself
        found = [complaint for complaint in found if "not pinned by digest" not in complaint]
    assert found == []


# Who may reach what: (labels of the caller's namespace, caller in the graph's own namespace and app, port) -> allowed.
DOORS = [
    ({"sdgraph/gateway": "true"}, None, 8000, True),
    ({"sdgraph/gateway": "true"}, None, 8265, False),
    ({"sdgraph/gateway": "true"}, None, 6379, False),
    ({"sdgraph/monitoring": "true"}, None, 8080, True),
    ({"sdgraph/monitoring": "true"}, None, 44217, True),
    ({"sdgraph/monitoring": "true"}, None, 8000, False),
    ({"kubernetes.io/metadata.name": "kuberay-system"}, None, 8265, True),
    ({"kubernetes.io/metadata.name": "kuberay-system"}, None, 10001, False),
    ({"kubernetes.io/metadata.name": "default"}, None, 8000, False),
    ({"kubernetes.io/metadata.name": "default"}, None, 8265, False),
    ({}, {"app.kubernetes.io/name": "sdgraph"}, 6379, True),
    ({}, {"app.kubernetes.io/name": "something-else"}, 8265, False),
]


@pytest.mark.parametrize(("namespace", "own", "port", "allowed"), DOORS)
def test_network_policies_let_only_named_pods_reach_a_ray_pod(
    namespace: dict[str, str], own: dict[str, str] | None, port: int, allowed: bool
) -> None:
    pod = {"app.kubernetes.io/name": "sdgraph", "ray.io/node-type": "worker"}
    policies = [d["spec"] for d in documents("prod") if d["kind"] == "NetworkPolicy"]
    chosen = [p for p in policies if "Ingress" in p["policyTypes"] and _selects(p["podSelector"], pod)]
    assert chosen, "without a policy everybody would be let in"
    rules = [rule for policy in chosen for rule in policy.get("ingress", [])]
    assert any(_lets_in(rule, namespace, own, port) for rule in rules) == allowed


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def _lets_in(rule: Document, namespace: dict[str, str], own: dict[str, str] | None, port: int) -> bool:
    if "ports" in rule and port not in [entry["port"] for entry in rule["ports"]]:
        return False
    for source in rule["from"]:
        if "namespaceSelector" in source:
            if own is None and _selects(source["namespaceSelector"], namespace):
                return True
        elif own is not None and _selects(source["podSelector"], own):
            return True
    return False


def test_egress_is_denied_but_for_what_is_named() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in documents("prod") if d["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    leaving = {name for name, spec in policies.items() if spec.get("egress")}
    assert leaving == {"ray-to-ray", "dns", "head-to-api-server", "ray-to-redis", "model-download-to-hub"}


def test_the_yaml_is_tidy() -> None:
    command = [sys.executable, "-m", "yamllint", "k8s", "serve_config.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert re.search(r"apt-get install .*\bbash wget\b", text), "KubeRay's probes run them"
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "1000"


def base_image(*given: str) -> subprocess.CompletedProcess[str]:
    """What the Dockerfile's first FROM names; BuildKit expands the arguments before it as bash does."""
    text = (ROOT / "Dockerfile").read_text()
    arguments = re.findall(r"^ARG (\w+=.*)$", text[: text.index("\nFROM ")], re.MULTILINE)
    image = re.search(r"^FROM (\S+) AS build$", text, re.MULTILINE)
    assert image is not None
    script = "\n".join([arguments[0], *given, *arguments[1:], f"echo {image[1]}"])
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


def test_a_build_with_the_digest_of_zeros_says_that_it_is_a_placeholder() -> None:
    refused = base_image()
    assert refused.returncode != 0
    assert "the digest of zeros is a placeholder, build with --build-arg BASE=" in refused.stderr


def test_a_build_with_a_real_digest_begins_with_it() -> None:
    image = f"mirror.example/python:3.11-slim-bookworm@sha256:{'0123456789abcdef' * 4}"
    assert base_image(f"BASE={image}").stdout.strip() == image
