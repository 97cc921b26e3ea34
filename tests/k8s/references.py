"""Names in the manifests that must name something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.support.manifests import Document, groups, pods, ray_service

SECRETS_FROM_OUTSIDE = {"ray-auth-token", "sdgraph-api-keys", "sdgraph-redis", "sdgraph-hf-token", "sdgraph-registry"}
SECRETS_OF_COMPONENTS = {"sdgraph-c2pa"}
"""Of components that no overlay has."""


def references(docs: list[Document]) -> Iterator[str]:
    """Complaints about names of volumes, accounts, claims, Secrets and ports."""
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
        if secret not in SECRETS_FROM_OUTSIDE | SECRETS_OF_COMPONENTS:
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
