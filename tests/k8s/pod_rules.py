"""Hardening of pods, what they log, how they end, and Jobs that can be applied again."""

from __future__ import annotations

import re
from collections.abc import Iterator

from config.settings import Settings
from tests.support.manifests import Document, environment

LONGEST_PICTURE_S = Settings().deadline_s
OWNED_BY_KUBERAY = {"app.kubernetes.io/name", "app.kubernetes.io/created-by"}
"""Labels by which the Services that KubeRay makes find their pods."""


def hardening(name: str, template: Document) -> Iterator[str]:
    """Complaints about what a pod may do."""
    pod = template["spec"]
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield f"{name}: must run as a user other than root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield f"{name}: seccomp RuntimeDefault"
    if name != "head" and pod.get("automountServiceAccountToken") is not False:
        yield f"{name}: must not mount a service account's token"
    if OWNED_BY_KUBERAY & template["metadata"].get("labels", {}).keys():
        yield f"{name}: {sorted(OWNED_BY_KUBERAY)} are KubeRay's labels; its Services would select nothing"
    if not pod.get("imagePullSecrets"):
        yield f"{name}: imagePullSecrets, for private registries"
    for container in pod["containers"]:
        yield from container_hardening(name, container.get("securityContext", {}))
        if container["resources"].get("limits") != container["resources"].get("requests"):
            yield f"{name}: requests must equal limits"
        if not re.search(r"@sha256:[0-9a-f]{64}$", container["image"]):
            yield f"{name}: image {container['image']} is not pinned by digest"
    for volume in pod.get("volumes", []):
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"{name}: emptyDir {volume['name']} has no sizeLimit"
        if "secret" in volume and volume["secret"].get("defaultMode", 0o644) & 0o007:
            yield f"{name}: files of Secret {volume['secret']['secretName']} are open to every user of the pod"


def container_hardening(name: str, security: Document) -> Iterator[str]:
    """Complaints about a container's security context."""
    if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities", {}).get("drop") != ["ALL"]:
        yield f"{name}: privileges must be dropped"
    if security.get("readOnlyRootFilesystem") is not True:
        yield f"{name}: the root file system must be read-only"


def logging(name: str, pod: Document) -> Iterator[str]:
    """Without these, lines lie in files below /tmp/ray: `kubectl logs` shows nothing, and they end with the pod."""
    variables = environment(pod)
    if (variables.get("RAY_LOG_TO_STDERR"), variables.get("SDGRAPH_LOG_FORMAT")) != ("1", "json"):
        yield f"{name}: log lines must go to the container's output, as JSON"


def draining(name: str, pod: Document) -> Iterator[str]:
    """Complaints about what happens to pictures after SIGTERM, which Ray drains a node on by itself."""
    drain = float(environment(pod).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
    grace = pod.get("terminationGracePeriodSeconds", 30)
    if any("preStop" in container.get("lifecycle", {}) for container in pod["containers"]):
        yield f"{name}: a preStop hook would cut pictures that Ray finishes after SIGTERM"
    if name != "head" and drain < LONGEST_PICTURE_S:
        yield f"{name}: a drain below the longest picture, {LONGEST_PICTURE_S:g} s, cuts it"
    if drain + 10 > grace:
        yield f"{name}: Ray drains for {drain:g} s, the pod is killed after {grace}"


def jobs(docs: list[Document]) -> Iterator[str]:
    """Complaints about Jobs: one that has ended stands in the way of the next image."""
    for job in (document for document in docs if document["kind"] == "Job"):
        name, spec = job["metadata"]["name"], job["spec"]
        if spec.get("ttlSecondsAfterFinished", 86400) > 600:
            yield f"{name}: ttlSecondsAfterFinished at most 600; until a Job is gone, its pod cannot be changed"
        if spec.get("backoffLimit", 6) < 6:
            yield f"{name}: backoffLimit at least 6; a hub may refuse for a while"
