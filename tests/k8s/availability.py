"""A node that is drained, and a pod that is lost: neither hangs nor takes the service with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from tests.support.manifests import Document, groups, quantity, ray_service


def availability(docs: list[Document]) -> Iterator[str]:
    """Complaints about budgets and about where the ingress lies."""
    service = ray_service(docs)
    workers = {name: group for name, group in groups(service) if name != "head"}
    for budget in (document["spec"] for document in docs if document["kind"] == "PodDisruptionBudget"):
        least = budget.get("minAvailable")
        chosen = budget["selector"]["matchLabels"].get("ray.io/group")
        pods = sum(group["minReplicas"] for name, group in workers.items() if chosen in (None, name))
        if "maxUnavailable" in budget or not isinstance(least, int):
            yield "a budget other than an integer minAvailable blocks every drain: a RayCluster has no scale"
        elif least >= pods:
            yield f"a budget of {least} of {pods} pods blocks every drain"
    yield from _ingress(service, workers)


def _ingress(service: Document, workers: dict[str, Document]) -> Iterator[str]:
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    ingress: dict[str, Any] = next(d for d in application["deployments"] if d["name"] == "ingress")
    least = (ingress.get("autoscaling_config") or {}).get("min_replicas", 1)
    (group,) = (g for g in workers.values() if g["labels"] == ingress["ray_actor_options"]["label_selector"])
    cpus = quantity(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    alone = 2 * ingress["ray_actor_options"]["num_cpus"] > cpus or ingress.get("max_replicas_per_node") == 1
    if least > 1 and not alone:
        yield "two ingress replicas fit one pod: its loss would be an outage"
    if group["minReplicas"] < least:
        yield f"{group['groupName']}: minReplicas below the {least} pods that the ingress needs"
    if group["minReplicas"] > 1 and not group["template"]["spec"].get("topologySpreadConstraints"):
        yield f"{group['groupName']}: pods are not spread over nodes"
