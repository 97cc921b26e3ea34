"""Backend tvm: compiled tiny UNets of every family against torch, alone, in padded batches, and in whole pictures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from config.catalog import ROOT, Catalog, Size
from pipelines.assembly import load_compiled
from pipelines.backends.base import StepBatch
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.backends.tvm.artifacts import ArtifactCache, ArtifactKey, best_level
from pipelines.backends.tvm.compile import compile_all
from pipelines.backends.tvm.denoiser import PackedWeights, TvmDenoiser, load_programs, trial_batch
from pipelines.backends.tvm.shapes import artifact_key, residual_shapes
from pipelines.compiling import Compiling
from pipelines.control.residuals import ReadyResiduals, Residuals
from pipelines.control.types import ControlledRows
from pipelines.errors import DenoiseError, UncompiledError
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from pipelines.weights.files import read_config
from pipelines.weights.loading import load_model
from tests.parity import repainting

SIZE = {"unet-sd15": 128, "unet-sd2": 128, "unet-sdxl-base": 256, "unet-ssd": 256, "unet-sdxl-turbo": 256}
SIZE |= {"refiner-sdxl": 256}
ROWS = {"unet-sd15": (2, 4), "unet-sdxl-turbo": (1,)}
CONTROLLED = ("unet-sd15", "unet-sdxl-base")


@pytest.fixture(scope="module")
def sized(catalog: Catalog) -> Catalog:
    """The tiny catalog with small sizes to compile."""
    models = tuple(
        m.model_copy(update={"tvm_sizes": (Size(width=SIZE[m.unet], height=SIZE[m.unet]),)}) for m in catalog.models
    )
    return catalog.model_copy(update={"models": models})


KeyOf = Callable[..., ArtifactKey]


@pytest.fixture(scope="module")
def key_of(sized: Catalog) -> KeyOf:
    def make(component: str, rows: int = 2, control: bool = False) -> ArtifactKey:
        return artifact_key(sized, component, SIZE[component], SIZE[component], rows, control, best_level())

    return make


@pytest.fixture(scope="module")
def cache(sized: Catalog, key_of: KeyOf, tmp_path_factory: pytest.TempPathFactory) -> ArtifactCache:
    """Ten programs: every family, one UNet at two batch sizes, two with a ControlNet's residuals."""
    folder = ArtifactCache(tmp_path_factory.mktemp("tvm"))
    wanted = {key_of(c, rows): c for c in SIZE for rows in ROWS.get(c, (2,))}
    wanted |= {key_of(c, 2, True): c for c in CONTROLLED}
    configs = {key: read_config(sized.component(component)) for key, component in wanted.items()}
    assert all(made for _, _, made in compile_all(folder, configs, 2))
    return folder


def unet_of(catalog: Catalog, component: str) -> UNet2DConditionModel:
    return load_model(UNet2DConditionModel, catalog.component(component), "cpu").eval()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert theirs.std() > 0.01
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("component", SIZE)
def test_every_family_computes_what_torch_computes(
    sized: Catalog, cache: ArtifactCache, key_of: KeyOf, component: str
) -> None:
    unet = unet_of(sized, component)
    programs = load_programs(cache, [key_of(component, ROWS.get(component, (2,))[0])], PackedWeights(unet.state_dict()))
    batch = trial_batch(dict(unet.config), programs[0].artifact)
    batch.timesteps[0] += 100  # each row its own time
    ours = TvmDenoiser(dict(unet.config), programs).predict(batch)
    assert relative_error(ours, TorchDenoiser(unet).predict(batch)) < 1e-4


@pytest.mark.parametrize("component", CONTROLLED)
def test_residuals_reach_their_own_rows(sized: Catalog, cache: ArtifactCache, key_of: KeyOf, component: str) -> None:
    """Row 1 of two is steered; torch adds residuals before its upper half."""
    unet = unet_of(sized, component)
    (program,) = load_programs(cache, [key_of(component, 2, True)], PackedWeights(unet.state_dict()))
    plain = trial_batch(dict(unet.config), program.artifact)
    size = plain.sample.shape[-1]
    generator = torch.Generator().manual_seed(1)
    residuals = [torch.randn(1, *s, generator=generator) for s in residual_shapes(unet.config, size, size)]
    controlled = ControlledRows((1,), ReadyResiduals(Residuals(tuple(residuals))))
    batch = StepBatch(
        plain.sample, plain.timesteps, plain.prompt_embeds, plain.added_conditions, plain.loras, controlled
    )
    torch_denoiser = TorchDenoiser(unet)
    theirs = torch_denoiser.predict(batch)
    ours = TvmDenoiser(dict(unet.config), [program]).predict(batch)
    assert relative_error(ours, theirs) < 1e-4
    assert relative_error(torch_denoiser.predict(plain)[1], theirs[1]) > 1e-2, "the residuals must show"
    assert relative_error(torch_denoiser.predict(plain)[0], theirs[0]) < 1e-6


def test_the_shapes_of_residuals_are_a_controlnets(sized: Catalog) -> None:
    unet = unet_of(sized, "unet-sd15")
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    sample = torch.zeros(1, unet.config.in_channels, 10, 14)
    context = torch.zeros(1, 4, unet.config.cross_attention_dim)
    down, mid = net(sample, torch.zeros(1), context, torch.zeros(1, 3, 80, 112), return_dict=False)
    assert [tuple(t.shape[1:]) for t in (*down, mid)] == residual_shapes(unet.config, 10, 14)


def test_rows_of_a_padded_batch_equal_each_alone(sized: Catalog, cache: ArtifactCache, key_of: KeyOf) -> None:
    """Three rows run in the program of four, five in two runs; no row sees another."""
    unet = unet_of(sized, "unet-sd15")
    programs = load_programs(cache, [key_of("unet-sd15", rows) for rows in (2, 4)], PackedWeights(unet.state_dict()))
    denoiser = TvmDenoiser(dict(unet.config), programs)
    four = trial_batch(dict(unet.config), next(p.artifact for p in programs if p.artifact.key.rows == 4))

    def rows(indices: list[int]) -> StepBatch:
        return StepBatch(four.sample[indices], four.timesteps[indices], four.prompt_embeds[indices], {}, [()] * 9)

    alone = torch.cat([denoiser.predict(rows([i])) for i in range(4)])
    for chosen in ([0, 1, 2], [3, 2, 1, 0], [0, 1, 2, 3, 1]):
        assert (denoiser.predict(rows(chosen)) - alone[chosen]).abs().max() < 1e-5
    with pytest.raises(DenoiseError, match="nothing is compiled"):
        denoiser.predict(StepBatch(four.sample[..., :8], four.timesteps, four.prompt_embeds, {}, [()] * 4))


def test_other_weights_need_no_compiling(sized: Catalog, cache: ArtifactCache, key_of: KeyOf) -> None:
    unet = unet_of(sized, "unet-sd15")
    key = key_of("unet-sd15")
    (before,) = load_programs(cache, [key], PackedWeights(unet.state_dict()))
    batch = trial_batch(dict(unet.config), before.artifact)
    first = TvmDenoiser(dict(unet.config), [before]).predict(batch)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    (after,) = load_programs(cache, [key], PackedWeights(unet.state_dict()))
    second = TvmDenoiser(dict(unet.config), [after]).predict(batch)
    assert relative_error(second, TorchDenoiser(unet).predict(batch)) < 1e-4
    assert relative_error(first, second) > 1e-2


def test_sizes_share_one_packed_copy(sized: Catalog, cache: ArtifactCache, key_of: KeyOf) -> None:
    """Batch sizes add no weights."""
    weights = PackedWeights(unet_of(sized, "unet-sd15").state_dict())
    load_programs(cache, [key_of("unet-sd15", 2)], weights)
    packed = len(weights._packed)
    load_programs(cache, [key_of("unet-sd15", 4), key_of("unet-sd15", 2, True)], weights)
    assert len(weights._packed) == packed


FRESH = """
import sys, torch
from pathlib import Path
from diffusers import UNet2DConditionModel
from pipelines.backends.tvm.artifacts import ArtifactCache, ArtifactKey
from pipelines.backends.tvm.denoiser import PackedWeights, TvmDenoiser, load_programs, trial_batch
unet = UNet2DConditionModel.from_pretrained(sys.argv[3]).eval()
cache = ArtifactCache(Path(sys.argv[1]))
programs = load_programs(cache, [ArtifactKey.model_validate_json(sys.argv[2])], PackedWeights(unet.state_dict()))
batch = trial_batch(dict(unet.config), programs[0].artifact)
torch.save(TvmDenoiser(dict(unet.config), programs).predict(batch), sys.argv[4])
"""


def test_a_fresh_process_loads_what_another_compiled(
    sized: Catalog, cache: ArtifactCache, key_of: KeyOf, tiny_models: Path, tmp_path: Path
) -> None:
    key, result = key_of("unet-sd15"), tmp_path / "output.pt"
    arguments = [str(cache.folder), key.model_dump_json(), str(tiny_models / "sd15" / "unet"), str(result)]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], cwd=ROOT, check=True, capture_output=True)
    unet = unet_of(sized, "unet-sd15")
    artifact = cache.find(key)
    assert artifact is not None
    theirs = TorchDenoiser(unet).predict(trial_batch(dict(unet.config), artifact))
    assert relative_error(torch.load(result), theirs) < 1e-4


@pytest.fixture(scope="module")
def text2image(sized: Catalog, cache: ArtifactCache) -> Text2Image:
    loaded = [load_compiled(sized, component, Compiling(cache.folder)) for component in SIZE]
    assert all(loaded)
    return Text2Image(sized, compiled=[unet for unet in loaded if unet])


REQUESTS: dict[str, dict[str, Any]] = {
    "SD1.5": {},
    "SD2": {"sampler": "Euler a"},
    "SDXL1.0-base": {"enable_refiner": True, "steps": 8},
    "SSD": {"negative_prompt": "fog"},
    "SDXL-turbo": {"cfg_scale": 0.0, "steps": 4, "sampler": "Euler a"},
    "SD1.5-ControlNet": {"controlnet_name": "canny"},
    "SDXL-ControlNet": {"controlnet_name": "canny"},
}


@pytest.mark.parametrize("model", REQUESTS)
def test_whole_pictures_equal_torchs(sized: Catalog, text2image: Text2Image, photo: bytes, model: str) -> None:
    side = SIZE[sized.model(model).unet]
    fields = {"prompt": "a fox", "seed": 7, "steps": 6, "width": side, "height": side} | REQUESTS[model]
    fields |= {"controlnet_image": photo} if "ControlNet" in model else {}
    compiled = text2image.generate(GenerationParams(model_name=model, backend="tvm", **fields))
    plain = text2image.generate(GenerationParams(model_name=model, backend="torch", **fields))
    assert {stage.backend for stage in compiled.plan.stages} == {"tvm"}
    assert {stage.backend for stage in plain.plan.stages} == {"torch"}
    ours, theirs = (np.asarray(picture.image).astype(int) for picture in (compiled, plain))
    assert theirs.std() > 10
    assert np.abs(ours - theirs).max() <= 2


@pytest.mark.slow
def test_a_unet_for_inpainting(inpainting_catalog: Catalog, photo: bytes, tmp_path: Path) -> None:
    """Its mask and its masked picture are channels of the sample like any other."""
    name, size = "SD1.5-inpainting", Size(width=128, height=128)
    model = inpainting_catalog.model(name).model_copy(update={"tvm_sizes": (size,)})
    others = tuple(other for other in inpainting_catalog.models if other.name != name)
    small = inpainting_catalog.model_copy(update={"models": (model, *others)})
    cache, key = ArtifactCache(tmp_path), artifact_key(small, model.unet, 128, 128, 2, False, best_level())
    assert all(made for _, _, made in compile_all(cache, {key: read_config(small.component(model.unet))}, 1))
    compiled = load_compiled(small, model.unet, Compiling(cache.folder))
    assert compiled is not None
    text2image, request = Text2Image(small, compiled=[compiled]), repainting.fields(name, photo, 128)
    ours, theirs = (text2image.generate(GenerationParams(**request, backend=b)) for b in ("tvm", "torch"))
    assert (ours.plan.stages[0].backend, theirs.plan.stages[0].backend) == ("tvm", "torch")
    assert np.abs(np.asarray(ours.image).astype(int) - np.asarray(theirs.image)).max() <= 2


def test_two_jobs_share_a_padded_batch(text2image: Text2Image) -> None:
    """A guided job and one of a single row: three rows in the program of four."""
    common = {"model_name": "SD1.5", "backend": "tvm", "width": 128, "height": 128, "steps": 5, "prompt": "a fox"}
    requests = [GenerationParams(seed=1, **common), GenerationParams(seed=2, cfg_scale=1.0, **common)]
    together = text2image.generate_many(requests)
    for picture, params in zip(together, requests, strict=True):
        alone = text2image.generate(params)
        ours, theirs = (np.asarray(p.image).astype(int) for p in (picture, alone))
        assert np.abs(ours - theirs).max() <= 1


def test_a_prompt_longer_than_a_program_reads_runs_on_torch(text2image: Text2Image) -> None:
    long = "a fox in the snow, " * 12
    common: dict[str, Any] = {"model_name": "SD1.5", "width": 128, "height": 128, "steps": 2, "prompt": long, "seed": 1}
    picture = text2image.generate(GenerationParams(**common))
    assert [stage.backend for stage in picture.plan.stages] == ["torch"]
    with pytest.raises(UncompiledError, match=r"compiled UNets read 77 tokens, .* take 231") as caught:
        text2image.generate(GenerationParams(backend="tvm", **common))
    assert caught.value.param == "backend"
