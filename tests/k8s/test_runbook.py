"""k8s/README.md: what it says about names and order agrees with the manifests."""

from __future__ import annotations

import re

import pytest

from config.catalog import ROOT
from tests.k8s.references import SECRETS_FROM_OUTSIDE, references
from tests.support.manifests import documents, pods

RUNBOOK = (ROOT / "k8s" / "README.md").read_text()


def test_the_operator_is_installed_where_the_policies_let_it_in() -> None:
    (policy,) = (d["spec"] for d in documents("prod") if d["metadata"]["name"] == "operator-to-ray")
    (source,) = policy["ingress"][0]["from"]
    where = source["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert f"helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0 -n {where}" in RUNBOOK


def test_every_secret_is_made_before_anything_is_applied() -> None:
    install = RUNBOOK[RUNBOOK.index("## Install") :]
    made = set(
        re.findall(r"create secret (?:generic|docker-registry) (\S+)", install[: install.index("kubectl apply")])
    )
    assert made == SECRETS_FROM_OUTSIDE


def test_every_component_and_overlay_is_in_the_table() -> None:
    for folder in (ROOT / "k8s" / "components").iterdir():
        assert f"`components/{folder.name}`" in RUNBOOK
    for folder in (ROOT / "k8s" / "overlays").iterdir():
        assert re.search(rf"^\| `overlays/.*{folder.name}`", RUNBOOK, re.MULTILINE)


@pytest.mark.parametrize("overlay", ["prod", "staging"])
def test_what_is_applied_first_is_all_that_the_download_needs(overlay: str) -> None:
    """`kubectl apply -l sdgraph/install=first` keeps the labelled documents alone."""
    docs = documents(overlay)
    first = [d for d in docs if d["metadata"].get("labels", {}).get("sdgraph/install") == "first"]
    names = {d["metadata"]["name"] for d in first}
    assert {"model-download", "model-cache", "sdgraph-worker", "default-deny", "dns", "model-download-to-hub"} <= names
    assert not [d for d in first if d["kind"] == "RayService"]
    (service,) = (d for d in docs if d["kind"] == "RayService")
    assert [c for c in references([*first, service]) if c.startswith("model-download")] == []
    (download,) = (spec for name, spec in pods(docs) if name == "model-download")
    assert download["serviceAccountName"] in names
