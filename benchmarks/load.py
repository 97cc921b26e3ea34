"""A bounded mixed load on the whole graph, and what the memory of every replica does under it.

    python -m benchmarks.load [--seconds 600] [--clients 4]

Clients send one request after the other: every kind of model, img2img, ControlNet, LoRAs, refiner, streams, streams
that are left in the middle, bad requests. Memory is each process's own (USS), every five seconds; growth is the slope
of a line through the samples after the warm-up.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from deployments.launcher import laptop_config, running_graph
from deployments.ray_compat import ray_processes

PORT = 8125
SAMPLE_S = 5.0


def requests(seed: int) -> Iterator[dict[str, Any]]:
    """An endless mixture for the tiny models, seeded."""
    draw = random.Random(seed)
    photo = io.BytesIO()
    Image.effect_noise((300, 200), 70).convert("RGB").save(photo, "PNG")
    picture = base64.b64encode(photo.getvalue()).decode()
    for number in itertools.count():
        small = {"prompt": f"a lighthouse {number % 200}", "width": 128, "height": 128, "steps": draw.randint(2, 12)}
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
            mixture = {"Pixel_Art": round(draw.uniform(-1, 1), 3), "Add_Detail": 0.5}
            yield small | {"model_name": "SD1.5", "loras": mixture}
        elif kind == 5:
            yield large | {"model_name": "SDXL-turbo", "steps": 2}
        elif kind == 6:
            yield large | {"model_name": "SSD", "stream": True, "preview": True}
        elif kind == 7:
            yield small | {"model_name": "SD1.5", "stream": True, "steps": 40, "leave": True}
        else:
            yield small | {"model_name": "SD1.5", "sampler": "none"}


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


def load(url: str, clients: int, until: float) -> tuple[Counter[str], list[float]]:
    """Keep `clients` busy; how requests ended, and the seconds of those answered."""
    statuses: Counter[str] = Counter()
    taken: list[float] = []

    def work(seed: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            for body in requests(seed):
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


def watch(until: float) -> dict[str, list[tuple[float, float]]]:
    """Seconds since the beginning and MiB, of every process."""
    samples: dict[str, list[tuple[float, float]]] = {}
    begin = time.monotonic()
    own = ray_processes("ServeReplica:sdgraph:", "ProxyActor", "ServeController")
    known = {title.removeprefix("ServeReplica:sdgraph:"): process for title, process in own}
    while time.monotonic() < until:
        for name, process in known.items():
            memory = process.memory_full_info().uss / 2**20
            samples.setdefault(name, []).append((time.monotonic() - begin, memory))
        time.sleep(SAMPLE_S)
    return samples


def growth(samples: list[tuple[float, float]], warm_up: float) -> dict[str, float]:
    """MiB at the end of the warm-up and at the end, and MiB an hour by least squares between the two."""
    later = [(at, memory) for at, memory in samples if at >= warm_up]
    slope, _ = statistics.linear_regression(*zip(*later, strict=True))
    return {
        "warm_mib": round(statistics.median(memory for _, memory in later[:5]), 1),
        "end_mib": round(statistics.median(memory for _, memory in later[-5:]), 1),
        "mib_an_hour": round(slope * 3600, 1),
    }


def main() -> None:
    """Run, and print what happened as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--warm-up", type=float, default=180)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = laptop_config(Path(scratch), PORT, catalog="tiny")
        with running_graph(config, PORT, log=Path(scratch) / "log") as url:
            until = time.monotonic() + options.seconds
            samples: dict[str, list[tuple[float, float]]] = {}
            watcher = threading.Thread(target=lambda: samples.update(watch(until)))
            watcher.start()
            statuses, taken = load(url, options.clients, until)
            watcher.join()
    result = {
        "seconds": options.seconds,
        "requests": dict(statuses.most_common()),
        "p50_s": round(statistics.median(taken), 2),
        "p95_s": round(statistics.quantiles(taken, n=20)[-1], 2),
        "memory": {name: growth(of, options.warm_up) for name, of in sorted(samples.items())},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
