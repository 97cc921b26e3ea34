"""What a graph that has nothing to do costs a UNet that fills all cores: SD1.5's true size beside it. Prints JSON.

    python -m benchmarks.idle_graph [--repeats 6] [--pixels 256] [--precision auto]

One process evaluates the UNet, two rows, a thread for each core, as a replica does. The processes of Ray and Serve,
with the laptop graph up and no request, are stopped for every other evaluation and run for the rest: alternated in one
run, so that what else the machine does meets all sides alike. The evaluation has the niceness of an ordinary process,
and that which Ray gives its workers by default.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import UNet2DConditionModel

from deployments.launcher import laptop_config, running_graph
from pipelines.backends.base import StepBatch
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.processor import precision_here

PORT = 8237
RAYS_NICENESS = 15
"""Of Ray's workers, unless RAY_worker_niceness says otherwise."""
SLOWER = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_enable_metrics_collection": "0",
}
"""Ray's control loops ten times as long, and no metrics."""


def load(precision: str) -> TorchDenoiser:
    """SD1.5's true UNet with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
    if precision == "bfloat16":
        for parameter in unet.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        unet.to(memory_format=torch.channels_last)
    return TorchDenoiser(unet)


def family() -> list[psutil.Process]:
    """What the graph started, and what these started."""
    return psutil.Process().children(recursive=True)


def send(processes: list[psutil.Process], what: signal.Signals) -> None:
    for process in processes:
        if process.is_running():
            process.send_signal(what)


@contextmanager
def stopped(processes: list[psutil.Process]) -> Iterator[None]:
    """Processes that do nothing within the block."""
    send(processes, signal.SIGSTOP)
    try:
        yield
    finally:
        send(processes, signal.SIGCONT)


def set_niceness(niceness: int) -> None:
    """Of every thread of this process; Linux has one for each."""
    for thread in os.listdir("/proc/self/task"):
        os.setpriority(os.PRIO_PROCESS, int(thread), niceness)


def evaluate(denoiser: TorchDenoiser, batch: StepBatch) -> float:
    begin = time.perf_counter()
    denoiser.predict(batch)
    return time.perf_counter() - begin


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes if process.is_running())


def beside(denoiser: TorchDenoiser, batch: StepBatch, repeats: int, environment: dict[str, str]) -> dict[str, Any]:
    """Medians of the sides beside one graph."""
    sides: dict[str, list[float]] = {"graph stopped": [], "beside it": [], f"beside it, nice {RAYS_NICENESS}": []}
    with tempfile.TemporaryDirectory() as scratch:
        config = laptop_config(Path(scratch), PORT, catalog="embedded")
        with running_graph(config, PORT, environment, log=Path(scratch) / "log"):
            processes = family()
            time.sleep(5)  # what follows a start
            evaluate(denoiser, batch)
            begin, used = time.perf_counter(), cpu_seconds(processes)
            time.sleep(5)
            idle = (cpu_seconds(processes) - used) / (time.perf_counter() - begin)
            for _ in range(repeats):
                with stopped(processes):
                    sides["graph stopped"].append(evaluate(denoiser, batch))
                time.sleep(0.5)  # it catches up on what it missed
                sides["beside it"].append(evaluate(denoiser, batch))
                set_niceness(RAYS_NICENESS)
                sides[f"beside it, nice {RAYS_NICENESS}"].append(evaluate(denoiser, batch))
                set_niceness(0)
    medians = {name: statistics.median(seconds) for name, seconds in sides.items()}
    alone = medians["graph stopped"]
    ratios = [
        {name: seconds / first - 1 for name, seconds in zip(sides, pair, strict=True)}
        for pair in zip(*sides.values(), strict=True)
        for first in (pair[0],)
    ]
    return {
        "idle_cores": round(idle, 3),
        "median_s": {name: round(seconds, 3) for name, seconds in medians.items()},
        "best_s": {name: round(min(seconds), 3) for name, seconds in sides.items()},
        "slower_percent": {name: round(100 * (seconds / alone - 1), 1) for name, seconds in medians.items()},
        "paired_median_percent": {
            name: round(100 * statistics.median(ratio[name] for ratio in ratios), 1) for name in sides
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    options = parser.parse_args()
    precision = precision_here(options.precision)
    torch.set_num_threads(os.cpu_count() or 1)
    denoiser = load(precision)
    side = options.pixels // 8
    batch = StepBatch(
        torch.randn(2, 4, side, side), torch.tensor([500.0, 500.0]), torch.randn(2, 77, 768), {}, [(), ()]
    )
    results = {
        name: beside(denoiser, batch, options.repeats, environment)
        for name, environment in {"as Ray starts": {}, "slower loops, no metrics": SLOWER}.items()
    }
    json.dump({"precision": precision, "threads": torch.get_num_threads()} | results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
