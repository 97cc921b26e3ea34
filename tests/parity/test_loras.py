"""LoRAs added row by row equal diffusers' load_lora_weights + set_adapters: every file layout, alone and mixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from config.catalog import Catalog
from pipelines.errors import InvalidValueError
from pipelines.plan import GenerationParams, PartWeights
from pipelines.text2image import Text2Image
from tests.parity import oracle
from tests.parity.test_pictures import assert_same, request

# The oracle holds several adapters in one model, which PEFT points out.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")

MODELS = {
    "SD1.5": ("sd15", StableDiffusionPipeline, "unet-sd15"),
    "SDXL1.0-base": ("sdxl", StableDiffusionXLPipeline, "unet-sdxl-base"),
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def matrices(module: Any, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A random pair for a linear layer or a convolution."""
    weight = module.weight
    down = torch.randn(rank, *weight.shape[1:], generator=generator) * weight[0].numel() ** -0.5
    up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator)
    return down, up


def targets(model: Any, endings: tuple[str, ...]) -> dict[str, Any]:
    return {
        n: m for n, m in model.named_modules() if n.endswith(endings) and hasattr(m, "weight") and m.weight.ndim > 1
    }


def text_encoders(pipe: Any) -> list[tuple[str, Any]]:
    second = getattr(pipe, "text_encoder_2", None)
    return [("text_encoder", pipe.text_encoder), *([("text_encoder_2", second)] if second is not None else [])]


# Magnitudes are moderate: a strong random LoRA sharpens attention until rounding errors become visible on both sides.
def peft_file(pipe: Any, folder: Path, seed: int) -> None:
    """As diffusers' training scripts save: LoraConfig metadata, an alpha that is not the rank."""
    torch.manual_seed(seed)
    saved = {}
    for part, model in [("unet", pipe.unet), *text_encoders(pipe)]:
        endings = (*ATTENTION, "proj_in", "conv1") if part == "unet" else TEXT
        names = sorted(targets(model, endings))
        model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights="gaussian"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        saved[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        saved[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(folder, **saved)


def kohya_file(pipe: Any, folder: Path, seed: int) -> None:
    """As kohya's scripts save: flat names, an alpha for each layer, convolutions of another rank and alpha."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    encoders = text_encoders(pipe)
    prefixes = {
        "text_encoder": "lora_te1" if len(encoders) > 1 else "lora_te",
        "text_encoder_2": "lora_te2",
        "unet": "lora_unet",
    }
    for part, model in [("unet", pipe.unet), *encoders]:
        endings = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "conv1") if part == "unet" else TEXT
        for name, module in targets(model, endings).items():
            convolution = name.endswith("conv1")
            level = "" if part == "unet" or name.startswith("text_model.") else "text_model."
            flat = f"{prefixes[part]}_{(level + name).replace('.', '_')}"
            down, up = matrices(module, 2 if convolution else 4, generator)
            state[f"{flat}.lora_down.weight"], state[f"{flat}.lora_up.weight"] = down, up * 0.15
            state[f"{flat}.alpha"] = torch.tensor(1.0 if convolution else 3.0)
    save_file(state, folder / "pytorch_lora_weights.safetensors")


def old_file(pipe: Any, folder: Path, seed: int) -> None:
    """As diffusers saved before PEFT: attention processors, no alpha."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in targets(pipe.unet, ATTENTION).items():
        attention, _, leaf = name.removesuffix(".0").rpartition(".")
        down, up = matrices(module, 4, generator)
        state[f"unet.{attention}.processor.{leaf}_lora.down.weight"] = down
        state[f"unet.{attention}.processor.{leaf}_lora.up.weight"] = up * 0.15
    save_file(state, folder / "pytorch_lora_weights.safetensors")


FORMATS: dict[str, Callable[[Any, Path, int], None]] = {"peft": peft_file, "kohya": kohya_file, "old": old_file}


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """`<model>/<format>/pytorch_lora_weights.safetensors` for both families."""
    root = tmp_path_factory.mktemp("loras")
    for model, (folder, pipeline_class, _) in MODELS.items():
        for seed, (name, write) in enumerate(FORMATS.items()):
            target = root / model / name
            target.mkdir(parents=True)
            write(pipeline_class.from_pretrained(tiny_models / folder), target, seed)
    return root


@pytest.fixture(scope="module")
def lora_catalog(catalog: Catalog, lora_folder: Path) -> Catalog:
    data = catalog.model_dump()
    data["loras"] = [
        {
            "name": name,
            "weights": [
                {
                    "bases": [base],
                    "source": {"folder": lora_folder / model / name},
                    "file": "pytorch_lora_weights.safetensors",
                }
                for model, (_, _, base) in MODELS.items()
            ],
        }
        for name in FORMATS
    ]
    return Catalog.model_validate(data)


@pytest.fixture(scope="module")
def text2image(lora_catalog: Catalog) -> Text2Image:
    return Text2Image(lora_catalog)


def expected(lora_folder: Path, model: str, mixture: dict[str, Any], fields: dict[str, Any]) -> np.ndarray:
    """diffusers with the adapters of `mixture`, in a pipeline of its own: adapters leave traces when unloaded."""
    folder, pipeline_class, _ = MODELS[model]
    oracle.pipeline.cache_clear()
    pipe = oracle.pipeline(folder, pipeline_class)
    for name in mixture:
        pipe.load_lora_weights(
            lora_folder / model / name, weight_name="pytorch_lora_weights.safetensors", adapter_name=name
        )
    if mixture:
        pipe.set_adapters(list(mixture), list(mixture.values()))
    drawn = oracle.draw(**fields)
    oracle.pipeline.cache_clear()
    return drawn


@pytest.mark.parametrize(
    "mixture",
    [
        {"peft": 1.0},
        {"kohya": 0.8},
        {"old": 0.7},
        {"peft": 0.6, "kohya": 0.5},
        {"kohya": -0.5},
        {"old": 0.4, "peft": -0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", sorted(MODELS))
def test_mixtures(text2image: Text2Image, lora_folder: Path, model: str, mixture: dict[str, float]) -> None:
    fields = request(model, sampler="Euler", steps=4)
    ours = text2image.generate(GenerationParams(**fields, loras=mixture)).image
    assert_same(ours, expected(lora_folder, model, mixture, fields))
    plain = text2image.generate(GenerationParams(**fields)).image
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(plain)).mean() > 1, "the LoRA must show"


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_weight_for_each_part(text2image: Text2Image, lora_folder: Path, model: str) -> None:
    """As diffusers' set_adapters takes them; `text_encoder` alone counts for both of SDXL's."""
    fields = request(model, sampler="Euler", steps=2)
    second = {} if model == "SD1.5" else {"text_encoder_2": 0.4}
    cases: list[tuple[dict[str, float], dict[str, float]]] = [
        ({"unet": 0.8, "text_encoder": 0.4}, {"unet": 0.8, "text_encoder": 0.4} | second),
        ({"unet": 0.0, "text_encoder": 1.3}, {"unet": 0.0, "text_encoder": 1.3} | dict.fromkeys(second, 1.3)),
        ({"text_encoder": 0.0}, {"unet": 1.0, "text_encoder": 0.0} | dict.fromkeys(second, 0.0)),
    ]
    if second:
        own = {"unet": -0.5, "text_encoder": 0.7, "text_encoder_2": 0.2}
        cases.append((own, own))
    mixtures = [{"peft": PartWeights.model_validate(weights), "old": 0.5} for weights, _ in cases]
    together = text2image.generate_many([GenerationParams(**fields, loras=mixture) for mixture in mixtures])
    for picture, (_, weights) in zip(together, cases, strict=True):
        assert_same(picture.image, expected(lora_folder, model, {"peft": dict(weights), "old": 0.5}, fields))


@pytest.mark.parametrize("model", sorted(MODELS))
def test_users_of_different_loras_share_ticks(text2image: Text2Image, lora_folder: Path, model: str) -> None:
    requests = [
        (request(model, seed=1, sampler="Euler", steps=4), {"peft": 1.0}),
        (request(model, seed=2, sampler="Euler a", steps=5, cfg_scale=1.0), {"kohya": 0.5, "old": 0.5}),
        (request(model, seed=3, sampler="DDIM", steps=6), {}),
        (request(model, seed=4, sampler="Heun", steps=3, cfg_scale=3.0), {"kohya": -0.7}),
    ]
    together = text2image.generate_many([GenerationParams(**fields, loras=mixture) for fields, mixture in requests])
    for picture, (fields, mixture) in zip(together, requests, strict=True):
        assert_same(picture.image, expected(lora_folder, model, mixture, fields))


def test_weights_are_unchanged_after_many_loras(text2image: Text2Image) -> None:
    fields = request("SD1.5", sampler="Euler", steps=3)
    before = text2image.generate(GenerationParams(**fields)).image
    text2image.generate(GenerationParams(**fields, loras={"peft": 3.0, "kohya": -2.0}))
    assert np.array_equal(np.asarray(before), np.asarray(text2image.generate(GenerationParams(**fields)).image))


def test_a_wrong_base_names_the_first_mismatch(lora_catalog: Catalog, lora_folder: Path) -> None:
    data = lora_catalog.model_dump()
    data["loras"][0]["weights"] = [
        {
            "bases": ["unet-sd15"],
            "source": {"folder": lora_folder / "SDXL1.0-base" / "kohya"},
            "file": "pytorch_lora_weights.safetensors",
        }
    ]
    text2image = Text2Image(Catalog.model_validate(data))
    with pytest.raises(InvalidValueError, match=r"'peft' \(.*\) does not fit this model: its layer .* meets"):
        text2image.generate(GenerationParams(**request("SD1.5"), loras={"peft": 1.0}))


@pytest.mark.parametrize(
    ("key", "kind"), [("vera_lambda_b", "VeRA"), ("ia3_l.weight", "PEFT IA3"), ("oft_R.weight", "PEFT OFT")]
)
def test_other_adapters_are_refused_by_name(lora_catalog: Catalog, tmp_path: Path, key: str, kind: str) -> None:
    save_file({f"lora_unet_mid_block.{key}": torch.zeros(1)}, tmp_path / "other.safetensors")
    data = lora_catalog.model_dump()
    data["loras"][0]["weights"] = [
        {"bases": ["unet-sd15"], "source": {"folder": tmp_path}, "file": "other.safetensors"}
    ]
    text2image = Text2Image(Catalog.model_validate(data))
    with pytest.raises(InvalidValueError, match=rf"'peft' \(other.safetensors\) is a {kind} adapter"):
        text2image.generate(GenerationParams(**request("SD1.5"), loras={"peft": 1.0}))


def test_the_plan_knows_which_loras_fit(lora_catalog: Catalog) -> None:
    text2image = Text2Image(lora_catalog)
    with pytest.raises(InvalidValueError, match=r"'old' is not available with SD2: made for other models. Only \[\]"):
        text2image.generate(GenerationParams(**request("SD2"), loras={"old": 1.0}))
    with pytest.raises(InvalidValueError, match=r"Unexpected loras 'odl'. Did you mean 'old'\? Only \['peft'"):
        text2image.generate(GenerationParams(**request("SD1.5"), loras={"odl": 1.0}))
