"""Network policies: which connections they let through, as a small model of Kubernetes' rules."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tests.support.manifests import Document, ray_service


@dataclass(frozen=True)
class Peer:
    """The other end of a connection."""

    name: str
    namespace: dict[str, str] = field(default_factory=dict)
    """Labels of its namespace; none for the graph's own."""
    pod: dict[str, str] = field(default_factory=dict)
    """Its own labels, in the graph's namespace."""
    address: str = "203.0.113.1"


def namespace(name: str) -> Peer:
    """Any pod of a namespace."""
    return Peer(name, {"kubernetes.io/metadata.name": name})


RAY = Peer("Ray", pod={"sdgraph/part": "ray"})
HEAD = Peer("the head", pod={"sdgraph/part": "ray", "ray.io/node-type": "head"})
DOWNLOAD = Peer("the download", pod={"sdgraph/part": "model-download"})
STRANGER = Peer("another pod", pod={"sdgraph/part": "something-else"})
GATEWAY_PODS = Peer("KubeRay's Gateway", pod={"gateway.networking.k8s.io/gateway-name": "sdgraph-gateway"})
GATEWAY = Peer("a gateway", {"sdgraph/gateway": "true"})
MONITORING = Peer("monitoring", {"sdgraph/monitoring": "true"})
OPERATOR, DEFAULT = namespace("kuberay-system"), namespace("default")
INTERNET = Peer("the internet", {"somewhere": "else"})
NODE_DNS = Peer("NodeLocal DNSCache", {"on": "the node"}, address="169.254.20.10")

# From, to, port, whether it must get through; in every overlay.
EVERYWHERE = [
    (GATEWAY, RAY, 8000, True),
    (GATEWAY, RAY, 8265, False),
    (GATEWAY, RAY, 6379, False),
    (MONITORING, RAY, 8080, True),
    (MONITORING, RAY, 44217, True),
    (MONITORING, RAY, 8000, False),
    (OPERATOR, RAY, 8265, True),
    (OPERATOR, RAY, 10001, False),
    (DEFAULT, RAY, 8000, False),
    (DEFAULT, RAY, 8265, False),
    (INTERNET, RAY, 8000, False),
    (INTERNET, RAY, 8265, False),
    (STRANGER, RAY, 8265, False),
    (RAY, RAY, 6379, True),
    (RAY, namespace("kube-system"), 53, True),
    (RAY, NODE_DNS, 53, True),
    (RAY, namespace("openshift-dns"), 5353, True),
    (RAY, INTERNET, 443, False),
    (HEAD, INTERNET, 6443, True),
]
WITH_DOWNLOAD = [(DOWNLOAD, INTERNET, 443, True), (DOWNLOAD, INTERNET, 80, False), (DOWNLOAD, RAY, 8265, False)]
WITH_REDIS = [(RAY, namespace("redis"), 6379, True), (RAY, namespace("redis"), 22, False)]
INCREMENTAL = [
    (INTERNET, GATEWAY_PODS, 80, True),
    (INTERNET, GATEWAY_PODS, 8080, False),
    (GATEWAY_PODS, RAY, 8000, True),
    (GATEWAY_PODS, RAY, 8265, False),
    (GATEWAY_PODS, namespace("istio-system"), 15012, True),
]


def network(docs: list[Document]) -> Iterator[str]:
    """Complaints about doors that are shut or open against the tables above."""
    doors = [*EVERYWHERE]
    if any(document["kind"] == "Job" for document in docs):
        doors += WITH_DOWNLOAD
    if ray_service(docs)["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions"):
        doors += WITH_REDIS
    if ray_service(docs)["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade":
        doors += INCREMENTAL
    policies = [document["spec"] for document in docs if document["kind"] == "NetworkPolicy"]
    for source, target, port, wanted in doors:
        if (_passes(policies, source, target, port)) != wanted:
            yield f"{source.name} {'cannot' if wanted else 'can'} reach port {port} of {target.name}"


def _passes(policies: list[Document], source: Peer, target: Peer, port: int) -> bool:
    """Both ends must let it through; ends outside the namespace always do."""
    leaves = source.namespace or _allowed(policies, "Egress", source, target, port)
    enters = target.namespace or _allowed(policies, "Ingress", target, source, port)
    return bool(leaves and enters)


def _allowed(
    policies: list[Document], direction: Literal["Ingress", "Egress"], own: Peer, other: Peer, port: int
) -> bool:
    chosen = [p for p in policies if direction in p["policyTypes"] and _selects(p["podSelector"], own.pod)]
    if not chosen:
        return True
    way = "from" if direction == "Ingress" else "to"
    rules = [rule for policy in chosen for rule in policy.get(direction.lower(), [])]
    return any(_matches(rule, way, other, port) for rule in rules)


def _matches(rule: Document, way: str, other: Peer, port: int) -> bool:
    if "ports" in rule and port not in [entry["port"] for entry in rule["ports"]]:
        return False
    return way not in rule or any(_names(peer, other) for peer in rule[way])


def _names(peer: Document, other: Peer) -> bool:
    if "ipBlock" in peer:
        block = ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return bool(other.namespace) and ipaddress.ip_address(other.address) in block
    if "namespaceSelector" in peer:
        return bool(other.namespace) and _selects(peer["namespaceSelector"], other.namespace)
    return not other.namespace and _selects(peer["podSelector"], other.pod)


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
