"""Compile UNets ahead of time. Only their configurations are read, no weights; each program takes a few seconds.

python -m pipelines.backends.tvm.compile --catalog embedded [--model SDXL1.0-base] [--size 1024x1024] [--rows 1 2]
    [--precision float32]
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, cast, get_args

import torch
import tvm
import tvm_ffi
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from tvm import relax

from config.catalog import Catalog
from config.precision import Precision, WantedPrecision
from config.sources import TVM_CACHE
from pipelines.backends.tvm.artifacts import (
    BATCHES,
    Artifact,
    ArtifactCache,
    ArtifactKey,
    best_level,
    program_rows,
)
from pipelines.backends.tvm.convert import Converters, import_graph
from pipelines.backends.tvm.lower import lower
from pipelines.backends.tvm.packing import layouts_of
from pipelines.backends.tvm.products import Tile
from pipelines.backends.tvm.shapes import artifact_key, example_inputs
from pipelines.processor import precision_here
from pipelines.weights.files import read_config

SPARE_BYTES = 2**20
"""If a disk has fewer free bytes than this, a failure is reported as a full disk."""


class PositionalUNet(nn.Module):
    """A UNet that takes all inputs as positional arguments, as torch.export needs them.

    Arguments: sample `[rows, channels, height, width]`, timesteps `[rows]`, context `[rows, tokens, width]`; for SDXL
    text_embeds `[rows, projection]` and time_ids `[rows, ids]`; with control the residuals of the down blocks and
    that of the mid block, as the ControlNet returns them.
    """

    def __init__(self, unet: UNet2DConditionModel, control: bool) -> None:
        super().__init__()
        self.unet = unet
        self.added = unet.config.addition_embed_type == "text_time"
        self.control = control

    def forward(self, sample: Tensor, timesteps: Tensor, context: Tensor, *rest: Tensor) -> Tensor:
        """The model output, `[rows, channels, height, width]`."""
        added = None
        if self.added:
            added = {"text_embeds": rest[0], "time_ids": rest[1]}
            rest = rest[2:]
        residuals: dict[str, Any] = {}
        if self.control:
            residuals["down_block_additional_residuals"] = rest[:-1]
            residuals["mid_block_additional_residual"] = rest[-1]
        outputs = self.unet(sample, timesteps, context, added_cond_kwargs=added, return_dict=False, **residuals)
        return cast(Tensor, outputs[0])


def target_of(level: str) -> Any:
    """The TVM target for processors of a level."""
    name, _, extra = level.partition("+")
    return tvm.target.Target({"kind": "llvm", "mcpu": name, "mattr": ["+avx512bf16"] if extra else []})


def tile_of(level: str, precision: Precision) -> Tile:
    """The register blocking and arithmetic of products on processors of a level."""
    if precision == "float32":
        return Tile.of(512 if level.startswith("x86-64-v4") else 256)
    return Tile.of(512 if level.startswith("x86-64-v4") else 256, "bfloat16" if "+bf16" in level else "emulated")


def compile_unet(config: Mapping[str, Any], key: ArtifactKey, program: Path) -> Artifact:
    """Write the program of `key` for a UNet of this configuration to the path `program`, and return its description.

    The UNet has no weights: its tensors are allocated but never written, so that even 2.6 B parameters use no memory.

    Raises:
        CompileError: an expensive operation has no scheduled kernel.
        UnsupportedOperationError: the model uses an operation in a form that no converter supports.
    """
    begin = time.perf_counter()
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(dict(config))
    model = PositionalUNet(unet.to_empty(device="cpu").float().eval(), key.control)
    with torch.no_grad():
        exported = torch.export.export(model, example_inputs(config, key))
    converters = Converters(exported, tile_of(key.level, key.dtype), key.loras)
    executable = lower(import_graph(converters, exported), target_of(key.level))
    executable.export_library(str(program))
    return Artifact(
        key=key,
        program=hashlib.sha256(program.read_bytes()).hexdigest(),
        weights=tuple(
            (name.removeprefix("unet."), layout.kind, layout.panel, layout.tile) for name, layout in converters.weights
        ),
        compile_seconds=round(time.perf_counter() - begin, 2),
    )


def try_program(config: Mapping[str, Any], artifact: Artifact, path: Path) -> None:
    """Run the program at `path` once on zeros, so that one which crashes does so here and not in a replica."""
    with init_empty_weights():
        shapes = {name: t.shape for name, t in UNet2DConditionModel.from_config(dict(config)).state_dict().items()}
    weights = [
        tvm_ffi.from_dlpack(torch.zeros(layout.shape(tuple(shapes[name])), dtype=layout.dtype))
        for name, layout in layouts_of(artifact)
    ]
    inputs = [tvm_ffi.from_dlpack(tensor) for tensor in example_inputs(config, artifact.key)]
    relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())["main"](*inputs, *weights)


def wanted_keys(
    catalog: Catalog, models: Collection[str], sizes: Collection[str], rows: Iterable[int], precision: Precision
) -> dict[ArtifactKey, tuple[str, str]]:
    """The keys of all programs in the models' size tables, each with its component and a description of its size.

    Args:
        catalog: says which models there are.
        models: names of the models to compile; all available ones if empty.
        sizes: such as `1024x1024`; all sizes of the tables if empty.
        rows: batch sizes.
        precision: of the programs.
    """
    level = best_level(precision=precision)
    wanted: dict[ArtifactKey, tuple[str, str]] = {}
    for model in catalog.available_models():
        if models and model.name not in models:
            continue
        for size in model.tvm_sizes:
            if sizes and str(size) not in sizes:
                continue
            for component in filter(None, (model.unet, model.refiner)):
                for control in (False, True) if model.requires_controlnet and component == model.unet else (False,):
                    for count, loras in program_rows(rows):
                        sides = size.width, size.height
                        key = artifact_key(catalog, component, *sides, count, control, level, loras, precision)
                        extras = f"{', control' if control else ''}{', LoRAs' if loras else ''}"
                        wanted.setdefault(key, (component, f"{size}, {count} rows{extras}"))
    return wanted


def main() -> None:
    """Compile the programs that the command line names and the cache lacks, and show progress."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", default="embedded")
    parser.add_argument("--model", nargs="*", default=[], help="public names; every available model by default")
    parser.add_argument("--size", nargs="*", default=[], help="such as 1024x1024; the models' tables by default")
    parser.add_argument("--rows", nargs="*", type=int, default=list(BATCHES), choices=BATCHES)
    parser.add_argument(
        "--precision",
        default="auto",
        choices=get_args(WantedPrecision),
        help="`make compile` gives SDGRAPH_TVM_PRECISION if it is set; auto is what this processor multiplies best",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiles at a time")
    parser.add_argument(
        "--cache", type=Path, default=TVM_CACHE, help="`make compile` gives SDGRAPH_TVM_CACHE if it is set"
    )
    options = parser.parse_args()
    catalog, cache = Catalog.load(options.catalog), ArtifactCache(options.cache)
    names = [catalog.model_choices().resolve(name) for name in options.model]
    precision = precision_here(options.precision)
    wanted = wanted_keys(catalog, names, options.size, options.rows, precision)
    if not wanted:
        parser.error("no model's table has such a size")
    _check_is_writable(options.cache, parser)
    configs = {key: read_config(catalog.component(component)) for key, (component, _) in wanted.items()}
    compiled = compile_all(cache, configs, options.jobs)
    try:
        for key, artifact, made in tqdm(compiled, "compiling", len(configs), disable=None):
            component, what = wanted[key]
            tqdm.write(f"{component} {what}, {precision}: {f'{artifact.compile_seconds} s' if made else 'was there'}")
    except Exception:  # a full disk shows only in a linker's message inside two other exceptions
        if shutil.disk_usage(options.cache).free < SPARE_BYTES:
            sys.exit(f"--cache {options.cache}: no space left on device; what is compiled so far is kept")
        raise


def _check_is_writable(folder: Path, parser: argparse.ArgumentParser) -> None:
    """End with a usage error if programs cannot be written to `folder`, before anything is compiled."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        parser.error(f"--cache {folder} cannot be written ({error.strerror}); name a folder that can")


def compile_all(
    cache: ArtifactCache, configs: Mapping[ArtifactKey, dict[str, Any]], processes: int | None = None
) -> Iterator[tuple[ArtifactKey, Artifact, bool]]:
    """Compile the keys of `configs`, which gives each its UNet's configuration, in processes.

    Yields each key with its artifact, and whether it was compiled now.
    """
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(_compile_one, cache, config, key): key for key, config in configs.items()}
        for job in as_completed(jobs):
            yield jobs[job], *job.result()


def _compile_one(cache: ArtifactCache, config: dict[str, Any], key: ArtifactKey) -> tuple[Artifact, bool]:
    torch.set_num_threads(1)
    return cache.make(key, functools.partial(compile_unet, config, key))


if __name__ == "__main__":
    main()
