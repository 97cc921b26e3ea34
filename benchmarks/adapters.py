"""The cost of adapters: eight of four kinds in one batch compared with the same eight alone, and one in a tick.

One process and thread, the tiny SDXL, guided jobs, medians of CPU time; every comparison alternates its sides. Prints
JSON.

    python -m benchmarks.adapters [--repeats N] [--sides 256 512]

The four kinds are LoRA, DoRA, LoHa and LoKr, two adapters of each, on every attention layer. "By hooks" means that a
LoRA is applied like one that does not fit the slots.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.tick import SAMPLERS, alternate, attention_shapes
from config.catalog import Catalog
from pipelines.adapters.layers import Adapter, Mixture
from pipelines.adapters.reading import AdapterFile
from pipelines.assembly import load_engine, load_text_encoders
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.engine.engine import StepEngine
from pipelines.plan import GenerationParams
from pipelines.planning import make_plan

KINDS = ("LoRA", "DoRA", "LoHa", "LoKr")


def parameters(kind: str, out: int, inner: int, generator: torch.Generator) -> Mapping[str, torch.Tensor]:
    """Of one linear layer, as LyCORIS writes them: rank 8, LoHa's rank 4, LoKr's left factor 4 x 4."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    pair = {"down": random(8, inner), "up": random(out, 8)}
    match kind:
        case "DoRA":
            return pair | {"dora_scale": 1 + random(out, 1)}
        case "LoHa":
            halves = {f"hada_w{side}_a": random(out, 4) for side in "12"}
            return halves | {f"hada_w{side}_b": random(4, inner) for side in "12"}
        case "LoKr":
            return {"lokr_w1": random(4, 4), "lokr_w2": random(out // 4, inner // 4)}
    return pair


def adapter(kind: str, seed: int, denoiser: TorchDenoiser, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    """One adapter of a kind, fitted to a denoiser."""
    generator = torch.Generator().manual_seed(seed)
    layers = {name: parameters(kind, *shape, generator) for name, shape in shapes.items()}
    return denoiser.adapters.fit(AdapterFile(f"{kind} {seed}", layers, {}), denoiser.device, denoiser.dtype)


class Bench:
    """Engines of the tiny SDXL, and guided jobs with adapters."""

    def __init__(self, side: int) -> None:
        self._catalog = Catalog.load("tiny")
        self._encoders = load_text_encoders(self._catalog, "text-encoder-sdxl", "cpu")
        self._side = side

    def engine(self, mixtures: list[str | None], hooks: bool = False) -> StepEngine:
        """An engine with a job for each kind of adapter, None for a job without one."""
        engine = load_engine(self._catalog, "unet-sdxl-base", "cpu", max_rows=64)
        denoiser = engine.denoiser
        assert isinstance(denoiser, TorchDenoiser)
        shapes = attention_shapes(self._catalog, "unet-sdxl-base")
        for index, kind in enumerate(mixtures):
            params = GenerationParams(
                model_name="SDXL1.0-base",
                prompt=f"a fox {index}",
                seed=index,
                steps=100,
                sampler=SAMPLERS[index % len(SAMPLERS)],
                width=self._side,
                height=self._side,
            )
            stage = make_plan(params, self._catalog).stages[0]
            job = engine.prepare(str(index), stage, self._encoders.encode(stage), None)
            if kind is not None:
                made = adapter(kind, index, denoiser, shapes)
                loras: Mixture = ((Adapter(made.name, made.layers) if hooks else made, 0.7),)
                job.loras = loras
            engine.add(job)
        return engine


def together(bench: Bench, repeats: int) -> dict[str, Any]:
    """Eight adapters of four kinds in one batch, and each with an engine of its own."""
    kinds: list[str | None] = [*KINDS, *KINDS]
    shared, alone = bench.engine(kinds), [bench.engine([kind]) for kind in kinds]
    plain, plain_alone = bench.engine([None] * 8), [bench.engine([None]) for _ in range(8)]
    sides = {
        "shared": shared.tick,
        "alone": lambda: [engine.tick() for engine in alone],
        "no adapters, shared": plain.tick,
        "no adapters, alone": lambda: [engine.tick() for engine in plain_alone],
    }
    medians = alternate(sides, repeats, time.process_time)
    ratio = partial(round, ndigits=2)
    return medians | {
        "speedup": ratio(medians["alone"] / medians["shared"]),
        "speedup without adapters": ratio(medians["no adapters, alone"] / medians["no adapters, shared"]),
        "goal": 1.5,
    }


def one(bench: Bench, repeats: int) -> dict[str, float]:
    """A tick of one guided job: plain, and with one adapter of each kind; a LoRA by hooks too."""
    engines = {"plain": bench.engine([None])} | {kind: bench.engine([kind]) for kind in KINDS}
    engines["LoRA by hooks"] = bench.engine(["LoRA"], hooks=True)
    return alternate({name: engine.tick for name, engine in engines.items()}, repeats, time.process_time)


def main() -> None:
    """Run, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="pixels; latents are an eighth")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {}
    for side in options.sides:
        bench = Bench(side)
        result[f"{side} px"] = {
            "eight together": together(bench, options.repeats),
            "one in a tick": one(bench, options.repeats),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
