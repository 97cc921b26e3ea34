"""Pods and Dockerfile under checkov's rules. It lives in an environment of its own: `make slow` makes it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.catalog import ROOT
from tests.support.manifests import documents, templates

CHECKOV = ROOT / "build" / "checkov" / "bin" / "checkov"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOV.exists(), reason="checkov has 300 MB of its own; `make slow` installs it"),
]

ACCEPTED = {
    "CKV_K8S_8": "liveness probes: KubeRay injects them",
    "CKV_K8S_9": "readiness probes: KubeRay injects them",
    "CKV_K8S_35": "Redis' password in the environment: KubeRay hands it to Ray in no other way",
    "CKV_K8S_40": "user 1000, as in Ray's own images: no pod mounts a path of its host",
    "CKV_K8S_38": "the head's service account token: its autoscaler needs it",
}
ACCEPTED_IN = {"dev-cpu": {"CKV_K8S_43": "an image by tag: built on the spot, for kind", "CKV_K8S_15": "the same"}}
ACCEPTED_IN_THE_DOCKERFILE = {
    "CKV_DOCKER_2": "HEALTHCHECK: Kubernetes does not look at it",
    "CKV_DOCKER_7": "the base is pinned by digest, in an argument that checkov does not follow",
}


def run(framework: str, file: Path, accepted: dict[str, str]) -> list[str]:
    """Checks that failed, with the resource."""
    command = [str(CHECKOV), "--framework", framework, "-f", str(file), "--skip-download", "--quiet", "-o", "json"]
    done = subprocess.run([*command, "--skip-check", ",".join(accepted)], capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["summary"]["passed"] > 0, done.stdout
    return [f"{c['check_id']} {c['check_name']}: {c['resource']}" for c in report["results"]["failed_checks"]]


def exploded(overlay: str, folder: Path, weaken: bool = False) -> Path:
    """The pods of every group and job as documents of their own, with the network policies that select them."""
    docs = documents(overlay)
    namespace = {"namespace": "sdgraph"}
    file = folder / "pods.yaml"
    made = [doc for doc in docs if doc["kind"] == "NetworkPolicy"]
    for name, template in templates(docs):
        metadata = template["metadata"] | {"name": name} | namespace
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        if weaken:
            pod = json.loads(json.dumps(pod))
            pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
        made.append(pod)
    file.write_text(yaml.safe_dump_all(made))
    return file


@pytest.mark.parametrize("overlay", ["prod", "staging", "dev-cpu"])
def test_checkov_refuses_nothing_in_the_pods(overlay: str, tmp_path: Path) -> None:
    assert run("kubernetes", exploded(overlay, tmp_path), ACCEPTED | ACCEPTED_IN.get(overlay, {})) == []


def test_a_weak_pod_is_refused(tmp_path: Path) -> None:
    assert any("CKV_K8S_20" in failed for failed in run("kubernetes", exploded("prod", tmp_path, True), ACCEPTED))


def test_the_dockerfile() -> None:
    assert run("dockerfile", ROOT / "Dockerfile", ACCEPTED_IN_THE_DOCKERFILE) == []
