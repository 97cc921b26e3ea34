"""The cost of a second control in a tick, compared with diffusers' pipelines.

    python -m benchmarks.controls [--repeats 5] [--side 512]

One guided picture of the embedded SD1.5 with no control, one canny map and two of different weights; of the tiny SD1.5
with none, one and two ControlNets; of the tiny SDXL with none, one and two modes of its union ControlNet. Then four
pictures with none, one, two and three maps in one tick, against the same four one after the other. CPU time of this
thread, medians of all ticks, alternated. Goal: two controls at most 1.9 times one.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, MultiControlNetModel
from PIL import Image

from config.catalog import ROOT, Catalog
from pipelines.control_plan import ControlParams
from pipelines.engine.engine import StepEngine
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image

STEPS = 8
GOAL = 1.9
WEIGHTS = (1.0, 0.6, 0.8)


def control_map(position: int, side: int) -> Image.Image:
    """Edges as dense as a photo's, others for each control."""
    noise = Image.effect_noise((side // 8, side // 8), 60 + 20 * position).resize((side, side))
    return noise.point(lambda value: 255 * (value > 150)).convert("RGB")


def controls(names: Sequence[str], side: int) -> tuple[ControlParams, ...]:
    """Controls with ready maps, for the whole schedule."""
    made = []
    for position, name in enumerate(names):
        buffer = io.BytesIO()
        control_map(position, side).save(buffer, "PNG")
        weight = WEIGHTS[position]
        made.append(ControlParams(name=name, image=buffer.getvalue(), weight=weight, preprocess=False))
    return tuple(made)


class Ours:
    """Pictures over this project's engine."""

    def __init__(self, catalog: str, model: str, side: int) -> None:
        self._catalog = Catalog.load(catalog)
        self._text2image = Text2Image(self._catalog)
        self._model, self._side = model, side

    def ticks(self, company: Sequence[Sequence[str]]) -> list[float]:
        """CPU seconds of the ticks that draw pictures with these controls together, the first left out."""
        requests = [
            GenerationParams(
                model_name=self._model,
                prompt="a cat",
                width=self._side,
                height=self._side,
                steps=STEPS,
                sampler="Euler",
                seed=seed,
                controlnets=controls(names, self._side),
            )
            for seed, names in enumerate(company)
        ]
        engine = self._text2image.torch_engine(self._catalog.model(self._model).unet)
        taken: list[float] = []
        tick = StepEngine.tick

        def timed() -> Any:
            begin = time.thread_time()
            report = tick(engine)
            taken.append(time.thread_time() - begin)
            return report

        engine.tick = timed  # type: ignore[method-assign]
        self._text2image.generate_many(requests)
        return taken[1:]


class Theirs:
    """The same by diffusers' pipelines, one picture at a time."""

    def __init__(self, folder: str, net: Callable[[int], Any], side: int, names: tuple[str, str], modes: Any) -> None:
        """`names` are the pipelines without and with ControlNets, `net` makes what steers so many maps."""
        self._base = getattr(diffusers, names[0]).from_pretrained(ROOT / folder, torch_dtype=torch.float32)
        self._net, self._side, self._steered, self._modes = net, side, names[1], modes

    def ticks(self, count: int) -> list[float]:
        """CPU seconds of the steps of one picture with so many maps, the first left out."""
        pipe, given = self._base, dict[str, Any]()
        if count:
            extra: dict[str, Any] = {"add_watermarker": False} if self._modes else {"requires_safety_checker": False}
            pipe = getattr(diffusers, self._steered)(**self._base.components, controlnet=self._net(count), **extra)
            maps = [control_map(i, self._side) for i in range(count)]
            given = {"control_image" if self._modes else "image": maps}
            given["controlnet_conditioning_scale"] = list(WEIGHTS[:count])
            if self._modes:
                given["control_mode"] = self._modes[:count]
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(self._base.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        at: list[float] = []

        def note(_pipe: Any, _step: int, _timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            at.append(time.thread_time())
            return kept

        size = {"width": self._side, "height": self._side, "num_inference_steps": STEPS, "output_type": "latent"}
        pipe("a cat", generator=torch.Generator().manual_seed(0), callback_on_step_end=note, **size, **given)
        return [after - before for before, after in itertools.pairwise(at)]


def compared(ours: Ours, theirs: Theirs, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Milliseconds of a tick by the number of controls."""
    taken: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        for count in range(3):
            taken.setdefault(("ours", count), []).extend(ours.ticks([names[:count]]))
            taken.setdefault(("diffusers", count), []).extend(theirs.ticks(count))
    told: dict[str, Any] = {}
    for who in ("ours", "diffusers"):
        none, one, two = (round(1000 * statistics.median(taken[who, count]), 1) for count in range(3))
        told[who] = {"none": none, "one": one, "two": two, "two_to_one": round(two / one, 2)}
    return told | {"goal": GOAL, "met": told["ours"]["two_to_one"] <= GOAL}


def together(ours: Ours, name: str, repeats: int) -> dict[str, float]:
    """Milliseconds of a tick of four pictures, and of the same ticks one after the other."""
    company = [[name] * count for count in range(4)]
    shared, alone = [], []
    for _ in range(repeats):
        shared += ours.ticks(company)
        alone.append(sum(statistics.median(ours.ticks([own])) for own in company))
    medians = {"one_tick": 1000 * statistics.median(shared), "four_ticks": 1000 * statistics.median(alone)}
    return {what: round(value, 1) for what, value in medians.items()}


def tiny_net(name: str) -> ControlNetModel:
    """One of the tiny ControlNets of SD1.5."""
    return ControlNetModel.from_pretrained(ROOT / f"models/tiny/controlnet-sd15-{name}").eval()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    side = options.side
    canny = ControlNetModel.from_pretrained(ROOT / "models/controlnet-canny-sd15", torch_dtype=torch.float32).eval()
    union = ControlNetUnionModel.from_pretrained(ROOT / "models/tiny/controlnet-sdxl-union").eval()
    sd = Theirs(
        "models/sd15",
        lambda count: MultiControlNetModel([canny] * count),
        side,
        ("StableDiffusionPipeline", "StableDiffusionControlNetPipeline"),
        None,
    )
    sdxl = Theirs(
        "models/tiny/sdxl",
        lambda count: union,
        side,
        ("StableDiffusionXLPipeline", "StableDiffusionXLControlNetUnionPipeline"),
        [3, 1],
    )
    tiny = Theirs(
        "models/tiny/sd15",
        lambda count: MultiControlNetModel([tiny_net("canny"), tiny_net("soft")][:count]),
        side,
        ("StableDiffusionPipeline", "StableDiffusionControlNetPipeline"),
        None,
    )
    embedded, tiny_sd = Ours("embedded", "SD1.5", side), Ours("tiny", "SD1.5", side)
    results = {
        "sd15_plain_controlnets_ms_a_tick": compared(embedded, sd, ["canny"] * 2, options.repeats),
        "tiny_sd15_two_controlnets_ms_a_tick": compared(tiny_sd, tiny, ["canny", "softedge"], options.repeats),
        "tiny_sdxl_union_ms_a_tick": compared(
            Ours("tiny", "SDXL1.0-base", side), sdxl, ["canny", "depth"], options.repeats
        ),
        "sd15_none_one_two_three_ms": together(embedded, "canny", options.repeats),
    }
    json.dump(results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
