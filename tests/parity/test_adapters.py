"""Adapters of every kind, row by row, equal LyCORIS' own modules and PEFT's: alone and all in one batch."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lycoris.modules import (
    ButterflyOFTModule,
    DiagOFTModule,
    GLoRAModule,
    IA3Module,
    LoConModule,
    LohaModule,
    LokrModule,
    NormModule,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from config.catalog import Catalog
from pipelines.adapters.module_names import original_names
from pipelines.plan import GenerationParams
from pipelines.text2image import Text2Image
from tests.parity import oracle
from tests.parity.test_loras import ATTENTION, MODELS, TEXT, targets, text_encoders
from tests.parity.test_pictures import assert_same, request

pytestmark = pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")

FILE = "pytorch_lora_weights.safetensors"
CONVOLUTIONS = ("conv1", "proj_in", "conv_shortcut")
LINEAR = (*ATTENTION, "ff.net.0.proj", "time_emb_proj")
NORMS = ("norm1", "norm2", "layer_norm1", "conv_norm_out")
Make = Callable[[str, Any], Any]


def of(kind: Any, size: float, rank: int = 4, alpha: float = 2.0, **options: Any) -> tuple[Make, float]:
    """How LyCORIS' module of a kind is made over a layer, and the size of the numbers its parameters get."""
    return functools.partial(kind, lora_dim=rank, alpha=alpha, **options), size


KINDS: dict[str, tuple[Make, float]] = {
    "LoCon": of(LoConModule, 0.12),
    "LoCon with mid": of(LoConModule, 0.3, use_tucker=True),
    "LoHa": of(LohaModule, 0.25),
    "LoHa of a high rank": of(LohaModule, 0.14, rank=12, alpha=12.0),
    "LoHa, Tucker": of(LohaModule, 0.4, use_tucker=True),
    "LoKr": of(LokrModule, 0.2, rank=2, factor=4),
    "LoKr, whole matrices": of(LokrModule, 0.1, full_matrix=True),
    "LoKr, both factored": of(LokrModule, 0.3, rank=2, factor=8, decompose_both=True),
    "LoKr, Tucker": of(LokrModule, 0.35, rank=2, factor=4, use_tucker=True),
    "GLoRA": of(GLoRAModule, 0.1),
    "OFT": of(DiagOFTModule, 0.1, rank=8),
    "OFT, constrained and rescaled": of(DiagOFTModule, 0.1, rank=8, constraint=0.05, rescaled=True),
    "BOFT": of(ButterflyOFTModule, 0.06, rank=8),
    "BOFT, rescaled": of(ButterflyOFTModule, 0.05, rank=8, rescaled=True),
    "IA3": of(IA3Module, 0.3),
    "IA3 on inputs": of(IA3Module, 0.3, train_on_input=True),
    "norms": (lambda name, module: NormModule(name, module), 0.3),
    "DoRA": of(LoConModule, 0.12, weight_decompose=True),
    "DoRA of LoHa": of(LohaModule, 0.25, weight_decompose=True),
    "DoRA of LoKr": of(LokrModule, 0.1, full_matrix=True, weight_decompose=True),
    "DoRA of inputs": of(LoConModule, 0.12, weight_decompose=True, wd_on_out=False),
}
WHOLE = {"DoRA", "DoRA of LoHa", "DoRA of LoKr", "DoRA of inputs"}
"""LyCORIS applies these whole at any weight; at weights other than 1 PEFT is followed."""


def lycoris_modules(pipe: Any, kind: str) -> dict[str, Any]:
    """Key of a layer as trainers spell it -> LyCORIS' module over it, with random parameters."""
    make, size = KINDS[kind]
    generator = torch.Generator().manual_seed(sorted(KINDS).index(kind))
    encoders = text_encoders(pipe)
    prefixes = ["lora_unet", *(["lora_te1", "lora_te2"] if len(encoders) > 1 else ["lora_te"])]
    found = {}
    for prefix, model in zip(prefixes, [pipe.unet, *(encoder for _, encoder in encoders)], strict=True):
        if kind == "norms":
            chosen = {name: module for name, module in model.named_modules() if name.endswith(NORMS)}
        else:
            chosen = targets(model, (*LINEAR, *CONVOLUTIONS) if prefix == "lora_unet" else TEXT)
        for name, layer in chosen.items():
            level = "text_model." if prefix != "lora_unet" and not name.startswith("text_model.") else ""
            flat = f"{prefix}_{(level + name).replace('.', '_')}"
            with torch.no_grad():
                module = make(flat, layer)
                for own, parameter in module.named_parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    around = parameter if own in ("dora_scale", "rescale") else torch.zeros(())
                    parameter.copy_(around * (1 + 0.3 * noise) if around.ndim else noise * size)
            found[flat] = module.eval()
    return found


def write(folder: Path, modules: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    state = {
        f"{flat}.{key}": value.detach().clone().contiguous()
        for flat, module in modules.items()
        for key, value in module.state_dict().items()
    }
    save_file(state, folder / FILE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """`<model>/<kind>/` for both families."""
    root = tmp_path_factory.mktemp("adapters")
    for model, (folder, pipeline_class, _) in MODELS.items():
        pipe = pipeline_class.from_pretrained(tiny_models / folder)
        for kind in KINDS:
            write(root / model / kind, lycoris_modules(pipe, kind))
    return root


def catalog_with(catalog: Catalog, root: Path, names: list[str]) -> Catalog:
    data = catalog.model_dump()
    data["loras"] = [
        {
            "name": name,
            "weights": [
                {"bases": [base], "source": {"folder": root / model / name}, "file": FILE}
                for model, (_, _, base) in MODELS.items()
                if (root / model / name).is_dir()
            ],
        }
        for name in names
    ]
    return Catalog.model_validate(data)


@pytest.fixture(scope="module")
def text2image(catalog: Catalog, folders: Path) -> Text2Image:
    return Text2Image(catalog_with(catalog, folders, list(KINDS)))


@contextmanager
def fresh_pipeline(model: str) -> Iterator[Any]:
    """A fresh pipeline of the oracle, used by this test only."""
    folder, pipeline_class, _ = MODELS[model]
    oracle.pipeline.cache_clear()
    yield oracle.pipeline(folder, pipeline_class)
    oracle.pipeline.cache_clear()


def expected(model: str, mixture: dict[str, float], fields: dict[str, Any]) -> np.ndarray:
    """diffusers with LyCORIS' modules over its layers."""
    with fresh_pipeline(model) as pipe:
        for kind, weight in mixture.items():
            for module in lycoris_modules(pipe, kind).values():
                module.multiplier = weight
                module.apply_to()
        return oracle.draw(**fields)


def assert_shows(text2image: Text2Image, picture: Any, fields: dict[str, Any]) -> None:
    plain = np.asarray(text2image.generate(GenerationParams(**fields)).image).astype(int)
    assert np.abs(np.asarray(picture) - plain).mean() > 1, "the adapter must show"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_alone(text2image: Text2Image, kind: str) -> None:
    fields = request("SD1.5", sampler="Euler", steps=3)
    weight = 1.0 if kind in WHOLE else 0.7
    picture = text2image.generate(GenerationParams(**fields, loras={kind: weight})).image
    assert_same(picture, expected("SD1.5", {kind: weight}, fields))
    assert_shows(text2image, picture, fields)


@pytest.mark.parametrize("model", ["SD1.5", pytest.param("SDXL1.0-base", marks=pytest.mark.slow)])
def test_all_kinds_in_one_batch(text2image: Text2Image, model: str) -> None:
    """Each in rows of its own, and some in one row."""
    mixtures: list[dict[str, float]] = [{kind: 1.0 if kind in WHOLE else -0.6} for kind in KINDS]
    mixtures += [{}, {"LoCon": 0.5, "LoHa": 0.5, "LoKr, whole matrices": 0.5}, {"norms": 1.0, "GLoRA": -0.5}]
    mixtures += [{"OFT": 0.5, "LoCon": 0.5, "IA3": -0.4}]
    requests = [
        (request(model, seed=seed, sampler="Euler a" if seed % 2 else "Euler", steps=2), mixture)
        for seed, mixture in enumerate(mixtures)
    ]
    together = text2image.generate_many([GenerationParams(**fields, loras=mixture) for fields, mixture in requests])
    for picture, (fields, mixture) in zip(together, requests, strict=True):
        assert_same(picture.image, expected(model, mixture, fields))


def flat(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}"


SPELLINGS: dict[str, Callable[[str, str], str]] = {
    "kohya, blocks counted through": lambda name, original: flat(original),
    "LyCORIS' own prefix": lambda name, original: f"lycoris_{name.replace('.', '_')}",
    "ComfyUI": lambda name, original: f"diffusion_model.{original}",
    "dots": lambda name, original: f"unet.{name}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["LoCon with mid", "LoKr", "norms"])
def test_layers_by_other_names(
    catalog: Catalog, folders: Path, tiny_models: Path, tmp_path: Path, kind: str, spelling: str
) -> None:
    """The same picture as by the names that were compared with LyCORIS."""
    unet = MODELS["SDXL1.0-base"][1].from_pretrained(tiny_models / "sdxl").unet
    originals = original_names(name for name, module in unet.named_modules() if hasattr(module, "weight"))
    names = {flat(name): SPELLINGS[spelling](name, original) for name, original in originals.items()}
    state = load_file(folders / "SDXL1.0-base" / kind / FILE)
    renamed = {}
    for key, tensor in state.items():
        layer, _, parameter = key.partition(".")
        renamed[f"{names.get(layer, layer)}.{parameter}"] = tensor
    assert set(renamed) != set(state)
    for name, tensors in (("as written", state), ("renamed", renamed)):
        (tmp_path / "SDXL1.0-base" / name).mkdir(parents=True)
        save_file(tensors, tmp_path / "SDXL1.0-base" / name / FILE)
    text2image = Text2Image(catalog_with(catalog, tmp_path, ["as written", "renamed"]))
    fields = request("SDXL1.0-base", sampler="Euler", steps=1)
    one, other = (
        np.asarray(text2image.generate(GenerationParams(**fields, loras={name: 0.8})).image)
        for name in ("as written", "renamed")
    )
    assert np.array_equal(one, other)


def peft_dora(pipe: Any, folder: Path, seed: int, **options: Any) -> None:
    """As diffusers' training scripts save a DoRA."""
    torch.manual_seed(seed)
    saved = {}
    for part, model in [("unet", pipe.unet), *text_encoders(pipe)]:
        names = sorted(targets(model, (*LINEAR, "conv1") if part == "unet" else TEXT))
        patterns = {  # PEFT warns of those that match nothing
            key: {own: value for own, value in table.items() if any(re.match(rf"(.*\.)?({own})$", n) for n in names)}
            for key, table in options.items()
            if key.endswith("_pattern")
        }
        config = LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights="gaussian", **options | patterns)
        model.add_adapter(config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
            elif "magnitude" in name:
                parameter.data *= 1 + 0.3 * torch.randn(parameter.shape)
        saved[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        saved[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(folder, **saved)


PEFT: dict[str, dict[str, Any]] = {
    "PEFT DoRA": {"use_dora": True},
    "PEFT rslora": {"use_rslora": True},
    "PEFT with patterns": {
        "rank_pattern": {"to_q": 2, "fc1": 6},
        "alpha_pattern": {"to_q": 1, r"down_blocks\.\d+\..*to_v": 5, "fc1": 9, r"layers\.0\..*q_proj": 2},
    },
    "PEFT rslora and DoRA": {"use_dora": True, "use_rslora": True},
}


@pytest.fixture(scope="module")
def peft_folders(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    root = tmp_path_factory.mktemp("peft")
    for model, (folder, pipeline_class, _) in MODELS.items():
        for seed, (name, options) in enumerate(PEFT.items()):
            peft_dora(pipeline_class.from_pretrained(tiny_models / folder), root / model / name, seed, **options)
    return root


def restore_magnitudes(pipe: Any, state: dict[str, torch.Tensor], adapter: str) -> None:
    """transformers 5 looks for the magnitudes of text encoders under another name, and makes new ones."""
    for part, model in text_encoders(pipe):
        for name, parameter in model.named_parameters():
            layer, found, _ = name.partition(f".lora_magnitude_vector.{adapter}")
            if found:
                parameter.data = state[f"{part}.{layer}.lora_magnitude_vector"]


def expected_of_peft(root: Path, model: str, mixture: dict[str, float], fields: dict[str, Any]) -> np.ndarray:
    with fresh_pipeline(model) as pipe:
        names = {name: name.replace(" ", "_") for name in mixture}
        for name, adapter in names.items():
            pipe.load_lora_weights(root / model / name, weight_name=FILE, adapter_name=adapter)
            restore_magnitudes(pipe, load_file(root / model / name / FILE), adapter)
        if mixture:
            pipe.set_adapters(list(names.values()), list(mixture.values()))
        return oracle.draw(**fields)


@pytest.mark.parametrize("model", ["SD1.5", pytest.param("SDXL1.0-base", marks=pytest.mark.slow)])
def test_peft_and_its_doras(catalog: Catalog, peft_folders: Path, model: str) -> None:
    """At any weight, in both orders with a LoRA, and beside rows that have none of it."""
    text2image = Text2Image(catalog_with(catalog, peft_folders, list(PEFT)))
    mixtures: list[dict[str, float]] = [{name: 1.0} for name in PEFT]
    mixtures += [{"PEFT DoRA": 0.5}, {"PEFT DoRA": -0.7}, {"PEFT rslora and DoRA": 1.6}, {}]
    mixtures += [{"PEFT rslora": 0.5, "PEFT DoRA": 0.5}, {"PEFT DoRA": 0.5, "PEFT rslora": 0.5}]
    mixtures += [{"PEFT with patterns": 0.4, "PEFT rslora": -0.4}]
    requests = [(request(model, seed=s, sampler="Euler", steps=2), mixture) for s, mixture in enumerate(mixtures)]
    together = text2image.generate_many([GenerationParams(**fields, loras=mixture) for fields, mixture in requests])
    for picture, (fields, mixture) in zip(together, requests, strict=True):
        assert_same(picture.image, expected_of_peft(peft_folders, model, mixture, fields))


FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "half": lambda tensor: tensor.half(),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "double": lambda tensor: tensor.double(),
}


@pytest.mark.parametrize("number_format", FORMATS)
def test_formats_of_numbers(catalog: Catalog, folders: Path, tmp_path: Path, number_format: str) -> None:
    """The picture is that of the same numbers in float32; whole alphas are integers, and one layer has none."""
    rounded = FORMATS[number_format]
    state = load_file(folders / "SD1.5" / "LoCon" / FILE)
    first = next(key for key in state if key.endswith(".alpha"))
    del state[first]
    for name, cast in (("as written", rounded), ("in float32", lambda tensor: rounded(tensor).float())):
        (tmp_path / "SD1.5" / name).mkdir(parents=True)
        alpha = torch.tensor(2) if name == "as written" else torch.tensor(2.0)
        cast_state = {key: alpha.clone() if key.endswith(".alpha") else cast(tensor) for key, tensor in state.items()}
        save_file(cast_state, tmp_path / "SD1.5" / name / FILE)
    text2image = Text2Image(catalog_with(catalog, tmp_path, ["as written", "in float32"]))
    fields = request("SD1.5", sampler="Euler", steps=2)
    one, other = (
        text2image.generate(GenerationParams(**fields, loras={name: 0.8})).image
        for name in ("as written", "in float32")
    )
    assert np.array_equal(np.asarray(one), np.asarray(other))


def test_full_differences(catalog: Catalog, tmp_path: Path) -> None:
    """Differences of weights, biases and norms, as LyCORIS' `full` saves them, against the merged weights."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    with fresh_pipeline("SD1.5") as pipe:
        fields = request("SD1.5", sampler="Euler", steps=3)
        for name, module in pipe.unet.named_modules():
            weight = getattr(module, "weight", None)
            if weight is None or not name.endswith((*LINEAR, "conv1", "norm1", "conv_out")):
                continue
            flat = f"lora_unet_{name.replace('.', '_')}"
            for key, own in (("diff", weight), ("diff_b", module.bias)):
                if own is not None:
                    change = torch.randn(own.shape, generator=generator) * 0.02
                    state[f"{flat}.{key}"] = change
                    own.data += 0.8 * change
        wanted = oracle.draw(**fields)
    (tmp_path / "SD1.5" / "full").mkdir(parents=True)
    save_file(state, tmp_path / "SD1.5" / "full" / FILE)
    text2image = Text2Image(catalog_with(catalog, tmp_path, ["full"]))
    picture = text2image.generate(GenerationParams(**fields, loras={"full": 0.8})).image
    assert_same(picture, wanted)
    assert_shows(text2image, picture, fields)
