"""Pictures that arrive in time: sdgraph against replicas that hold whole pipelines, on the same cores.

One seeded Poisson trace that mixes models, sizes, samplers, steps, guidance, LoRAs and a ControlNet is replayed against
each, one after the other; the first requests warm both. Reports throughput, latency, the share within the deadline and
peak memory. JSON.

    python -m benchmarks.goodput [--rate 1.0 1.5 2.0] [--seconds 60] [--grouping component] [--threads 1]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from PIL import Image

from deployments.launcher import LOCAL_CONFIG, running_graph
from deployments.ray_compat import ray_processes

PORT = 8232
SAMPLERS = ["DPM++ 2M SDE Karras", "Euler a", "DDIM", "Euler", "UniPC 2M", "DPM++ 2M"]
MIX = [  # model, sides, share
    ("SDXL1.0-base", (512, 768), 0.35),
    ("SD1.5", (256,), 0.2),
    ("SD1.5-ControlNet", (256,), 0.2),
    ("SSD", (512,), 0.15),
    ("SD2", (256,), 0.1),
]
# A third of the requests to models that have LoRAs bring some.
LORAS = [{}, {}, {}, {}, {"Pixel_Art": 0.8}, {"Add_Detail": 0.6, "Pixel_Art": 0.3}]


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes."""

    at: float
    body: dict[str, Any]


def trace(rate: float, seconds: float, seed: int = 7) -> list[Arrival]:
    """Poisson arrivals of `rate` a second."""
    source = random.Random(seed)
    photo = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(photo, "PNG")
    control = {"controlnet_name": "canny", "controlnet_image": base64.b64encode(photo.getvalue()).decode()}
    arrivals: list[Arrival] = []
    now = 0.0
    while (now := now + source.expovariate(rate)) < seconds:
        model, sides, _ = source.choices(MIX, [share for *_, share in MIX])[0]
        side = source.choice(sides)
        body = {"model_name": model, "prompt": f"a lighthouse {len(arrivals)}", "width": side, "height": side}
        body |= {"steps": source.choice([15, 20, 30]), "cfg_scale": source.choice([1.0, 5.0, 7.0])}
        body |= {"sampler": source.choice(SAMPLERS), "seed": len(arrivals)}
        if model in ("SDXL1.0-base", "SD1.5", "SD1.5-ControlNet"):
            body["loras"] = source.choice(LORAS)
        arrivals.append(Arrival(now, body | control if model == "SD1.5-ControlNet" else body))
    return arrivals


class MemoryWatch(threading.Thread):
    """Peak resident bytes of all Serve replicas."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        """Look once a second."""
        while not self.stopped.wait(1):
            self.peak = max(self.peak, sum(p.memory_info().rss for _, p in ray_processes("ServeReplica")))


async def replay(url: str, arrivals: list[Arrival]) -> list[float | None]:
    """Seconds each request took, None where it failed; open loop: nobody waits for an answer to ask."""
    begin = time.perf_counter()

    async def one(client: httpx.AsyncClient, arrival: Arrival) -> float | None:
        await asyncio.sleep(max(0.0, arrival.at - (time.perf_counter() - begin)))
        asked = time.perf_counter()
        try:
            reply = await client.post(url, json=arrival.body)
        except httpx.HTTPError:
            return None
        return time.perf_counter() - asked if reply.status_code == 200 else None

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        return await asyncio.gather(*(one(client, arrival) for arrival in arrivals))


def measure(
    config: dict[str, Any],
    path: str,
    rates: list[float],
    seconds: float,
    deadline: float,
    environment: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One system under every rate."""
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "graph.yaml"
        file.write_text(yaml.safe_dump(config))
        with running_graph(file, PORT, environment, log=Path(scratch) / "log") as url:
            asyncio.run(replay(url + path, trace(1.0, 10, seed=1)))  # warm
            watch = MemoryWatch()
            watch.start()
            for rate in rates:
                arrivals = trace(rate, seconds)
                begin = time.perf_counter()
                taken = asyncio.run(replay(url + path, arrivals))
                wall = time.perf_counter() - begin
                done = sorted(t for t in taken if t is not None)
                good = [t for t in done if t <= deadline]
                results.append(
                    {
                        "rate": rate,
                        "requests": len(arrivals),
                        "failed": len(arrivals) - len(done),
                        "throughput": round(len(done) / wall, 3),
                        "goodput": round(len(good) / wall, 3),
                        "in_time": round(len(good) / len(arrivals), 3),
                        "p50_s": round(statistics.median(done), 2) if done else None,
                        "p95_s": round(done[int(0.95 * (len(done) - 1))], 2) if done else None,
                    }
                )
            watch.stopped.set()
            results.append({"peak_replica_mib": watch.peak // 2**20})
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, nargs="+", default=[1.0, 1.5, 2.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--deadline", type=float, default=10)
    parser.add_argument("--grouping", choices=["role", "component"], default="role", help="of the graph")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each of the graph's replicas")
    parser.add_argument("--graph-only", action="store_true", help="leave the whole pipelines out")
    options = parser.parse_args()
    graph = yaml.safe_load(LOCAL_CONFIG.read_text())
    graph["http_options"]["port"] = PORT
    models = [model for model, *_ in MIX]
    graph["applications"][0]["args"] = {
        "auth": "none",
        "catalog": "tiny",
        "grouping": options.grouping,
        "models": models,
    }
    whole = json.loads(json.dumps(graph))
    whole["applications"][0] |= {
        "import_path": "benchmarks.whole_pipelines:build_app",
        "args": {"replicas": 2, "threads": 1},
    }
    threads = {"SDGRAPH_TORCH_THREADS": str(options.threads)}
    common = (options.rate, options.seconds, options.deadline)
    results: dict[str, Any] = {"deadline_s": options.deadline, "seconds": options.seconds}
    name = f"sdgraph_{options.grouping}_{options.threads}_threads"
    results[name] = measure(graph, "/v1/image/generation", *common, environment=threads)
    if not options.graph_only:
        results["whole_pipelines_2x1_thread"] = measure(whole, "/", *common)
    json.dump(results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
