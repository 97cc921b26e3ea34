"""The manifests as `kubectl apply -k` would send them, rendered once."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from config.catalog import ROOT

OVERLAYS = ("dev-cpu", "staging", "prod")
Document = dict[str, Any]


@functools.cache
def rendered(overlay: str) -> str:
    """What kustomize makes of an overlay."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: it renders the manifests")
    command = ["kubectl", "kustomize", str(ROOT / "k8s" / "overlays" / overlay)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def documents(overlay: str) -> list[Document]:
    """The rendered documents, a copy."""
    return copy.deepcopy(_parsed(overlay))


@functools.cache
def _parsed(overlay: str) -> list[Document]:
    return [d for d in yaml.safe_load_all(rendered(overlay)) if d]


def ray_service(docs: list[Document]) -> Document:
    (service,) = [d for d in docs if d["kind"] == "RayService"]
    return service


def groups(service: Document) -> Iterator[tuple[str, Document]]:
    """Name and specification of the head group and of each worker group."""
    cluster = service["spec"]["rayClusterConfig"]
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def templates(docs: list[Document]) -> Iterator[tuple[str, Document]]:
    """Name and template of every kind of pod, of Ray's groups and of Jobs."""
    for name, group in groups(ray_service(docs)):
        yield name, group["template"]
    for document in docs:
        if document["kind"] == "Job":
            yield document["metadata"]["name"], document["spec"]["template"]


def pods(docs: list[Document]) -> Iterator[tuple[str, Document]]:
    """Name and specification of every kind of pod."""
    for name, template in templates(docs):
        yield name, template["spec"]


def environment(pod: Document) -> dict[str, str]:
    """Variables of a pod's container, those of Secrets left out."""
    return {entry["name"]: entry.get("value", "") for entry in pod["containers"][0].get("env", [])}


def quantity(text: str) -> float:
    """A number of bytes or of CPUs as Kubernetes writes it."""
    suffixes = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "m": 1e-3}
    for suffix, factor in suffixes.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)
