"""A bounded mixed load on the whole graph, with the memory, queues and objects of its processes under it.

    python -m benchmarks.load [--minutes 60] [--warm-up 10] [--rate 0.4] [--variety 40] [--catalog embedded]

Requests begin at random moments, `--rate` a second on the average: every kind of model, img2img, masks, ControlNet,
LoRAs, refiner, weighted and long prompts, OpenAI's form, streams that are read and streams that are left in the middle,
bad requests. One that finds `--clients` others under way waits for its turn. Every fifteen seconds, of every process
that Ray started: its own memory (USS), threads and open files; of the whole: objects in Ray's store and requests that
wait, as Prometheus reads them. Samples go to build/load.json as they come; `--read` prints what such a file says.

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
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageDraw

from benchmarks.growth import Samples, Watch, growth
from deployments.launcher import ROOT, laptop_config, running_graph

PORT = 8125
SAMPLE_S = 15.0
PHOTOS = 50
PATH = "/v1/image/generation"
LONG = "a lighthouse on a cliff above the sea at dawn, " * 12


def requests(seed: int, variety: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of kinds, and their bodies, without end; `variety` different prompts, pictures and mixtures of LoRAs."""
    draw = random.Random(seed)
    weights = [round(draw.uniform(-1, 1), 3) for _ in range(variety)]
    for number in itertools.count():
        turn = number % variety
        picture = _photo(turn % PHOTOS)
        small = {"model_name": "SD1.5", "prompt": f"a lighthouse {turn}", "width": 128, "height": 128}
        small |= {"steps": draw.randint(2, 12)}
        large = small | {"width": 256, "height": 256}
        steered = {"controlnet_name": "canny", "controlnet_image": picture}
        kinds: Mapping[str, dict[str, Any]] = {
            "sampler": small | {"sampler": draw.choice(["Euler", "Heun", "DPM SDE", "LMS"])},
            "img2img": small | {"model_name": "SD2", "image": picture, "strength": 0.9},
            "mask": small | {"image": picture, "mask_image": _mask(), "mask_blur": 4, "inpaint_area": "masked"},
            "refiner": large | {"model_name": "SDXL1.0-base", "enable_refiner": True, "steps": 10},
            "controlnet": small | {"model_name": "SD1.5-ControlNet"} | steered,
            "sdxl controlnet": large | {"model_name": "SDXL-ControlNet"} | steered,
            "lora": small | {"loras": {"Pixel_Art": weights[turn]}},
            "sdxl lora": large | {"model_name": "SDXL1.0-base", "loras": {"Pixel_Art": weights[turn]}},
            "turbo": large | {"model_name": "SDXL-turbo", "steps": 2},
            "weighted": small | {"prompt": f"a (red:1.3) lighthouse {turn}", "prompt_syntax": "weighted"},
            "long": small | {"prompt": f"{turn} {LONG}"},
            "openai": {"model": "SD1.5", "prompt": f"a lighthouse {turn}", "size": "128x128", "steps": 4, "n": 2},
            "read stream": large | {"model_name": "SSD", "stream": True, "preview": True},
            "left stream": small | {"stream": True, "preview": True, "steps": 60},
            "unknown sampler": small | {"sampler": "none"},
            "broken picture": small | {"image": "bm90aGluZw=="},
        }
        yield draw.choice(list(kinds.items()))


@functools.cache
def _photo(number: int) -> str:
    """A picture in base64, another one for each number."""
    return _png(Image.fromarray(np.random.default_rng(number).integers(0, 256, (200, 300, 3), np.uint8)))


@functools.cache
def _mask() -> str:
    mask = Image.new("L", (300, 200))
    ImageDraw.Draw(mask).rectangle((80, 60, 200, 140), fill=255)
    return _png(mask)


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def send(client: httpx.Client, kind: str, body: dict[str, Any]) -> str:
    """One request; its status, or how it was left."""
    if not body.get("stream"):
        path = "/v1/images/generations" if kind == "openai" else PATH
        return str(client.post(path, json=body).status_code)
    with client.stream("POST", PATH, json=body) as reply:
        for number, line in enumerate(reply.iter_lines()):
            if kind == "left stream" and number > 6:
                return "left"
            if line == "event: error":
                return "event: error"
    return str(reply.status_code)


def load(url: str, rate: float, clients: int, variety: int, until: float) -> dict[str, Any]:
    """Send until a moment; how requests of each kind ended, and the seconds they took."""
    statuses: Counter[str] = Counter()
    taken: list[float] = []
    failures: list[BaseException] = []
    pause = random.Random(0)

    def one(kind: str, body: dict[str, Any]) -> None:
        begin = time.monotonic()
        try:
            statuses[f"{kind}: {send(client, kind, body)}"] += 1
        except httpx.HTTPError as error:
            statuses[f"{kind}: {type(error).__name__}"] += 1
        taken.append(time.monotonic() - begin)

    with httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(clients) as pool:
        for kind, body in requests(0, variety):
            if time.monotonic() > until:
                break
            pool.submit(one, kind, body).add_done_callback(
                lambda sent: failures.extend(filter(None, [sent.exception()]))
            )
            time.sleep(pause.expovariate(rate))
    if failures:
        raise failures[0]
    return {
        "requests": dict(sorted(statuses.items())),
        "p50_s": round(statistics.median(taken), 2),
        "p95_s": round(statistics.quantiles(taken, n=20)[-1], 2),
    }


def watch(file: Path, until: float) -> Watch:
    """Sample until a moment."""
    seen = Watch(file)
    while time.monotonic() < until:
        seen.measure()
        time.sleep(SAMPLE_S)
    return seen


def report(samples: Mapping[str, Mapping[str, Samples]], warm_up: float) -> dict[str, Any]:
    """Growth of all that was there from the warm-up to the end; names of processes that came or went."""
    last = max(at for at, _ in samples["graph"]["objects"])
    kept, passing = {}, []
    for name, values in sorted(samples.items()):
        times = [at for at, _ in next(iter(values.values()))]
        if times[0] > warm_up or times[-1] < last - 2 * SAMPLE_S:
            passing.append(name)
        else:
            kept[name] = {what: growth(of, warm_up) for what, of in values.items()}
    return {"came_or_went": passing, "growth": kept}


def main() -> None:
    """Run, and print what happened as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--warm-up", type=float, default=3, help="minutes")
    parser.add_argument("--rate", type=float, default=0.4, help="requests a second")
    parser.add_argument("--clients", type=int, default=4, help="requests under way at most")
    parser.add_argument("--variety", type=int, default=40)
    parser.add_argument("--catalog", default="embedded")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--samples", type=Path, default=ROOT / "build" / "load.json")
    parser.add_argument("--read", action="store_true", help="no run; what the file of an earlier one says")
    options = parser.parse_args()
    warm_up = options.warm_up * 60
    if options.read:
        print(json.dumps(report(json.loads(options.samples.read_text()), warm_up), indent=1))
        return
    options.samples.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        config = laptop_config(Path(scratch), options.port, application="load", catalog=options.catalog)
        with running_graph(config, options.port, log=options.samples.with_suffix(".log")) as url:
            until = time.monotonic() + options.minutes * 60
            with ThreadPoolExecutor(1) as aside:
                watching = aside.submit(watch, options.samples, until)
                ended = load(url, options.rate, options.clients, options.variety, until)
                samples = watching.result().samples
    result = {"minutes": options.minutes, "rate": options.rate, "variety": options.variety} | ended
    print(json.dumps(result | report(samples, warm_up), indent=1))


if __name__ == "__main__":
    main()
