"""The cost of a tick by rows, shared jobs, LoRAs, ControlNets, strict mode; and the time to load a new LoRA.

One process, the tiny SDXL at 1024 px (32x32 latents), medians; every comparison alternates its sides. Prints JSON.

    python -m benchmarks.tick [--repeats N] [--real-lora] [--placements]

--real-lora: a LoRA of SD1.5's true size from disk. --placements: the ControlNet in a deployment of its own against
colocated, in the real graph over HTTP.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from benchmarks.real_models import write_sd15, write_sd15_catalog
from config.catalog import Catalog
from deployments.launcher import laptop_config, request_picture, running_graph
from pipelines.adapters.layers import Mixture
from pipelines.adapters.reading import AdapterFile
from pipelines.assembly import load_controlnets, load_engine, load_text_encoders
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.control.nets import ColocatedControl
from pipelines.control.types import ControlHint
from pipelines.control_plan import ControlUse
from pipelines.engine.engine import StepEngine
from pipelines.plan import GenerationParams, StagePlan
from pipelines.planning import make_plan
from pipelines.text.encoders import TextEncoderStack
from pipelines.weights.files import read_config

PORT = 8233
SAMPLERS = ["DPM++ 2M SDE Heun Karras", "Euler a", "Heun", "DDIM", "UniPC 2M", "LMS", "DPM++ 2M", "DPM2 a"]


class Bench:
    """An engine of the tiny SDXL and jobs for it."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.encoders: TextEncoderStack = load_text_encoders(catalog, "text-encoder-sdxl", "cpu")
        self.engine = load_engine(catalog, "unet-sdxl-base", "cpu", max_rows=64)
        self.strict = load_engine(catalog, "unet-sdxl-base", "cpu", max_rows=64, strict=True)
        nets = ColocatedControl(load_controlnets(catalog, ["controlnet-sdxl-union"], "cpu"))
        self.engine.control = nets
        self.jobs = 0

    def stage(self, index: int, guided: bool = False) -> StagePlan:
        """The plan of a job: another sampler for each, so that a shared tick is always mixed."""
        params = GenerationParams(
            model_name="SDXL1.0-base",
            prompt=f"a fox {index}",
            seed=index,
            steps=100 + index,
            cfg_scale=5.0 if guided else 1.0,
            sampler=SAMPLERS[index % len(SAMPLERS)],
        )
        return make_plan(params, self.catalog).stages[0]

    def fill(self, engine: StepEngine, jobs: int, loras: Mixture = (), controlled: int = 0) -> None:
        """Replace the engine's jobs."""
        engine.clear()
        for index in range(jobs):
            stage = self.stage(index)
            hint = ControlHint(str(index), "controlnet-sdxl-union", 3, torch.rand(1, 3, 1024, 1024))
            use = ControlUse(name="canny", component=hint.component, mode=hint.mode, preprocess=False)
            hints = (hint,) if index < controlled else ()
            stage = stage.model_copy(update={"controls": (use,) if hints else ()})
            self.jobs += 1
            job = engine.prepare(str(self.jobs), stage, self.encoders.encode(stage), None, hints)
            job.loras = loras
            engine.add(job)


def alternate(
    sides: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median milliseconds of each side, alternated after a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(repeats):
        for name, run in sides.items():
            begin = clock()
            run()
            taken[name].append(clock() - begin)
    return {name: round(statistics.median(values) * 1000, 3) for name, values in taken.items()}


def rows(bench: Bench, repeats: int) -> dict[str, Any]:
    """Milliseconds of a tick by its rows, and for each row."""
    result = {}
    for count in (1, 2, 4, 8, 16):
        bench.fill(bench.engine, count)
        tick = alternate({"tick": bench.engine.tick}, repeats)["tick"]
        result[str(count)] = {"tick_ms": tick, "ms_a_row": round(tick / count, 2)}
    return result


def company(bench: Bench, repeats: int) -> dict[str, Any]:
    """Eight jobs of eight samplers: one shared tick against eight ticks, one after the other."""
    bench.fill(bench.engine, 8)
    alone = [load_engine(bench.catalog, "unet-sdxl-base", "cpu") for _ in range(8)]
    for index, engine in enumerate(alone):
        stage = bench.stage(index)
        engine.add(engine.prepare("job", stage, bench.encoders.encode(stage), None))
    medians = alternate({"shared": bench.engine.tick, "sequential": lambda: [e.tick() for e in alone]}, repeats)
    return medians | {"speedup": round(medians["sequential"] / medians["shared"], 2), "goal": 1.8}


def attention_shapes(catalog: Catalog, component_id: str) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of every attention projection of a UNet, which LoRAs usually touch; no weights are read."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_config(catalog.component(component_id)))
    return {
        name: (module.out_features, module.in_features)
        for name, module in unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }


def prices(bench: Bench, repeats: int) -> dict[str, Any]:
    """A tick of eight rows: plain, with a LoRA on every attention layer of every row, with ControlNet, strict."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, (out, inner) in attention_shapes(bench.catalog, "unet-sdxl-base").items():
        down = torch.randn(8, inner, generator=generator) * 0.01
        layers[name] = {"down": down, "up": torch.randn(out, 8, generator=generator) * 0.01}
    denoiser = bench.engine.denoiser
    assert isinstance(denoiser, TorchDenoiser)
    mixture: Mixture = (
        (denoiser.adapters.fit(AdapterFile("bench", layers, {}), denoiser.device, denoiser.dtype), 0.7),
    )
    variants: dict[str, tuple[StepEngine, dict[str, Any]]] = {
        "plain": (bench.engine, {}),
        "lora_on_all_8": (bench.engine, {"loras": mixture}),
        "controlnet_on_4_of_8": (bench.engine, {"controlled": 4}),
        "strict": (bench.strict, {}),
    }
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, (engine, options) in variants.items():
            bench.fill(engine, 8, **options)
            engine.tick()  # every variant pays its set-up outside the measurement
            begin = time.perf_counter()
            engine.tick()
            taken[name].append(time.perf_counter() - begin)
    return {name: round(statistics.median(values) * 1000, 2) for name, values in taken.items()}


def unseen_lora(repeats: int) -> dict[str, Any]:
    """Time from a LoRA file on disk to the mixture a job is added with, at SD1.5's true size: rank 16, attention."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        catalog_folder = write_sd15_catalog(folder / "catalog", write_sd15(folder / "weights"))
        state = {}
        for name, (out, inner) in attention_shapes(Catalog.load(catalog_folder), "unet-sd15").items():
            state[f"unet.{name}.lora_A.weight"] = torch.randn(16, inner)
            state[f"unet.{name}.lora_B.weight"] = torch.randn(out, 16)
        entries = []
        for index in range(repeats):
            save_file(state, folder / f"{index}.safetensors")
            weights = [{"bases": ["unet-sd15"], "source": {"folder": str(folder)}, "file": f"{index}.safetensors"}]
            entries.append({"name": f"lora {index}", "weights": weights})
        (catalog_folder / "loras.yaml").write_text(json.dumps(entries))
        catalog = Catalog.load(catalog_folder)
        engine = load_engine(catalog, "unet-sd15", "cpu")
        taken = []
        for index in range(repeats):
            params = GenerationParams(
                model_name="SD1.5", prompt="x", loras={f"lora {index}": 1.0}, width=512, height=512
            )
            stage = make_plan(params, catalog).stages[0]
            begin = time.perf_counter()
            engine.loras.mixture(stage)
            taken.append(time.perf_counter() - begin)
        size = sum(tensor.nbytes for tensor in state.values())
    return {"file_mib": round(size / 2**20, 1), "ms": round(statistics.median(taken) * 1000, 1), "goal_ms": 150}


def placements(repeats: int) -> dict[str, Any]:
    """Milliseconds a step of SD1.5-ControlNet at 512 px, alone and four at once, by where the ControlNet is."""
    photo = io.BytesIO()
    Image.effect_noise((512, 512), 80).convert("RGB").save(photo, "PNG")
    steps = 8
    body = {"model_name": "SD1.5-ControlNet", "prompt": "a fox", "width": 512, "height": 512, "steps": steps}
    body |= {"controlnet_name": "canny", "controlnet_image": base64.b64encode(photo.getvalue()).decode()}
    body |= {"sampler": "Euler"}

    def step_ms(url: str, company: int) -> float:
        with ThreadPoolExecutor(company) as pool:
            replies = list(pool.map(lambda seed: request_picture(url, body | {"seed": seed}), range(company)))
        times = [re.search(r"denoise_unet-sd15;dur=([\d.]+)", headers["server-timing"]) for _, headers in replies]
        return statistics.median(float(found[1]) for found in times if found) / steps

    result: dict[str, Any] = {}
    for placement in ("deployment", "colocated"):
        args: dict[str, Any] = {"catalog": "tiny", "models": ["SD1.5-ControlNet"], "controlnet_placement": placement}
        with tempfile.TemporaryDirectory() as scratch:
            config = laptop_config(Path(scratch), PORT, **args)
            with running_graph(config, PORT, log=Path(scratch) / "log") as url:
                step_ms(url, 4)  # warm
                taken = {f"{n}_at_once": [step_ms(url, n) for _ in range(repeats)] for n in (1, 4)}
        result[placement] = {name: round(statistics.median(values), 1) for name, values in taken.items()}
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--real-lora", action="store_true", help="a LoRA of SD1.5's true size from disk")
    parser.add_argument("--placements", action="store_true", help="the ControlNet remote and colocated, over HTTP")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    bench = Bench(Catalog.load("tiny"))
    results = {
        "threads": torch.get_num_threads(),
        "rows": rows(bench, options.repeats),
        "heterogeneous_batch_of_8_rows_ms": company(bench, options.repeats),
        "prices_of_a_tick_of_8_rows_ms": prices(bench, options.repeats),
    }
    if options.real_lora:
        results["lora_never_seen"] = unseen_lora(min(options.repeats, 5))
    if options.placements:
        results["controlnet_placement_ms_a_step"] = placements(min(options.repeats, 5))
    json.dump(results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
