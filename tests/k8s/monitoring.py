"""What the dashboard and the alerts ask Prometheus for."""

from __future__ import annotations

import json
from collections.abc import Iterator

import promql_parser
import yaml

from config.catalog import ROOT

MONITORING = ROOT / "k8s" / "components" / "monitoring"


def expressions() -> dict[str, str]:
    """Title of a panel or name of an alert -> its query, Grafana's own variable filled in."""
    found: dict[str, str] = {}
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "5m")
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    return found


def metrics_of(expression: str) -> set[str]:
    """Names of the series a query reads.

    Raises:
        ValueError: it is no PromQL.
    """
    return set(_names(promql_parser.parse(expression)))


def _names(node: object) -> Iterator[str]:
    if isinstance(node, promql_parser.VectorSelector):
        yield str(node.name)
        return
    for part in ("vector_selector", "expr", "lhs", "rhs"):
        if inner := getattr(node, part, None):
            yield from _names(inner)
    for argument in getattr(node, "args", None) or []:
        yield from _names(argument)
