"""One UNet evaluation on every backend: torch in float32 and bfloat16, OpenVINO, and tvm in both. Prints JSON.

    python -m benchmarks.tvm [--model sd15-512 ...] [--sides eager tvm_bfloat16 ...] [--repeats 5] [--threads 1]

Real configurations with random weights, and the embedded models; a guided request, two rows. First all sides in one
process, alternated, so that what else the machine does meets them alike; then torch eager and the best tvm each alone
in a fresh process, since two thread pools in one process disturb each other. `cpu` are seconds of processor time of all
threads, which other work on the machine hardly changes. The environment TVM needs is set here. OpenVINO is the extra
`openvino`; its side is left out where it is missing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

THREADS = sys.argv[sys.argv.index("--threads") + 1] if "--threads" in sys.argv else str(os.cpu_count() or 1)
os.environ |= {
    "TVM_BIND_THREADS": "0",
    "TVM_NUM_THREADS": THREADS,
    "TVM_THREAD_POOL_SPIN_COUNT": "0",
    "GOMP_SPINCOUNT": "0",
}

import psutil  # noqa: E402
import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from torch.utils.dlpack import from_dlpack  # noqa: E402

from config.catalog import ROOT  # noqa: E402
from config.precision import Precision  # noqa: E402
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
from pipelines.backends.tvm.compile import PositionalUNet, compile_unet  # noqa: E402
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


SIDES = ("eager", "channels_last", "torch_bfloat16", "torch_compile", "openvino", "tvm_float32", "tvm_bfloat16")


def load(case: Case) -> UNet2DConditionModel:
    if isinstance(case.config, Path):
        return UNet2DConditionModel.from_pretrained(case.config / "unet").float().eval()
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=case.latents[0], **case.config).eval()


def key_of(case: Case, unet: UNet2DConditionModel, precision: Precision) -> ArtifactKey:
    height, width = case.latents
    shape: dict[str, Any] = {"height": height, "width": width, "rows": 2, "tokens": case.tokens, "pooled": case.pooled}
    config = json.loads(unet.to_json_string())
    shape |= {"level": best_level(precision=precision), "dtype": precision}
    return ArtifactKey(config=config_hash(config), control=False, sources=sources_hash(), **shape)


def evaluate(denoiser: Any, batch: StepBatch) -> tuple[float, torch.Tensor]:
    begin = time.perf_counter()
    output = denoiser.predict(batch)
    return time.perf_counter() - begin, output


def resident_gib() -> float:
    return round(psutil.Process().memory_info().rss / 2**30, 2)


def peak_gib() -> float:
    """Not getrusage's: that remembers the parent's before exec."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 2**20, 2)


class TorchModule:
    """A torch module that takes what a UNet takes, as a denoiser."""

    def __init__(self, unet: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
        self._unet = unet
        self._dtype = dtype

    @torch.inference_mode()
    def predict(self, batch: StepBatch) -> torch.Tensor:
        """The model output in float32."""
        added = {name: t.to(self._dtype) for name, t in batch.added_conditions.items()} or None
        sample, context = batch.sample.to(self._dtype), batch.prompt_embeds.to(self._dtype)
        output: torch.Tensor = self._unet(sample, batch.timesteps, context, added_cond_kwargs=added, return_dict=False)[
            0
        ]
        return output.float()


class OpenVinoUNet:
    """A UNet converted to OpenVINO, which multiplies bfloat16 by itself where the processor does."""

    def __init__(self, unet: UNet2DConditionModel, batch: StepBatch) -> None:
        import openvino

        inputs = (batch.sample, batch.timesteps, batch.prompt_embeds, *batch.added_conditions.values())
        model = openvino.convert_model(PositionalUNet(unet, False), example_input=inputs)
        model.reshape({port: list(t.shape) for port, t in zip(model.inputs, inputs, strict=True)})
        settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": int(THREADS)}
        self._compiled = openvino.Core().compile_model(model, "CPU", settings)

    def predict(self, batch: StepBatch) -> torch.Tensor:
        """The model output."""
        inputs = (batch.sample, batch.timesteps, batch.prompt_embeds, *batch.added_conditions.values())
        return torch.from_numpy(self._compiled([t.numpy() for t in inputs])[0])


class Sides:
    """The backends of one case, made one after the other over the same weights."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.unet = load(case)
        self.facts: dict[str, Any] = {"parameters_m": round(sum(p.numel() for p in self.unet.parameters()) / 1e6)}

    def make(self, side: str, batch: StepBatch) -> Any:
        """A side by its name."""
        match side:
            case "eager":
                return TorchDenoiser(self.unet)
            case "channels_last":
                return TorchModule(self._copy(torch.float32))
            case "torch_bfloat16":
                return TorchModule(self._copy(torch.bfloat16), torch.bfloat16)
            case "torch_compile":
                denoiser = TorchModule(torch.compile(self.unet))
                self.facts["torch_compile_s"] = round(evaluate(denoiser, batch)[0], 1)
                return denoiser
            case "openvino":
                return OpenVinoUNet(self.unet, batch)
            case _:
                return self.tvm("bfloat16" if side.endswith("bfloat16") else "float32")

    def _copy(self, dtype: torch.dtype) -> UNet2DConditionModel:
        """The UNet in NHWC."""
        return copy.deepcopy(self.unet).to(dtype=dtype, memory_format=torch.channels_last)

    def program(self, precision: Precision) -> Artifact:
        """The compiled program, made now if need be."""
        key, config = key_of(self.case, self.unet, precision), json.loads(self.unet.to_json_string())
        artifact, _ = ArtifactCache(TVM_CACHE).make(key, lambda path: compile_unet(config, key, path))
        self.facts[f"{precision}_compile_s"] = artifact.compile_seconds
        return artifact

    def tvm(self, precision: Precision, alone: bool = False) -> TvmDenoiser:
        """The program over packed weights; alone, torch's copy goes meanwhile."""
        artifact, config = self.program(precision), dict(self.unet.config)
        weights = PackedWeights(self.unet.state_dict())
        if alone:
            del self.unet
            gc.collect()
            weights.pack([artifact])
        programs = load_programs(ArtifactCache(TVM_CACHE), [artifact.key], weights)
        packed = [from_dlpack(weight) for weight in weights.arguments(artifact)]
        self.facts[f"{precision}_pack_s"] = round(weights.seconds, 1)
        self.facts[f"{precision}_packed_gib"] = round(sum(t.nbytes for t in packed) / 2**30, 2)
        weights.forget()
        return TvmDenoiser(config, programs)


def together(name: str, sides: Sequence[str], repeats: int) -> dict[str, Any]:
    """Median seconds and processor seconds of each side, one after the other in every round, after a warm-up."""
    made = Sides(CASES[name])
    batch = trial_batch(dict(made.unet.config), made.program("float32"))
    denoisers = {side: made.make(side, batch) for side in sides}
    exact = evaluate(denoisers["eager"], batch)[1]
    errors = {side: float((evaluate(d, batch)[1] - exact).norm() / exact.norm()) for side, d in denoisers.items()}
    walls: dict[str, list[float]] = {side: [] for side in sides}
    cpus: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, denoiser in denoisers.items():
            begin = time.process_time()
            walls[side].append(evaluate(denoiser, batch)[0])
            cpus[side].append(time.process_time() - begin)
    median = {side: round(statistics.median(s), 4) for side, s in walls.items()}
    cpu = {side: round(statistics.median(s), 4) for side, s in cpus.items()}
    return made.facts | {
        "median_s": median,
        "cpu_s": cpu,
        "times_as_fast_as_eager": {side: round(median["eager"] / s, 2) for side, s in median.items()},
        "times_as_fast_as_eager_cpu": {side: round(cpu["eager"] / s, 2) for side, s in cpu.items()},
        "relative_error": errors,
    }


def alone(name: str, side: str, repeats: int) -> dict[str, Any]:
    """One side in this process: what `together` starts a fresh one for."""
    sides = Sides(CASES[name])
    batch = trial_batch(dict(sides.unet.config), sides.program("float32"))
    before = peak_gib()
    if side.startswith("tvm_"):
        denoiser: Any = sides.tvm("bfloat16" if side.endswith("bfloat16") else "float32", alone=True)
    else:
        denoiser = sides.make(side, batch)
    packing = peak_gib()
    evaluate(denoiser, batch)
    seconds = [evaluate(denoiser, batch)[0] for _ in range(repeats)]
    facts = {"median_s": round(statistics.median(seconds), 4), "resident_gib": resident_gib()}
    return facts | {"peak_gib": {"weights loaded": before, "packed": packing, "evaluated": peak_gib()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=int(THREADS), help="of every side; the machine's cores")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.alone:
        json.dump(alone(options.model[0], options.alone, options.repeats), sys.stdout)
        return
    wanted = ["eager", *(side for side in options.sides if side != "eager")]
    if importlib.util.find_spec("openvino") is None and "openvino" in wanted:
        print("openvino is not installed: pip install '.[openvino]'", file=sys.stderr)
        wanted.remove("openvino")
    results = {}
    for name in options.model:
        results[name] = together(name, wanted, options.repeats)
        print(json.dumps({name: results[name]}), file=sys.stderr, flush=True)
        gc.collect()
        for side in (side for side in wanted if side == "eager" or side.startswith("tvm_")):
            command = [sys.executable, "-m", "benchmarks.tvm", "--alone", side, "--model", name]
            command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
            results[name][f"{side}_alone"] = json.loads(done.stdout.splitlines()[-1])
            print(side, results[name][f"{side}_alone"], file=sys.stderr, flush=True)
    json.dump(results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
