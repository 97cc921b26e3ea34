"""The time until a LoRA that is copied into a library can be used, and the time its first request takes longer.

The laptop graph over the embedded models, and diffusers' `load_lora_weights` of the same file in this process. Prints
JSON.

    python -m benchmarks.library [--repeats N]
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from diffusers import StableDiffusionPipeline

from config.catalog import ROOT
from deployments.launcher import laptop_config, request_picture, running_graph, with_library

PORT = 8232
LORA = ROOT / "models" / "lora-pixel-art-sd15" / "pytorch_lora_weights.safetensors"
BODY = {"model_name": "SD1.5", "prompt": "a cat on a teal background", "steps": 4, "sampler": "Euler", "seed": 1}


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def first_use(url: str, folder: Path, name: str, refresh: bool) -> dict[str, float]:
    """Copy a LoRA, ask for a picture with it until there is one, then for the same with a LoRA that is loaded."""
    body = BODY | {"loras": {name: 0.9}}
    shutil.copyfile(LORA, folder / f"{name}.safetensors")
    copied = time.perf_counter()
    if refresh:
        urllib.request.urlopen(urllib.request.Request(f"{url}/v1/loras/refresh", method="POST"), timeout=60).read()
    while True:
        begin = time.perf_counter()
        try:
            request_picture(url, body)
            break
        except urllib.error.HTTPError:
            time.sleep(0.05)
    drawn = time.perf_counter()
    again = timed(lambda: request_picture(url, body))
    return {"found_s": begin - copied, "first_picture_s": drawn - begin, "same_again_s": again}


def main() -> None:
    """Measure both ways to find it, and diffusers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "library"
        folder.mkdir()
        config = with_library(laptop_config(Path(scratch), PORT, catalog="embedded"), folder, Path(scratch))
        with running_graph(config, PORT, log=Path(scratch) / "graph.log") as url:
            request_picture(url, BODY)
            for way in ("by itself", "after a refresh"):
                runs = [first_use(url, folder, f"{way.split()[0]}-{i}", way != "by itself") for i in range(repeats)]
                medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                paid = statistics.median(run["first_picture_s"] - run["same_again_s"] for run in runs)
                slowest = max(run["found_s"] for run in runs)
                results[way] = {**medians, "slowest_found_s": slowest, "critical_path_ms": 1000 * paid}
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "models" / "sd15")
    load = functools.partial(pipe.load_lora_weights, LORA.parent)
    loads = [timed(functools.partial(load, adapter_name=f"a{i}")) for i in range(repeats)]
    results["diffusers load_lora_weights"] = {"critical_path_ms": 1000 * statistics.median(loads)}
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
