"""What an operator sees of a running graph: metrics, log lines, traces."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx

from deployments.ray_compat import metrics_targets
from tests.k8s.monitoring import expressions, metrics_of
from tests.serve.conftest import Collector
from tests.support.live import draw, request, wait_for

PATH = "/v1/image/generation"
STAGES = {"text_encoder", "denoise", "vae_decode"}


def scrape() -> str:
    """Everything Ray exports here, as Prometheus would collect it."""
    return "".join(httpx.get(f"http://{target}/metrics").text for target in metrics_targets())


def value(name: str, **labels: str) -> float:
    """Sum of a series over its other labels."""
    total = 0.0
    for line in scrape().splitlines():
        found = re.match(rf"{name}\{{(.*)\}} (\S+)$", line)
        if found and all(f'{key}="{wanted}"' in found[1] for key, wanted in labels.items()):
            total += float(found[2])
    return total


def test_metrics_count_what_was_done(client: httpx.Client) -> None:
    """By stage and component; ten steps of a guided picture are ten ticks of two rows."""
    of = {"component": "unet-sd2", "application": "sdgraph"}
    before = {name: value(name, **of) for name in ("ray_sdgraph_rows_total", "ray_sdgraph_tick_seconds_count")}
    errors = value("ray_sdgraph_errors_total", code="40302", status="400")
    fields = request("SD2", steps=10, sampler="Euler", prompt="counted once")
    draw(client, **fields)
    draw(client, **fields)
    assert client.post("/v1/image/generation", json=fields | {"sampler": "none"}).status_code == 400

    def ticks() -> float:
        return value("ray_sdgraph_tick_seconds_count", **of) - before["ray_sdgraph_tick_seconds_count"]

    wait_for(lambda: ticks() >= 20)
    assert ticks() == 20
    assert value("ray_sdgraph_rows_total", **of) - before["ray_sdgraph_rows_total"] == 40
    # Each process exports at a time of its own.
    hits = {"cache": "embedding", "component": "text-encoder-sd2", "result": "hit"}
    series: list[tuple[float, str, dict[str, str]]] = [
        (2, "ray_sdgraph_cache_lookups_total", hits),
        (2, "ray_sdgraph_request_seconds_count", {"model": "SD2", "backend": "torch"}),
        (errors + 1, "ray_sdgraph_errors_total", {"code": "40302", "status": "400"}),
        (1, "ray_sdgraph_compiled_programs", {"component": "unet-sd15"}),
        *(
            (2, f"ray_sdgraph_{name}_seconds_count", {"stage": stage})
            for name in ("stage", "queue")
            for stage in STAGES
        ),
    ]
    wait_for(lambda: all(value(name, **labels) >= least for least, name, labels in series))


def test_outstanding_work_is_shown_while_there_is_some(url: str) -> None:
    body = request("SD2", steps=400, sampler="Euler", width=1024, height=1024)
    with httpx.Client(base_url=url, timeout=60) as client, client.stream("POST", PATH, json=body | {"stream": True}):
        wait_for(lambda: value("ray_sdgraph_outstanding_work", component="unet-sd2") > 0)
    wait_for(lambda: value("ray_sdgraph_outstanding_work", component="unet-sd2") == 0)


def test_padding_of_compiled_batches_is_counted(client: httpx.Client) -> None:
    """An unguided picture is one row; the program at hand takes two."""
    of = {"component": "unet-sd15", "deployment": "unet-sd15-tvm", "kind": "padding"}
    before = value("ray_sdgraph_rows_total", **of)
    fields = request("SD1.5", width=512, height=512, steps=4, sampler="Euler", cfg_scale=0, backend="tvm")
    draw(client, **fields)
    wait_for(lambda: value("ray_sdgraph_rows_total", **of) - before >= 4)


def test_every_metric_of_ray_that_a_panel_or_alert_reads_is_exported(client: httpx.Client) -> None:
    wanted = {name for text in expressions().values() for name in metrics_of(text) if "sdgraph" not in name}
    seen: set[str] = set()

    def all_seen() -> bool:  # gauges come and go
        exported = scrape()
        seen.update(name for name in wanted if re.search(rf"^{name}[{{ ]", exported, re.MULTILINE))
        return seen == wanted

    wait_for(all_seen)


def test_one_id_finds_a_request_in_the_log_of_every_process(client: httpx.Client, graph_log: Path) -> None:
    draw_with_id = {"x-request-id": "find-me-4711"}
    body = request("SD2", steps=2, sampler="Euler")
    assert client.post("/v1/image/generation", json=body, headers=draw_with_id).status_code == 200

    def lines() -> list[dict[str, Any]]:
        raw = re.findall(
            r"\((ServeReplica:\S+) pid=\d+\)\S* (\{.*\"request_id\": \"find-me-4711\".*\})", graph_log.read_text()
        )
        return [json.loads(text) | {"process": process} for process, text in raw]

    wait_for(lambda: any("POST" in line["message"] for line in lines()))
    found = lines()
    assert {line["stage"] for line in found if "stage" in line} == STAGES
    assert len({line["process"] for line in found}) == 4
    (access,) = (line for line in found if line["logger"] == "deployments.api.access_log")
    assert (access["status"], access["key"]) == (200, "-")
    assert re.fullmatch(r"[0-9a-f]{32}", access["trace_id"])


def test_a_trace_holds_every_stage_of_a_request(client: httpx.Client, collector: Collector) -> None:
    draw(client, **request("SD2", steps=2, sampler="Euler", prompt="traced"))

    def traces() -> list[dict[str, str]]:
        spans = [{name: of.get("sdgraph.component", "") for name, of in trace} for trace in collector.spans.values()]
        return [names for names in spans if names.keys() >= STAGES and any(n.startswith("proxy_") for n in names)]

    wait_for(lambda: bool(traces()))
    assert traces()[-1]["denoise"].startswith("unet-")
