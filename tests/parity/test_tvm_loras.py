"""LoRAs on compiled UNets: row by row what the torch backend makes of them, and what goes to torch instead."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from config.catalog import Catalog, Size
from pipelines.adapters.layers import Adapter
from pipelines.adapters.reading import AdapterFile
from pipelines.assembly import load_compiled
from pipelines.backends.base import StepBatch
from pipelines.backends.torch_backend import TorchDenoiser
from pipelines.backends.tvm.artifacts import ArtifactCache, ArtifactKey, best_level
from pipelines.backends.tvm.compile import compile_all
from pipelines.backends.tvm.denoiser import PackedWeights, TvmDenoiser, load_programs, trial_batch
from pipelines.backends.tvm.loading import skeleton_adapters
from pipelines.backends.tvm.shapes import artifact_key
from pipelines.compiling import Compiling
from pipelines.errors import UncompiledError
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from pipelines.weights.files import read_config
from pipelines.weights.loading import load_model

SIZE = {"unet-sd15": 128, "unet-sdxl-base": 256}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sized(catalog: Catalog) -> Catalog:
    """The tiny catalog with small sizes to compile."""
    tables = {unet: (Size(width=side, height=side),) for unet, side in SIZE.items()}
    models = tuple(m.model_copy(update={"tvm_sizes": tables.get(m.unet, ())}) for m in catalog.models)
    return catalog.model_copy(update={"models": models})


def key_of(catalog: Catalog, component: str) -> ArtifactKey:
    return artifact_key(catalog, component, SIZE[component], SIZE[component], 2, False, best_level(), loras=True)


@pytest.fixture(scope="module")
def cache(sized: Catalog, tmp_path_factory: pytest.TempPathFactory) -> ArtifactCache:
    """A program for LoRAs of two families, two rows."""
    folder = ArtifactCache(tmp_path_factory.mktemp("tvm"))
    configs = {key_of(sized, component): read_config(sized.component(component)) for component in SIZE}
    assert all(made for _, _, made in compile_all(folder, configs, 1))
    return folder


class Both:
    """A UNet on both backends, with the same adapters."""

    def __init__(self, catalog: Catalog, cache: ArtifactCache, component: str, change: float = 0.0) -> None:
        self.unet = load_model(UNet2DConditionModel, catalog.component(component), "cpu").eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.unet.parameters() if change else ():
                parameter.mul_(1 + change * torch.randn(parameter.shape, generator=generator))
        (program,) = load_programs(cache, [key_of(catalog, component)], PackedWeights(self.unet.state_dict()))
        config = dict(self.unet.config)
        self.compiled = TvmDenoiser(config, [program], skeleton_adapters(config))
        self.torch = TorchDenoiser(self.unet)
        self.batch = trial_batch(config, program.artifact)
        self.plain = self.torch.predict(self.batch)

    def fit(self, file: AdapterFile) -> tuple[Adapter, Adapter]:
        """A file on the compiled UNet and on torch's."""
        assert self.compiled.adapters is not None
        adapters = self.compiled.adapters, self.torch.adapters
        ours, theirs = (own.fit(file, CPU, torch.float32) for own in adapters)
        return ours, theirs

    def rows(self, *mixtures: tuple[tuple[tuple[Adapter, Adapter], float], ...]) -> tuple[StepBatch, StepBatch]:
        """Rows with these mixtures, for the compiled UNet and for torch's."""
        index = torch.arange(len(mixtures)) % 2
        rows = {"timesteps": self.batch.timesteps[index], "prompt_embeds": self.batch.prompt_embeds[index]}
        rows |= {"sample": self.batch.sample[index]}
        added = {name: tensor[index] for name, tensor in self.batch.added_conditions.items()}
        ours, theirs = (
            dataclasses.replace(
                self.batch,
                **rows,  # type: ignore[arg-type]
                added_conditions=added,
                loras=[tuple((fitted[side], weight) for fitted, weight in mixture) for mixture in mixtures],
            )
            for side in (0, 1)
        )
        return ours, theirs

    def error(self, *mixtures: tuple[tuple[tuple[Adapter, Adapter], float], ...]) -> float:
        """The largest relative error of a row."""
        batches = self.rows(*mixtures)
        ours, theirs = self.compiled.predict(batches[0]), self.torch.predict(batches[1])
        for row, mixture in enumerate(mixtures):
            shown = (theirs[row] - self.plain[row % 2]).norm() / theirs[row].norm()
            assert shown > 1e-3 if mixture else shown < 1e-5, "LoRAs must show in their rows alone"
        return float(((ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)).max())


def file_of(unet: nn.Module, name: str, rank: int, parts: tuple[str, ...] = (), size: float = 0.05) -> AdapterFile:
    """Low-rank pairs for every linear layer and convolution, or those of some names."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    layers = {}
    for module_name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and (not parts or any(part in module_name for part in parts)):
            out, *inner = module.weight.shape
            down = torch.randn(rank, *inner, generator=generator) / down_size(inner)
            up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator) * size
            layers[module_name] = {"down": down, "up": up}
    return AdapterFile(name, layers, {})


def down_size(inner: list[int]) -> float:
    return float(np.sqrt(np.prod(inner)))


@pytest.fixture(scope="module", params=SIZE)
def both(request: pytest.FixtureRequest, sized: Catalog, cache: ArtifactCache) -> Both:
    return Both(sized, cache, request.param)


def test_rows_with_and_without_loras_equal_torchs(both: Both) -> None:
    """Every layer and attention alone, two together, beside rows without, in the order of rows and in another."""
    whole = both.fit(file_of(both.unet, "whole", 4))
    attention = both.fit(file_of(both.unet, "attention", 24, ("attn",), 0.3))
    assert both.error(((whole, 1.0),), ()) < 1e-4
    assert both.error((), ((attention, 0.7),)) < 1e-4
    assert both.error(((whole, 0.5), (attention, -0.5)), ((attention, 1.0),), ()) < 1e-4


def test_without_loras_the_program_for_them_is_the_plain_one(both: Both) -> None:
    ours = both.compiled.predict(both.batch)
    assert (ours - both.plain).norm() / both.plain.norm() < 1e-4


def test_rows_that_find_no_room_together_run_one_after_the_other(both: Both) -> None:
    first, second = (both.fit(file_of(both.unet, name, 100, ("attn1",))) for name in ("first", "second"))
    assert both.error(((first, 1.0),), ((second, 1.0),)) < 1e-4
    ours, _ = both.rows(((first, 1.0), (second, 1.0)))
    with pytest.raises(UncompiledError, match=r"more ranks together .*\['auto', 'torch'\]"):
        both.compiled.predict(ours)


def test_what_is_no_low_rank_product_is_known_by_its_file(both: Both) -> None:
    name, module = next((n, m) for n, m in both.unet.named_modules() if n.endswith("attn1.to_q"))
    out, into = module.weight.shape
    pair = file_of(both.unet, "x", 4, (name,)).layers[name]
    dora = AdapterFile("dora", {name: pair | {"magnitude": torch.ones(out)}}, {})
    bias = AdapterFile("bias", {name: pair | {"diff_b": torch.ones(out)}}, {})
    wide = AdapterFile("wide", {name: {"down": torch.randn(130, into), "up": torch.randn(out, 130)}}, {})
    for file in (dora, bias, wide):
        with pytest.raises(
            UncompiledError, match=rf"backend 'tvm': .*{file.name} .*\['auto', 'torch'\] allowed"
        ) as caught:
            both.compiled.fit(file)
        assert caught.value.param == "backend"
    assert both.compiled.fit(AdapterFile("pair", {name: pair}, {})).slot_ranks == 4


def test_other_weights_take_the_same_loras(sized: Catalog, cache: ArtifactCache) -> None:
    changed = Both(sized, cache, "unet-sd15", change=0.1)
    assert changed.error(((changed.fit(file_of(changed.unet, "whole", 4)), 1.0),), ()) < 1e-4


@pytest.mark.parametrize("model", ["SD1.5", "SDXL1.0-base"])
def test_whole_pictures_with_loras_equal_torchs(sized: Catalog, cache: ArtifactCache, model: str) -> None:
    unet = sized.model(model).unet
    compiled = load_compiled(sized, unet, Compiling(cache.folder))
    assert compiled is not None
    text2image = Text2Image(sized, compiled=[compiled])
    side = SIZE[unet]
    fields: dict[str, Any] = {"prompt": "a fox", "seed": 7, "steps": 4, "width": side, "height": side}
    fields |= {"model_name": model, "loras": {"Pixel_Art": 0.8, "Add_Detail": -0.5}}
    ours, theirs = (text2image.generate(GenerationParams(backend=b, **fields)) for b in ("tvm", "torch"))
    assert (ours.plan.stages[0].backend, theirs.plan.stages[0].backend) == ("tvm", "torch")
    assert np.abs(np.asarray(ours.image).astype(int) - np.asarray(theirs.image)).max() <= 2
