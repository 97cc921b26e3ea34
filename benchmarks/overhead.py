"""The overhead of the graph: diffusers in one process, text2image.py, and the running graph over HTTP, in one run.

The same request, weights and thread count three ways, alternated in one run; medians. Every repeat has a prompt of its
own, so that the graph's cache of embeddings, which diffusers has not, saves nothing. Also how long the graph takes to
start and what every replica holds in memory. Prints JSON.

    python -m benchmarks.overhead [--real] [--repeats N]     # --real: SD1.5's true configuration at 256 px as well
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from benchmarks.real_models import write_sd15, write_sd15_catalog
from config.catalog import ROOT, Catalog
from deployments.launcher import laptop_config, request_picture, running_graph
from deployments.ray_compat import ray_processes
from pipelines.pictures.images import write_image
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image

PORT = 8231
PROMPT = "a photo of an astronaut riding a horse on mars"


def diffusers_way(pipeline_class: Any, folder: Path, steps: int, side: int) -> Callable[[str], object]:
    """The request through diffusers' pipeline, ending in the same JPEG."""
    pipe = pipeline_class.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def draw(prompt: str) -> object:
        generator = torch.Generator().manual_seed(1)
        size = {"width": side, "height": side}
        image = pipe(prompt, num_inference_steps=steps, guidance_scale=5.0, generator=generator, **size).images[0]
        return write_image(image, "jpeg")

    return draw


def text2image_way(catalog: Catalog, fields: dict[str, Any]) -> Callable[[str], object]:
    """The request through text2image.py."""
    text2image = Text2Image(catalog)

    def draw(prompt: str) -> object:
        return write_image(text2image.generate(GenerationParams(prompt=prompt, **fields)).image, "jpeg")

    return draw


def graph_way(url: str, fields: dict[str, Any]) -> Callable[[str], object]:
    """The request through the running graph."""
    return lambda prompt: request_picture(url, fields | {"prompt": prompt})


def compare(ways: dict[str, Callable[[str], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, alternated, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for draw in ways.values():
        draw(PROMPT)
    for repeat in range(repeats):
        for name, draw in ways.items():
            begin = time.perf_counter()
            draw(f"{PROMPT} {repeat}")
            seconds[name].append(time.perf_counter() - begin)
    return {name: round(statistics.median(values), 4) for name, values in seconds.items()}


def memory() -> dict[str, int]:
    """Resident MiB of every replica of the graph, and of what Serve itself runs."""
    own = ray_processes("ServeReplica", "ProxyActor", "ServeController")
    return {title: process.memory_info().rss // 2**20 for title, process in own}


def watch(url: str, fields: dict[str, Any], count: int = 3) -> None:
    """Watched requests with previews, read to their end: what passes through the ingress must not load torch there."""
    for index in range(count):
        body = fields | {"prompt": f"{PROMPT} watched {index}", "stream": True, "preview": True}
        request = urllib.request.Request(
            f"{url}/v1/image/generation", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            assert b"event: result" in response.read()


def measure(
    name: str, pipeline_class: Any, weights: Path, catalog: str, model: str, steps: int, side: int, repeats: int
) -> dict[str, Any]:
    """One size: the three ways, with the graph's start and memory."""
    fields = {"model_name": model, "seed": 1, "steps": steps, "width": side, "height": side}
    fields |= {"sampler": "Euler", "cfg_scale": 5.0}
    with tempfile.TemporaryDirectory() as scratch:
        path = laptop_config(Path(scratch), PORT, catalog=catalog)
        begin = time.perf_counter()
        # The others are float32 too.
        alike = {"SDGRAPH_TORCH_THREADS": str(torch.get_num_threads()), "SDGRAPH_TVM_PRECISION": "float32"}
        with running_graph(path, PORT, alike, log=Path(scratch) / "log") as url:
            start = time.perf_counter() - begin
            ways = {
                "diffusers": diffusers_way(pipeline_class, weights, steps, side),
                "text2image": text2image_way(Catalog.load(catalog), fields),
                "graph": graph_way(url, fields),
            }
            medians = compare(ways, repeats)
            resident = memory()
            watch(url, fields)
            after_streams = memory()["ServeReplica:sdgraph:ingress"]
    overhead = medians["graph"] - medians["diffusers"]
    goal = 0.010 + 0.02 * medians["diffusers"]
    return {
        "size": name,
        "steps": steps,
        "pixels": side,
        "repeats": repeats,
        "median_s": medians,
        "graph_minus_diffusers_ms": round(overhead * 1000, 1),
        "goal_ms": round(goal * 1000, 1),
        "cold_start_s": round(start, 1),
        "resident_mib": resident,
        "ingress_mib_after_streams": after_streams,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="SD1.5's true configuration at 256 px as well")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    tiny = ROOT / "models" / "tiny"
    results = [
        measure(
            "tiny SDXL",
            StableDiffusionXLPipeline,
            tiny / "sdxl",
            "tiny",
            "SDXL1.0-base",
            30,
            1024,
            options.repeats,
        ),
        measure("tiny SD1.5", StableDiffusionPipeline, tiny / "sd15", "tiny", "SD1.5", 30, 256, options.repeats),
    ]
    if options.real:
        with tempfile.TemporaryDirectory() as scratch:
            weights = write_sd15(Path(scratch) / "weights")
            catalog = write_sd15_catalog(Path(scratch) / "catalog", weights)
            repeats = max(3, options.repeats // 3)
            results.append(
                measure("SD1.5 860 M", StableDiffusionPipeline, weights, str(catalog), "SD1.5", 4, 256, repeats)
            )
    json.dump({"threads": torch.get_num_threads(), "results": results}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
