"""Every Prometheus metric of this project, on one page.

Ray's agent on each node exports them under these names with `ray_` before; `deployment` and `replica` labels come from
Serve. The sum of a histogram is made of its buckets' middles there: means need a counter, as `rows` over ticks.
`k8s/components/monitoring` has a dashboard and alerts over them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from pipelines.cache import LruCache

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600]


class Metrics:
    """The metrics of this process; made by `metrics()`, inside a replica, so that Serve's labels are known."""

    def __init__(self) -> None:
        stage, component = ("stage", "component"), ("component",)
        self.requests = Counter("sdgraph_requests", "HTTP requests by route and status.", ("route", "status"))
        self.errors = Counter(
            "sdgraph_errors", "HTTP error responses by status and API error code.", ("status", "code")
        )
        self.request_seconds = Histogram(
            "sdgraph_request_seconds",
            "Time from a request's admission to its finished picture.",
            SECONDS,
            ("model", "backend"),
        )
        self.retries = Counter("sdgraph_retries", "Second attempts by reason.", ("reason",))
        self.stage_seconds = Histogram(
            "sdgraph_stage_seconds", "Time a stage took for one request, waiting included.", SECONDS, stage
        )
        self.queue_seconds = Histogram("sdgraph_queue_seconds", "Time a stage waited for the model.", SECONDS, stage)
        self.stage_errors = Counter("sdgraph_stage_errors", "Stages that raised, by exception type.", (*stage, "error"))
        self.tick_seconds = Histogram("sdgraph_tick_seconds", "Time of one UNet evaluation (tick).", SECONDS, component)
        self.rows = Counter(
            "sdgraph_rows",
            "UNet batch rows evaluated, by kind: asked (requested by jobs) or padding (up to a compiled batch size).",
            (*component, "kind"),
        )
        self.outstanding = Gauge(
            "sdgraph_outstanding_work",
            "Remaining work of the jobs in this replica: rows x remaining ticks x pixels.",
            component,
        )
        self.cache_lookups = Counter(
            "sdgraph_cache_lookups", "Cache lookups by result.", ("cache", *component, "result")
        )
        self.programs = Gauge("sdgraph_compiled_programs", "Compiled UNet programs in use, by component.", component)
        self.compiling = Gauge(
            "sdgraph_compiling_sizes",
            "Sizes whose program is compiled while the server serves, by state: waiting, compiling, loading or failed.",
            (*component, "state"),
        )
        self.passes = Gauge(
            "sdgraph_accelerated_passes",
            "Passes captured as CUDA graphs, kinds of passes whose capture failed, and blocks under torch.compile, of "
            "each network on a GPU.",
            (*component, "kind"),
        )
        self._seen: dict[tuple[str, str], tuple[int, int]] = {}

    def cache(self, name: str, component: str, *caches: LruCache[Any, Any]) -> None:
        """Count the lookups of caches since they were last looked at."""
        now = sum(c.hits for c in caches), sum(c.misses for c in caches)
        before = self._seen.get((name, component), (0, 0))
        self._seen[name, component] = now
        for result, count in zip(("hit", "miss"), (now[0] - before[0], now[1] - before[1]), strict=True):
            if count > 0:
                self.cache_lookups.inc(count, {"cache": name, "component": component, "result": result})

    def tick(self, component: str, rows: int, padding: int, seconds: float) -> None:
        """Count one UNet evaluation."""
        labels = {"component": component}
        self.tick_seconds.observe(seconds, labels)
        self.rows.inc(rows, labels | {"kind": "asked"})
        if padding:
            self.rows.inc(padding, labels | {"kind": "padding"})

    def accelerated(self, component: str, *, captured: int, failed: int, compiled: int = 0) -> None:
        """What is captured and compiled of a network, and what could not be captured."""
        for kind, count in {"captured": captured, "failed": failed, "compiled": compiled}.items():
            self.passes.set(count, {"component": component, "kind": kind})


@cache
def metrics() -> Metrics:
    """The metrics of this process."""
    return Metrics()
