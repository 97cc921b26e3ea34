"""k8s/: every overlay renders, fits the schemas, keeps the operator's rules and ours; mutants are refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.catalog import ROOT
from tests.k8s import pod_rules, schema
from tests.k8s.availability import availability
from tests.k8s.network import network
from tests.k8s.operator_rules import operator_rules
from tests.k8s.references import references
from tests.support.manifests import OVERLAYS, Document, documents, environment, groups, ray_service, rendered, templates

MUTANTS = sorted((Path(__file__).parent / "mutants").glob("*.yaml"))


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
    """A mutant changes one thing in an overlay (prod where none is named); its first line is what must be said."""
    wanted = mutant.read_text().splitlines()[0].removeprefix("# ")
    change = yaml.safe_load(mutant.read_text())
    docs = documents(change.get("overlay", "prod"))
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
    service = ray_service(docs)
    yield from operator_rules(service)
    for name, template in templates(docs):
        yield from pod_rules.hardening(name, template)
    yield from pod_rules.container_hardening(
        "autoscaler", service["spec"]["rayClusterConfig"]["autoscalerOptions"]["securityContext"]
    )
    for name, group in groups(service):
        yield from pod_rules.logging(name, group["template"]["spec"])
        yield from pod_rules.draining(name, group["template"]["spec"])
    yield from pod_rules.jobs(docs)
    yield from availability(docs)
    yield from network(docs)
    yield from references(docs)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operators_rules_hardening_and_references(overlay: str) -> None:
    found = list(complaints_of(documents(overlay)))
    if overlay == "dev-cpu":  # an image one built oneself
        found = [complaint for complaint in found if "not pinned by digest" not in complaint]
    assert found == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_have_the_heads_environment_but_for_the_time_to_drain(overlay: str) -> None:
    head, *workers = [environment(group["template"]["spec"]) for _, group in groups(ray_service(documents(overlay)))]
    for worker in workers:
        assert {name for name in head.keys() | worker.keys() if head.get(name) != worker.get(name)} == {
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
        }


@pytest.mark.parametrize("component", ["c2pa", "tracing", "tvm-compile-job"])
def test_components_that_no_overlay_has_fit_production(component: str, tmp_path: Path) -> None:
    docs = with_component(component, tmp_path)
    assert docs != documents("prod")
    assert [error for document in docs for error in schema.errors(document)] == []
    assert list(complaints_of(docs)) == []


def test_only_the_ingress_pods_have_the_signing_key(tmp_path: Path) -> None:
    """Where the variables of every pod say: the graph is built on any of them."""
    found = {name: group["template"]["spec"] for name, group in groups(ray_service(with_component("c2pa", tmp_path)))}
    said = [{name: v for name, v in environment(pod).items() if "_C2PA_" in name} for pod in found.values()]
    assert said == [said[0]] * 4
    (folder,) = {str(Path(path).parent) for path in said[0].values()}
    mounts = {name: {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]} for name, pod in found.items()}
    assert {name for name, paths in mounts.items() if folder in paths} == {"cpu"}


def with_component(component: str, tmp_path: Path) -> list[Document]:
    """Production's documents with one component more."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    file = tmp_path / "k8s" / "overlays" / "prod" / "kustomization.yaml"
    overlay = yaml.safe_load(file.read_text())
    overlay["components"].append(f"../../components/{component}")
    overlay["images"].append({"name": "ghcr.io/sdgraph/sdgraph-compiler", "digest": f"sha256:{'0' * 64}"})
    file.write_text(yaml.safe_dump(overlay))
    done = subprocess.run(["kubectl", "kustomize", file.parent], capture_output=True, text=True, check=True)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def test_everything_is_denied_that_no_policy_names() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in documents("prod") if d["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_the_yaml_is_tidy() -> None:
    command = [sys.executable, "-m", "yamllint", "k8s", "serve_config.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
