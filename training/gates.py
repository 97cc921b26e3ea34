"""The gates of the embedded models, asked through the HTTP API of the running graph at default settings. Prints JSON.

    python -m training.gates [--prompts 200] [--model SD1.5 SDXL1.0-base] [--config config/serve.tvm.yaml]

A gate that is not reached is printed with what was reached; the command fails only if the graph does. Grids of pictures
are left in build/gates.
"""

from __future__ import annotations

import argparse
import base64
import functools
import io
import json
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from deployments.launcher import LOCAL_CONFIG, README_REQUEST, request_picture, running_graph
from pipelines.control.annotators import canny
from training import autoencoder, judge
from training.captions import prompt
from training.data import load_sprites
from training.export import MODELS
from training.pictures import grid, to_image
from training.pixels import SQUARE
from training.pool import numbered
from training.sharpness import Sharpness, measured, reconstructed, summary
from training.words import ASKED, BACKGROUNDS, COLOURS, DRAWN, OBJECTS, Subject

SIZE = {"SD1.5": 512, "SDXL1.0-base": 1024, "SSD": 1024, "SDXL-turbo": 1024}
GRIDS = MODELS.parent / "build" / "gates"
STEERED = {"SD1.5": "SD1.5-ControlNet", "SDXL1.0-base": "SDXL-ControlNet"}
TOLERANCE = 128
"""Edges are compared in pictures of so many pixels, one pixel apart at most."""


class Gates:
    """Sends the requests of the gates to a running graph."""

    def __init__(self, url: str, company: int = 4) -> None:
        """Send `company` requests at a time to `url`."""
        self._url, self._company = url, company
        self._judge = judge.load()
        self._sprites = load_sprites().named(list(OBJECTS.values()))

    def draw(self, model: str, requests: list[dict[str, Any]], side: int = 256) -> Tensor:
        """Pictures [n, 3, side, side] in -1..1 of requests that differ in what they give."""
        pixels = SIZE[next((base for base, steered in STEERED.items() if steered == model), model)]
        common = {"model_name": model, "width": pixels, "height": pixels, "output_format": "png"}

        def one(fields: dict[str, Any]) -> Tensor:
            data, _ = request_picture(self._url, common | fields)
            image = Image.open(io.BytesIO(data)).resize((side, side), Image.Resampling.BOX)
            return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1

        with ThreadPoolExecutor(self._company) as pool:
            return torch.stack(list(tqdm(pool.map(one, requests), model, len(requests), mininterval=5)))

    @torch.no_grad()
    def things(self, pictures: Tensor) -> Tensor:
        """The object the judge sees in each picture."""
        scores: Tensor = self._judge(pictures)
        return scores.argmax(1)

    def held_out(self, model: str, count: int, **fields: Any) -> dict[str, Any]:
        """Right backgrounds and objects, and sharpness, over pairs never trained on; leaves a grid of pictures."""
        asked = [ASKED[i % len(ASKED)] for i in range(count)]
        pictures = self.draw(model, [{"prompt": prompt(s), "seed": i} | fields for i, s in enumerate(asked)])
        grid(pictures[: len(ASKED)], GRIDS / f"{model}.png")
        colours = judge.background_colour(pictures) == torch.tensor([s.background for s in asked])
        things = self.things(pictures) == torch.tensor([s.thing for s in asked])
        sharp = measured(pictures, self._sprites, asked)
        return {"background": share(colours), "object": share(things), "sharpness": summary(sharp, self._best(model))}

    @functools.cache  # noqa: B019, as long as the process
    def _best(self, model: str) -> list[Sharpness]:
        folder = MODELS / ("sd15" if SIZE[model] == SIZE["SD1.5"] else "sdxl")
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
        few = list(ASKED)
        return measured(reconstructed(vae, self._sprites, few, SIZE[model]), self._sprites, few)

    def other_prompt(self, model: str, count: int) -> float:
        """Share of seeds whose two pictures, of two objects on one background, show two objects."""
        rng = random.Random(1)
        pairs = [(rng.sample(range(len(DRAWN)), 2), rng.randrange(len(COLOURS))) for _ in range(count)]
        seen = [
            self.things(
                self.draw(model, [{"prompt": prompt(Subject(p[n], c)), "seed": i} for i, (p, c) in enumerate(pairs)])
            )
            for n in (0, 1)
        ]
        return share(seen[0] != seen[1])

    def negative_prompt(self, model: str, count: int) -> float:
        """Share of backgrounds of bare objects that are gone once the negative prompt names them."""
        bare = [{"prompt": f"a {DRAWN[i % len(DRAWN)]}", "seed": i} for i in range(count)]
        before = judge.background_colour(self.draw(model, bare))
        named = [
            fields | {"negative_prompt": f"a {BACKGROUNDS[colour]} background"}
            for fields, colour in zip(bare, before.tolist(), strict=True)
        ]
        return share(judge.background_colour(self.draw(model, named)) != before)

    def edges_kept(self, model: str, sprites: Tensor, count: int) -> dict[str, float]:
        """How much the edges of pictures overlap those of the photo they follow, and of pictures drawn without it."""
        photos, requests = [], []
        for number in range(count):
            subject = ASKED[number % len(ASKED)]
            photo = to_image(numbered(sprites, subject, 10_000 + number, SIZE[model]))
            photos.append(edges(photo))
            buffer = io.BytesIO()
            photo.save(buffer, "PNG")
            steering = {"controlnet_name": "canny", "controlnet_image": base64.b64encode(buffer.getvalue()).decode()}
            requests.append(({"prompt": prompt(subject), "seed": number}, steering))
        steered = self.draw(STEERED[model], [plain | steering for plain, steering in requests])
        free = self.draw(model, [plain for plain, _ in requests])
        shares = {}
        for name, drawn in (("steered", steered), ("free", free)):
            found = [edges(to_image(picture)) for picture in drawn]
            shares[name] = statistics.mean(overlap(a, b) for a, b in zip(photos, found, strict=True))
        shares["times"] = shares["steered"] / shares["free"]
        return {name: round(value, 3) for name, value in shares.items()}

    def pixel_art(self, model: str, count: int) -> dict[str, float]:
        """The share of steps between adjacent pixels that lies on borders of squares, with Pixel_Art at 1 and at 0."""
        prompts = [{"prompt": prompt(s), "seed": i} for i, s in enumerate(ASKED[:count])]
        drawn = {
            weight: self.draw(model, [p | {"loras": {"Pixel_Art": weight}} for p in prompts], 512) for weight in (1, 0)
        }
        return {f"weight {weight}": round(blockiness(pictures), 2) for weight, pictures in drawn.items()}

    def readme_request(self, repeats: int) -> float:
        """Seconds the README's request takes, warm."""
        taken = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            request_picture(self._url, README_REQUEST)
            taken.append(time.perf_counter() - begin)
        return round(statistics.median(taken[1:]), 2)


def edges(image: Image.Image) -> Tensor:
    """Where a picture has edges, a pixel wider than they are, [TOLERANCE, TOLERANCE]."""
    small = canny(image.resize((TOLERANCE, TOLERANCE), Image.Resampling.BOX))
    lines = torch.from_numpy(np.asarray(small).copy())[None, None, :, :, 0].float()
    return functional.max_pool2d(lines, 3, 1, 1)[0, 0] > 0


def overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union."""
    return float((one & other).sum() / (one | other).sum().clamp(min=1))


def blockiness(pictures: Tensor) -> float:
    """Steps between neighbours near the borders of squares over those near their middles; 1 knows no squares."""
    total = {True: 0.0, False: 0.0}
    for along in (2, 3):
        steps = pictures.diff(dim=along).abs().mean(tuple(d for d in range(4) if d != along))
        place = (torch.arange(len(steps)) + 1) % SQUARE
        away = torch.minimum(place, SQUARE - place)
        total[True] += float(steps[away <= SQUARE // 8].mean())
        total[False] += float(steps[away >= SQUARE * 3 // 8].mean())
    return total[True] / total[False]


def share(right: Tensor) -> float:
    """Mean of booleans, in percent."""
    return round(100 * float(right.float().mean()), 1)


def offline() -> dict[str, Any]:
    """What needs no graph: the autoencoders, the judge itself, the size of the weights."""
    known = load_sprites().named(list(OBJECTS.values()))
    files = [path for path in MODELS.rglob("*.safetensors") if "tiny" not in path.parts]
    psnr = {}
    for name, pixels in (("sd15", 512), ("sdxl", 1024)):
        vae = AutoencoderKL.from_pretrained(MODELS / name / "vae", torch_dtype=torch.float32).eval()
        psnr[name] = round(autoencoder.psnr(vae, known, pixels, len(ASKED)), 2)
    return {
        "autoencoder_psnr_db": {"reached": psnr, "gate": 28},
        "judges_own_accuracy_percent": round(100 * judge.accuracy(judge.load(), known, 600), 1),
        "weights_mb": {"reached": round(sum(map(_size, files)) / 1e6, 1), "gate": 100},
        "largest_file_mb": {"reached": round(max(map(_size, files)) / 1e6, 1), "gate": 16},
    }


def _size(path: Path) -> int:
    return path.stat().st_size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--model", nargs="+", default=list(SIZE), choices=list(SIZE))
    parser.add_argument("--config", type=Path, default=LOCAL_CONFIG, help="the graph to ask")
    options = parser.parse_args()
    results = offline()
    GRIDS.mkdir(parents=True, exist_ok=True)
    with running_graph(options.config, log=GRIDS / "graph.log") as url:
        gates = Gates(url)
        sprites = load_sprites().named(list(OBJECTS.values()))
        few = max(10, options.prompts // 10)
        for model in options.model:
            reached = gates.held_out(model, options.prompts)
            results[model] = {
                "background_percent": {"reached": reached["background"], "gate": 95},
                "object_percent": {"reached": reached["object"], "gate": 80},
                "sharpness": {"reached": reached["sharpness"], "gate": "within_3_db_percent 90"},
            }
            if model in STEERED:
                results[model] |= {
                    "other_prompt_other_object_percent": gates.other_prompt(model, few),
                    "negative_prompt_removes_percent": {"reached": gates.negative_prompt(model, few), "gate": 50},
                    "canny_edges": {"reached": gates.edges_kept(model, sprites, few), "gate": "2 times"},
                    "pixel_art_blockiness": {"reached": gates.pixel_art(model, few), "gate": "more at 1 than at 0"},
                }
        results["readme_request_s"] = {"reached": gates.readme_request(3), "gate": 10}
    json.dump(results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
