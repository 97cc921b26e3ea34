"""Dashboard and alerts: every query parses and reads metrics that exist; Ray's are looked for in tests/serve."""

from __future__ import annotations

import json

import pytest
from ray.util.metrics import Counter, Gauge, Histogram

from deployments.telemetry.metrics import Metrics
from tests.k8s.monitoring import MONITORING, expressions, metrics_of

SUFFIXES = {Counter: ["_total"], Gauge: [""], Histogram: ["_bucket", "_sum", "_count"]}


def exported() -> dict[str, set[str]]:
    """Series that Ray exports for the metrics of this project -> their labels."""
    series = {}
    for metric in vars(Metrics()).values():
        for kind, suffixes in SUFFIXES.items():
            if isinstance(metric, kind):
                info = metric.info
                series |= {f"ray_{info['name']}{suffix}": set(info["tag_keys"]) for suffix in suffixes}
    return series


@pytest.mark.parametrize("title", sorted(expressions()))
def test_every_query_reads_metrics_that_exist(title: str) -> None:
    names = metrics_of(expressions()[title])
    assert names
    ours = {name for name in names if name.startswith("ray_sdgraph_")}
    assert ours <= exported().keys()
    assert all(name.startswith("ray_") for name in names)


def test_queries_group_by_labels_that_exist() -> None:
    """Those that a query groups by or compares."""
    known = set().union(*exported().values()) | {"le", "deployment"}
    for title, expression in expressions().items():
        for clause in expression.split("by (")[1:]:
            assert set(clause.split(")")[0].split(", ")) <= known, title


def test_every_metric_is_on_the_dashboard() -> None:
    shown = set().union(*map(metrics_of, expressions().values()))
    for metric in vars(Metrics()).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            name = f"ray_{metric.info['name']}"
            assert any(series.startswith(name) for series in shown), f"{name} is nowhere shown"


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("expression", ["sum(", "rate(ray_sdgraph_requests_total)", "ray_x ++"])
def test_an_invalid_query_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        metrics_of(expression)
