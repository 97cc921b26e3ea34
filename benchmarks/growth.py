"""The memory and files of a graph's processes while it runs, and their growth."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

from deployments.ray_compat import metrics_targets

Samples = list[tuple[float, float]]
"""Seconds since the beginning, and the value."""

BLOCKS = 10
T_95 = 2.306
"""Student's t for 95 % on both sides and `BLOCKS` - 2 degrees of freedom."""
WHOLE = {
    "objects": "ray_object_store_num_local_objects",
    "object_store_mib": "ray_object_store_used_memory",
    "queued": "ray_serve_deployment_queued_queries",
    "under_way": "ray_serve_replica_processing_queries",
    "outstanding_work": "ray_sdgraph_outstanding_work",
}
"""What is watched of the whole graph -> the series that Ray exports."""
RAY_FILES = {
    "gcs_server": "gcs",
    "raylet/raylet": "raylet",
    "dashboard/dashboard.py": "dashboard",
    "dashboard/agent.py": "agent",
    "runtime_env/agent/main.py": "runtime-env-agent",
    "log_monitor.py": "log-monitor",
    "monitor.py": "monitor",
    "bin/serve": "serve-run",
}
"""A part of the command line of Ray's own processes -> their name here; in this order."""


class Watch:
    """Samples of every process below this one, and of the whole graph, kept in a file as they come."""

    def __init__(self, file: Path) -> None:
        """Write to `file`."""
        self.samples: dict[str, dict[str, Samples]] = {}
        """Process, or `graph` -> what was measured -> samples."""
        self._file = file
        self._begin = time.monotonic()

    def measure(self) -> None:
        """Take one sample of everything: own memory (USS, in MiB), threads and open files of each process."""
        at = round(time.monotonic() - self._begin, 1)
        measured = {"graph": _whole()}
        for process in psutil.Process().children(recursive=True):
            try:
                measured[f"{_name(process)} {process.pid}"] = _process(process)
            except psutil.Error:
                continue  # it ended meanwhile
        for name, values in measured.items():
            for what, value in values.items():
                self.samples.setdefault(name, {}).setdefault(what, []).append((at, round(value, 2)))
        half_written = self._file.with_suffix(".part")
        half_written.write_text(json.dumps(self.samples))
        half_written.replace(self._file)


def _name(process: psutil.Process) -> str:
    """Actor class of a Ray worker, name of a deployment, or what else Ray started."""
    command = " ".join(process.cmdline())
    if command.startswith("ray::"):
        title = command.removeprefix("ray::").split(".")[0].strip()
        return title.removeprefix("ServeReplica:").split(":")[-1]
    return next((name for part, name in RAY_FILES.items() if part in command), process.name())


def _process(process: psutil.Process) -> dict[str, float]:
    with process.oneshot():
        return {
            "mib": process.memory_full_info().uss / 2**20,
            "threads": process.num_threads(),
            "files": process.num_fds(),
        }


def _whole() -> dict[str, float]:
    """Sums of the series that Ray exports on this machine; one that is not there is 0."""
    text = ""
    for target in metrics_targets():
        try:
            text += httpx.get(f"http://{target}/metrics", timeout=20).text
        except httpx.TransportError:
            continue  # an agent that is late; its next answer has everything
    values = {
        what: sum(map(float, re.findall(rf"^{series}{{.*}} (\S+)$", text, re.MULTILINE)))
        for what, series in WHOLE.items()
    }
    return values | {"object_store_mib": values["object_store_mib"] / 2**20}


def growth(samples: Samples, warm_up: float) -> dict[str, float]:
    """Levels after the warm-up and at the end, and the slope of a line between.

    The line goes through the means of ten blocks of time: successive samples are correlated, means of minutes much
    less, so their scatter gives the slope's uncertainty.

    Args:
        samples: what was measured.
        warm_up: seconds that do not count.

    Returns:
        Means of the first and the last block, the slope an hour and the half width of its 95 % interval.
    """
    means = blocks([sample for sample in samples if sample[0] >= warm_up])
    slope, error = line(means)
    return {
        "first": round(means[0][1], 1),
        "last": round(means[-1][1], 1),
        "an_hour": round(slope * 3600, 2),
        "plus_minus": round(T_95 * error * 3600, 2),
    }


def blocks(samples: Samples) -> Samples:
    """Means of ten equal stretches."""
    if len(samples) < 2 * BLOCKS:
        raise ValueError(f"{len(samples)} samples after the warm-up; at least {2 * BLOCKS}: run longer")
    edges = [round(number * len(samples) / BLOCKS) for number in range(BLOCKS + 1)]
    parts = [samples[begin:end] for begin, end in itertools.pairwise(edges)]
    return [(_mean([at for at, _ in part]), _mean([value for _, value in part])) for part in parts]


def line(points: Samples) -> tuple[float, float]:
    """Slope by least squares, and its standard error."""
    times, values = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(times, values)
    left = sum((value - intercept - slope * at) ** 2 for at, value in points)
    spread = sum((at - _mean(times)) ** 2 for at in times)
    return slope, math.sqrt(left / (len(points) - 2) / spread)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
