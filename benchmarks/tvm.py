"""One UNet evaluation on every backend: torch eager, channels_last, torch.compile, and tvm. Prints JSON.

    python -m benchmarks.tvm [--model sd15-512 ...] [--repeats 5] [--no-torch-compile]

Real configurations with random weights, and the embedded models; a guided request, two rows. First all sides in one
process, alternated, so that what else the machine does meets them alike; then torch eager and tvm each alone in a fresh
process, since two thread pools in one process disturb each other. The environment TVM needs is set here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THREADS = str(os.cpu_count() or 1)
os.environ |= {
    "TVM_BIND_THREADS": "0",
    "TVM_NUM_THREADS": THREADS,
    "TVM_THREAD_POOL_SPIN_COUNT": "0",
    "GOMP_SPINCOUNT": "0",
}

import psutil  # noqa: E402
import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402

from config.catalog import ROOT  # noqa: E402
from config.sources import TVM_CACHE  # noqa: E402
from pipelines.backends.base import StepBatch  # noqa: E402
from pipelines.backends.torch_backend import TorchDenoiser  # noqa: E402
from pipelines.backends.tvm.artifacts import (  # noqa: E402
    Artifact,
    ArtifactCache,
    ArtifactKey,
    best_level,
    config_hash,
    sources_hash,
)
from pipelines.backends.tvm.compile import compile_unet  # noqa: E402
from pipelines.backends.tvm.denoiser import PackedWeights, TvmDenoiser, load_programs, trial_batch  # noqa: E402

SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# SSD-1B as published: transformer layers removed, the mid block without attention.
SSD = SDXL | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (1, 2, 4),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), (1, 1, 1)),
}
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}


@dataclass(frozen=True)
class Case:
    """A UNet and a size of its table."""

    config: dict[str, Any] | Path
    latents: tuple[int, int]
    tokens: int = 77
    pooled: int = 0


CASES = {
    "sd15-512": Case(SD15, (64, 64)),
    "sd15-256": Case(SD15, (32, 32)),
    "sd2-512": Case(SD2, (64, 64)),
    "sd2-768": Case(SD2, (96, 96)),
    "ssd-1024": Case(SSD, (128, 128), pooled=1280),
    "sdxl-1024": Case(SDXL, (128, 128), pooled=1280),
    "embedded-sd15-512": Case(ROOT / "models" / "sd15", (16, 16), tokens=64),
    "embedded-sdxl-1024": Case(ROOT / "models" / "sdxl", (16, 16), tokens=64, pooled=256),
    "embedded-ssd-1024": Case(ROOT / "models" / "ssd", (16, 16), tokens=64, pooled=256),
}


def load(case: Case) -> UNet2DConditionModel:
    if isinstance(case.config, Path):
        return UNet2DConditionModel.from_pretrained(case.config / "unet").float().eval()
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=case.latents[0], **case.config).eval()


def key_of(case: Case, unet: UNet2DConditionModel) -> ArtifactKey:
    height, width = case.latents
    shape = {"height": height, "width": width, "rows": 2, "tokens": case.tokens, "pooled": case.pooled}
    config = json.loads(unet.to_json_string())
    return ArtifactKey(config=config_hash(config), control=False, level=best_level(), sources=sources_hash(), **shape)


def evaluate(denoiser: Any, batch: StepBatch) -> tuple[float, torch.Tensor]:
    begin = time.perf_counter()
    output = denoiser.predict(batch)
    return time.perf_counter() - begin, output


def resident_gib() -> float:
    return round(psutil.Process().memory_info().rss / 2**30, 2)


class Sides:
    """The backends of one case, made one after the other over the same weights."""

    def __init__(self, case: Case) -> None:
        self.unet = load(case)
        self.key = key_of(case, self.unet)
        self.facts: dict[str, Any] = {"parameters_m": round(sum(p.numel() for p in self.unet.parameters()) / 1e6)}

    def eager(self) -> TorchDenoiser:
        """Torch as it is."""
        return TorchDenoiser(self.unet)

    def channels_last(self) -> Any:
        """Torch with its weights in NHWC; in place."""
        return TorchDenoiser(self.unet.to(memory_format=torch.channels_last))

    def compiled(self, batch: StepBatch) -> Any:
        """torch.compile of the UNet's forward, its first call included in the cold seconds."""
        unet: Callable[..., Any] = torch.compile(self.unet)

        class Compiled:
            @torch.inference_mode()
            def predict(self, batch: StepBatch) -> torch.Tensor:
                added = dict(batch.added_conditions) or None
                output: torch.Tensor = unet(
                    batch.sample, batch.timesteps, batch.prompt_embeds, added_cond_kwargs=added, return_dict=False
                )[0]
                return output

        denoiser = Compiled()
        self.facts["torch_compile_s"] = round(evaluate(denoiser, batch)[0], 1)
        return denoiser

    def program(self) -> Artifact:
        """The compiled program, made now if need be."""
        config = json.loads(self.unet.to_json_string())
        artifact, _ = ArtifactCache(TVM_CACHE).make(self.key, lambda path: compile_unet(config, self.key, path))
        self.facts["tvm_compile_s"] = artifact.compile_seconds
        return artifact

    def tvm(self) -> TvmDenoiser:
        """The program over packed weights."""
        weights = PackedWeights(self.unet.state_dict())
        before, begin = resident_gib(), time.perf_counter()
        denoiser = TvmDenoiser(dict(self.unet.config), load_programs(ArtifactCache(TVM_CACHE), [self.key], weights))
        self.facts["pack_s"] = round(weights.seconds, 1)
        self.facts["load_s"] = round(time.perf_counter() - begin - weights.seconds, 2)
        self.facts["packed_gib"] = round(resident_gib() - before, 2)
        weights.forget()
        return denoiser


def alternate(denoisers: dict[str, Any], batch: StepBatch, repeats: int) -> dict[str, Any]:
    """Median and best seconds of each side, one after the other in every round, after a warm-up."""
    outputs = {name: evaluate(denoiser, batch)[1] for name, denoiser in denoisers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in denoisers}
    for _ in range(repeats):
        for name, denoiser in denoisers.items():
            seconds[name].append(evaluate(denoiser, batch)[0])
    reference = outputs["eager"]
    return {
        "median_s": {name: round(statistics.median(s), 4) for name, s in seconds.items()},
        "best_s": {name: round(min(s), 4) for name, s in seconds.items()},
        "relative_error": float((outputs["tvm"] - reference).norm() / reference.norm()),
    }


def together(name: str, repeats: int, torch_compile: bool) -> dict[str, Any]:
    """All sides in this process. channels_last changes the weights in place, so it has rounds of its own with eager."""
    sides = Sides(CASES[name])
    batch = trial_batch(dict(sides.unet.config), sides.program())
    denoisers: dict[str, Any] = {"eager": sides.eager(), "tvm": sides.tvm()}
    if torch_compile:
        denoisers["torch.compile"] = sides.compiled(batch)
    result = alternate(denoisers, batch, repeats)
    denoisers = {"eager": denoisers["eager"], "tvm": denoisers["tvm"]}
    denoisers["channels_last"] = sides.channels_last()
    denoisers.pop("eager")
    seconds: dict[str, list[float]] = {side: [] for side in denoisers}
    for step in range(repeats + 1):
        for side, denoiser in denoisers.items():
            taken = evaluate(denoiser, batch)[0]
            if step:
                seconds[side].append(taken)
    result["median_s"]["channels_last"] = round(statistics.median(seconds["channels_last"]), 4)
    result["median_s"]["tvm beside channels_last"] = round(statistics.median(seconds["tvm"]), 4)
    median = result["median_s"]
    result["tvm_times_as_fast_as"] = {
        side: round(median[side] / median["tvm"], 2) for side in ("eager", "torch.compile") if side in median
    }
    result["tvm_times_as_fast_as"]["channels_last"] = round(
        median["channels_last"] / median["tvm beside channels_last"], 2
    )
    return sides.facts | result


def alone(name: str, side: str, repeats: int) -> dict[str, Any]:
    """One side in this process: what `together` starts a fresh one for."""
    sides = Sides(CASES[name])
    batch = trial_batch(dict(sides.unet.config), sides.program())
    make: dict[str, Callable[[], Any]] = {"eager": sides.eager, "tvm": sides.tvm}
    denoiser = make[side]()
    if side == "tvm":
        del sides
        gc.collect()
    evaluate(denoiser, batch)
    seconds = [evaluate(denoiser, batch)[0] for _ in range(repeats)]
    return {"median_s": round(statistics.median(seconds), 4), "resident_gib": resident_gib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch-compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--alone", choices=("eager", "tvm"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(int(THREADS))
    if options.alone:
        json.dump(alone(options.model[0], options.alone, options.repeats), sys.stdout)
        return
    results = {}
    for name in options.model:
        results[name] = together(name, options.repeats, options.torch_compile)
        print(json.dumps({name: results[name]}), file=sys.stderr, flush=True)
        gc.collect()
        for side in ("eager", "tvm"):
            command = [sys.executable, "-m", "benchmarks.tvm", "--alone", side, "--model", name]
            done = subprocess.run(
                [*command, "--repeats", str(options.repeats)], cwd=ROOT, check=True, capture_output=True, text=True
            )
            results[name][f"{side}_alone"] = json.loads(done.stdout.splitlines()[-1])
            print(side, results[name][f"{side}_alone"], file=sys.stderr, flush=True)
    json.dump(results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
