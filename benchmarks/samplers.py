"""The gain of samplers as tables: a tick compared with diffusers' own steps, alone, with masks, with the UNet.

One process, the tiny SDXL at 1024 px (32x32 latents), guided jobs, medians; sides alternated. Times are those of one
thread, which other processes hardly disturb. Prints JSON.

    python -m benchmarks.samplers [--repeats N]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.tick import SAMPLERS, Bench, alternate
from config.catalog import Catalog
from pipelines.assembly import latent_space
from pipelines.backends.base import Denoiser, StepBatch
from pipelines.engine.engine import StepEngine
from pipelines.families import FAMILIES
from pipelines.plan import InpaintPlan
from pipelines.sampling.latents import Latents
from pipelines.sampling.tables import MOST_TICKS, SamplerTables
from pipelines.weights.files import read_config


class Idle:
    """A denoiser that answers at once, so that only the engine's own work is left."""

    def __init__(self, engine: StepEngine) -> None:
        self.config, self.device, self.dtype = engine.denoiser.config, engine.denoiser.device, engine.denoiser.dtype
        self._answer = torch.randn(16, 4, 32, 32)

    def predict(self, batch: StepBatch) -> torch.Tensor:
        """The same numbers every time."""
        return self._answer[: len(batch.sample)]

    def padding(self, batch: StepBatch) -> int:
        """None."""
        return 0


def tables(bench: Bench, repeats: int) -> dict[str, Any]:
    """Milliseconds of a tick: without the UNet, which is the engine's own time, and with it."""
    idle, unet = Idle(bench.engine), bench.engine.denoiser
    cases: dict[str, tuple[Denoiser, list[str], bool]] = {
        "1 default": (idle, SAMPLERS[:1], False),
        "8 default": (idle, SAMPLERS[:1] * 8, False),
        "8 samplers": (idle, SAMPLERS, False),
        "8 samplers, masked": (idle, SAMPLERS, True),
        "1 default, with the UNet": (unet, SAMPLERS[:1], False),
        "8 samplers, with the UNet": (unet, SAMPLERS, False),
    }
    result: dict[str, Any] = {}
    for case, (denoiser, samplers, masked) in cases.items():
        engines = {
            side: sampling_engine(bench, denoiser, samplers, most_ticks, masked)
            for side, most_ticks in (("tables", MOST_TICKS), ("own steps", 0))
        }
        sides: dict[str, Callable[[], object]] = {side: engine.tick for side, engine in engines.items()}
        ticks = repeats if denoiser is unet else min(repeats * 5, 90)
        medians = alternate(sides, ticks, clock=time.thread_time)
        result[case] = medians | {"times": round(medians["own steps"] / medians["tables"], 2)}
    return result


def sampling_engine(
    bench: Bench, denoiser: Denoiser, samplers: Sequence[str], most_ticks: int, masked: bool
) -> StepEngine:
    """An engine with a job for each sampler, half of its picture `masked` if asked; tables up to `most_ticks`."""
    begin = None
    if masked:
        mask = torch.zeros(1, 1, 32, 32)
        mask[..., 16:] = 1
        begin = Latents(torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)), mask=mask)
    # The tiny model's scheduler, but with the key by which the hub's does not clip.
    config = read_config(bench.catalog.component("unet-sdxl-base"), "scheduler") | {"clip_sample": False}
    space = latent_space(bench.catalog, "unet-sdxl-base")
    tables = SamplerTables(config, most_ticks)
    engine = StepEngine(denoiser, FAMILIES["sdxl"], config, space, bench.engine.loras, max_rows=64, tables=tables)
    for index, sampler in enumerate(samplers):
        stage = bench.stage(index, guided=True).model_copy(update={"sampler": sampler})
        if masked:
            whole = stage.schedule.model_copy(update={"strength": 1.0})
            stage = stage.model_copy(update={"schedule": whole, "inpaint": InpaintPlan()})
        engine.add(engine.prepare(str(index), stage, bench.encoders.encode(stage), begin))
    return engine


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    json.dump(tables(Bench(Catalog.load("tiny")), options.repeats), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
