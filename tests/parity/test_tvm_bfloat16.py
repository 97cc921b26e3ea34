"""Compiled UNets that multiply bfloat16: no further from float32 than diffusers in bfloat16, evaluation and picture.

The programs are for this machine's best: without the instruction they multiply the same numbers in float32.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from config.catalog import Catalog, Size
from pipelines.assembly import load_compiled
from pipelines.backends.base import StepBatch
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.backends.tvm.artifacts import ArtifactCache, ArtifactKey, best_level
from pipelines.backends.tvm.compile import compile_all
from pipelines.backends.tvm.denoiser import PackedWeights, TvmDenoiser, load_programs, trial_batch
from pipelines.backends.tvm.shapes import artifact_key
from pipelines.compiling import Compiling
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from pipelines.weights.files import read_config
from pipelines.weights.loading import load_model
from tests.parity import oracle

SIZE = {"unet-sd15": 128, "unet-sd2": 128, "unet-sdxl-base": 256, "unet-ssd": 256, "unet-sdxl-turbo": 256}
SIZE |= {"refiner-sdxl": 256}
FAMILIES = [
    pytest.param(unet, marks=[] if unet == "unet-sd15" else pytest.mark.slow)  # each takes a compile
    for unet in SIZE
]


@pytest.fixture(scope="module")
def sized(catalog: Catalog) -> Catalog:
    models = tuple(
        m.model_copy(update={"tvm_sizes": (Size(width=SIZE[m.unet], height=SIZE[m.unet]),)}) for m in catalog.models
    )
    return catalog.model_copy(update={"models": models})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ArtifactCache:
    return ArtifactCache(tmp_path_factory.mktemp("tvm"))


def compiled_key(catalog: Catalog, cache: ArtifactCache, component: str) -> ArtifactKey:
    """The key of a program that is there."""
    side, level = SIZE[component], best_level(precision="bfloat16")
    key = artifact_key(catalog, component, side, side, 2, False, level, precision="bfloat16")
    list(compile_all(cache, {key: read_config(catalog.component(component))}, 1))
    return key


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    assert exact.std() > 0.01
    return float((ours.float() - exact).norm() / exact.norm())


def in_bfloat16(unet: UNet2DConditionModel) -> Any:
    """What diffusers computes in bfloat16, of float32 inputs."""
    halved = copy.deepcopy(unet).bfloat16()

    def forward(sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, **rest: Any) -> Any:
        added = {name: t.bfloat16() for name, t in (rest.get("added_cond_kwargs") or {}).items()}
        given = sample.bfloat16(), timestep, context.bfloat16()
        return (halved(*given, added_cond_kwargs=added or None, return_dict=False)[0].float(),)

    return forward


@torch.inference_mode()
@pytest.mark.parametrize("component", FAMILIES)
def test_every_family_is_closer_to_float32_than_diffusers(sized: Catalog, cache: ArtifactCache, component: str) -> None:
    """And so after a swap of the weights, which the program knows nothing about."""
    key = compiled_key(sized, cache, component)
    unet = load_model(UNet2DConditionModel, sized.component(component), "cpu").eval()
    for swapped in (False, True):
        if swapped:
            for weight in unet.parameters():
                weight.add_(weight.std(correction=0) * 0.2 * torch.randn_like(weight))
        (program,) = load_programs(cache, [key], PackedWeights(unet.state_dict()))
        batch: StepBatch = trial_batch(dict(unet.config), program.artifact)
        exact = TorchDenoiser(copy.deepcopy(unet)).predict(batch)
        inputs = (batch.sample, batch.timesteps, batch.prompt_embeds)
        theirs = in_bfloat16(unet)(*inputs, added_cond_kwargs=dict(batch.added_conditions))[0]
        ours = TvmDenoiser(dict(unet.config), [program]).predict(batch)
        assert 1e-5 < error(ours, exact) <= error(theirs, exact)


def test_a_whole_picture_is_closer_to_float32_than_diffusers(
    sized: Catalog, cache: ArtifactCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled_key(sized, cache, "unet-sd15")
    unet = load_compiled(sized, "unet-sd15", Compiling(cache.folder, precision="bfloat16"))
    assert unet is not None
    assert [size.precision for size in unet.sizes] == ["bfloat16"]
    fields: dict[str, Any] = {"seed": 7, "steps": 12, "width": 128, "height": 128, "cfg_scale": 5.0, "sampler": "Euler"}
    params = GenerationParams(model_name="SD1.5", prompt="a fox", backend="tvm", **fields)
    drawn = Text2Image(sized, compiled=[unet]).generate(params)
    assert [(stage.backend, stage.precision) for stage in drawn.plan.stages] == [("tvm", "bfloat16")]
    exact = oracle.draw("SD1.5", prompt="a fox", **fields).astype(float)
    pipe = oracle.pipeline("sd15", oracle.PIPELINES["SD1.5"][1])
    halved = in_bfloat16(pipe.unet)
    monkeypatch.setattr(
        pipe.unet, "forward", lambda x, t, encoder_hidden_states, **rest: halved(x, t, encoder_hidden_states)
    )
    theirs = oracle.draw("SD1.5", prompt="a fox", **fields).astype(float)
    ours = np.asarray(drawn.image).astype(float)
    assert exact.std() > 10
    assert 0 < np.square(ours - exact).mean() <= np.square(theirs - exact).mean()
