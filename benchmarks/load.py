"""A bounded mixed load on the whole graph, and what its processes, queues and objects do under it.

    python -m benchmarks.load [--minutes 60] [--warm-up 10] [--clients 4] [--variety 200]

Clients send one request after the other: every kind of model, img2img, ControlNet, LoRAs, refiner, streams, streams
that are left in the middle, bad requests. Every five seconds, of every process: its own memory (USS), threads and open
files; of the whole: objects in Ray's store and requests that wait, as Prometheus reads them. Growth is the slope of a
line through the samples after the warm-up; the tops of the first and the last tenth of them stand beside it.

Prompts, pictures and mixtures of LoRAs repeat after `--variety` requests: with 1 no cache can grow, so what grows
then is no cache.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
import itertools
import json
import random
import re
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from deployments.launcher import laptop_config, running_graph
from deployments.ray_compat import metrics_targets, ray_processes

PORT = 8125
SAMPLE_S = 5.0
PHOTOS = 50
WHOLE = {
    "objects": "ray_object_store_num_local_objects",
    "object_store_bytes": "ray_object_store_used_memory",
    "queued": "ray_serve_deployment_queued_queries",
    "under_way": "ray_serve_replica_processing_queries",
    "outstanding_work": "ray_sdgraph_outstanding_work",
}
"""What is watched of the whole graph -> the series that Ray exports."""


def requests(seed: int, variety: int) -> Iterator[dict[str, Any]]:
    """An endless mixture for the tiny models, seeded; `variety` different prompts, pictures and mixtures of LoRAs."""
    draw = random.Random(seed)
    weights = [round(draw.uniform(-1, 1), 3) for _ in range(variety)]
    for number in itertools.count():
        turn = number % variety
        picture = _photo(turn % PHOTOS)
        small = {"prompt": f"a lighthouse {turn}", "width": 128, "height": 128, "steps": draw.randint(2, 12)}
        large = small | {"width": 256, "height": 256}
        kind = draw.randrange(9)
        if kind == 0:
            yield small | {"model_name": "SD1.5", "sampler": draw.choice(["Euler", "Heun", "DPM SDE", "LMS"])}
        elif kind == 1:
            yield small | {"model_name": "SD2", "image": picture, "strength": 0.9}
        elif kind == 2:
            yield large | {"model_name": "SDXL1.0-base", "enable_refiner": True, "steps": 10}
        elif kind == 3:
            steered = {"controlnet_name": "canny", "controlnet_image": picture}
            yield small | {"model_name": "SD1.5-ControlNet"} | steered
        elif kind == 4:
            mixture = {"Pixel_Art": weights[turn], "Add_Detail": 0.5}
            yield small | {"model_name": "SD1.5", "loras": mixture}
        elif kind == 5:
            yield large | {"model_name": "SDXL-turbo", "steps": 2}
        elif kind == 6:
            yield large | {"model_name": "SSD", "stream": True, "preview": True}
        elif kind == 7:
            yield small | {"model_name": "SD1.5", "stream": True, "steps": 40, "leave": True}
        else:
            yield small | {"model_name": "SD1.5", "sampler": "none"}


@functools.cache
def _photo(number: int) -> str:
    """A picture in base64, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (200, 300, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def send(client: httpx.Client, body: dict[str, Any]) -> str:
    """One request; its status, or how it was left."""
    leave = body.pop("leave", False)
    if not body.get("stream"):
        return str(client.post("/v1/image/generation", json=body).status_code)
    with client.stream("POST", "/v1/image/generation", json=body) as reply:
        for number, line in enumerate(reply.iter_lines()):
            if leave and number > 6:
                return "left"
            if line == "event: error":
                return "event: error"
    return f"{reply.status_code} stream"


def load(url: str, clients: int, variety: int, until: float) -> tuple[Counter[str], list[float]]:
    """Keep `clients` busy; how requests ended, and the seconds of those answered."""
    statuses: Counter[str] = Counter()
    taken: list[float] = []

    def work(seed: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            for body in requests(seed, variety):
                if time.monotonic() > until:
                    return
                begin = time.monotonic()
                statuses[send(client, body)] += 1
                taken.append(time.monotonic() - begin)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses, taken


Samples = dict[str, list[tuple[float, float]]]
"""What was measured -> seconds since the beginning, and the value."""


def watch(until: float) -> dict[str, Samples]:
    """Memory in MiB, threads and open files of every process; objects and waiting requests of the whole."""
    samples: dict[str, Samples] = {}
    begin = time.monotonic()
    own = ray_processes("ServeReplica:sdgraph:", "ProxyActor", "ServeController")
    known = {title.removeprefix("ServeReplica:sdgraph:"): process for title, process in own}
    while time.monotonic() < until:
        measured = {name: _process(process) for name, process in known.items()} | {"graph": _whole()}
        for name, values in measured.items():
            for what, value in values.items():
                of = samples.setdefault(name, {}).setdefault(what, [])
                of.append((time.monotonic() - begin, value))
        time.sleep(SAMPLE_S)
    return samples


def _process(process: psutil.Process) -> dict[str, float]:
    with process.oneshot():
        return {
            "mib": process.memory_full_info().uss / 2**20,
            "threads": process.num_threads(),
            "files": process.num_fds(),
        }


def _whole() -> dict[str, float]:
    """Sums of the series that Ray exports on this machine; one that is not there is 0."""
    text = "".join(httpx.get(f"http://{target}/metrics").text for target in metrics_targets())
    return {
        what: sum(map(float, re.findall(rf"^{series}{{.*}} (\S+)$", text, re.MULTILINE)))
        for what, series in WHOLE.items()
    }


def growth(samples: list[tuple[float, float]], warm_up: float) -> dict[str, float]:
    """Median after the warm-up and at the end, growth an hour by least squares, tops of the first and last tenth."""
    later = [(at, value) for at, value in samples if at >= warm_up]
    values = [value for _, value in later]
    slope, _ = statistics.linear_regression(*zip(*later, strict=True))
    tenth = max(5, len(values) // 10)
    return {
        "warm": round(statistics.median(values[:tenth]), 1),
        "end": round(statistics.median(values[-tenth:]), 1),
        "an_hour": round(slope * 3600, 1),
        "top_of_first_tenth": round(max(values[:tenth]), 1),
        "top_of_last_tenth": round(max(values[-tenth:]), 1),
    }


def main() -> None:
    """Run, and print what happened as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--warm-up", type=float, default=3, help="minutes")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--variety", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = laptop_config(Path(scratch), PORT, catalog="tiny")
        with running_graph(config, PORT, log=Path(scratch) / "log") as url:
            until = time.monotonic() + options.minutes * 60
            samples: dict[str, Samples] = {}
            watcher = threading.Thread(target=lambda: samples.update(watch(until)))
            watcher.start()
            statuses, taken = load(url, options.clients, options.variety, until)
            watcher.join()
    result = {
        "minutes": options.minutes,
        "variety": options.variety,
        "requests": dict(statuses.most_common()),
        "p50_s": round(statistics.median(taken), 2),
        "p95_s": round(statistics.quantiles(taken, n=20)[-1], 2),
        "processes": {
            name: {what: growth(of, options.warm_up * 60) for what, of in values.items()}
            for name, values in sorted(samples.items())
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
