"""Textual inversions in prompts equal diffusers' load_textual_inversion: one vector, several, and SDXL's pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from config.catalog import Catalog
from pipelines.errors import InvalidValueError, WeightsError
from pipelines.plan import EmbeddingUse, GenerationParams
from pipelines.text2image import Text2Image
from tests.parity import oracle
from tests.parity.test_pictures import assert_same, request

MODELS: dict[str, tuple[str, Any, str]] = {
    "SD1.5": ("sd15", StableDiffusionPipeline, "unet-sd15"),
    "SDXL1.0-base": ("sdxl", StableDiffusionXLPipeline, "unet-sdxl-base"),
}
VECTORS = {"Cat Toy": 1, "style": 3}


def widths(tiny_models: Path, model: str) -> list[int]:
    folder = tiny_models / MODELS[model][0]
    names = ["text_encoder", *(["text_encoder_2"] if model.startswith("SDXL") else [])]
    key = "embeddings.token_embedding.weight"
    files = [load_file(folder / name / "model.safetensors") for name in names]
    return [next(t.shape[1] for k, t in state.items() if k.endswith(key)) for state in files]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    root = tmp_path_factory.mktemp("inversions")
    generator = torch.Generator().manual_seed(0)
    for model in MODELS:
        (root / model).mkdir()
        own = widths(tiny_models, model)
        for name, count in VECTORS.items():
            vectors = [torch.randn(count, width, generator=generator) * 0.5 for width in own]
            if len(own) == 2:
                state = {"clip_l": vectors[0], "clip_g": vectors[1]}
            elif count == 1:
                state = {f"<{name}>": vectors[0][0]}  # as diffusers saves one
            else:
                state = {"emb_params": vectors[0].half()}  # as A1111 does
            save_file(state, root / model / f"{name}.safetensors")
    return root


@pytest.fixture(scope="module")
def inversion_catalog(catalog: Catalog, folder: Path) -> Catalog:
    data = catalog.model_dump()
    data["embeddings"] = [
        {
            "name": name,
            "weights": [
                {"bases": [base], "source": {"folder": folder / model}, "file": f"{name}.safetensors"}
                for model, (_, _, base) in MODELS.items()
            ],
        }
        for name in VECTORS
    ]
    return Catalog.model_validate(data)


@pytest.fixture(scope="module")
def text2image(inversion_catalog: Catalog) -> Text2Image:
    return Text2Image(inversion_catalog)


def expected(root: Path, model: str, fields: dict[str, Any]) -> np.ndarray:
    """diffusers, with both inversions in a pipeline of its own."""
    name, pipeline_class, _ = MODELS[model]
    oracle.pipeline.cache_clear()
    pipe = oracle.pipeline(name, pipeline_class)
    for embedding in VECTORS:
        state = load_file(root / model / f"{embedding}.safetensors")
        token = f"<{embedding}>"
        if model.startswith("SDXL"):
            for key, encoder, tokenizer in (
                ("clip_l", pipe.text_encoder, pipe.tokenizer),
                ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
            ):
                pipe.load_textual_inversion(state[key], token=token, text_encoder=encoder, tokenizer=tokenizer)
        else:
            (vectors,) = state.values()
            pipe.load_textual_inversion(vectors.float(), token=token)
    drawn = oracle.draw(**fields)
    oracle.pipeline.cache_clear()
    return drawn


PROMPTS: list[dict[str, str]] = [
    {"prompt": "a photo of <Cat Toy> on a table"},
    {"prompt": "<style>", "negative_prompt": "bad <Cat Toy>, fog"},
    {"prompt": "two of <Cat Toy> and <Cat Toy> in <style>, oil", "negative_prompt": ""},
    {"prompt": "a fox <nobody> knows <style>"},
]


@pytest.mark.parametrize("model", sorted(MODELS))
def test_prompts_with_inversions(text2image: Text2Image, folder: Path, model: str) -> None:
    """In one batch, and beside a prompt that has none."""
    requests = [request(model, seed=seed, sampler="Euler", steps=3) | texts for seed, texts in enumerate(PROMPTS)]
    plain = request(model, seed=9, sampler="Euler", steps=3)
    for fields in requests:  # diffusers has no zero embedding for an absent negative prompt once it is given
        fields.setdefault("negative_prompt", "")
    together = text2image.generate_many([GenerationParams(**fields) for fields in [*requests, plain]])
    for picture, fields in zip(together, requests, strict=False):
        assert_same(picture.image, expected(folder, model, fields))
    assert_same(together[-1].image, oracle.draw(**plain))


def test_names_are_found_whatever_their_case(text2image: Text2Image) -> None:
    fields = request("SD1.5", sampler="Euler", steps=2) | {"prompt": "a <cat toy>"}
    one = text2image.generate(GenerationParams(**fields))
    other = text2image.generate(GenerationParams(**fields | {"prompt": "a <Cat Toy>"}))
    assert one.plan.stages[0].text.prompts == ("a <Cat Toy>",)
    assert one.plan.stages[0].text.embeddings == (EmbeddingUse(name="Cat Toy"),)
    assert np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_weights_and_long_prompts(text2image: Text2Image) -> None:
    """Vectors are weighted as tokens are, and count as tokens."""
    fields = request("SD1.5", sampler="Euler", steps=2, prompt_syntax="weighted")

    def draw(prompt: str) -> np.ndarray:
        return np.asarray(text2image.generate(GenerationParams(**fields | {"prompt": prompt})).image).astype(int)

    assert np.array_equal(draw("a (<style>:1.0) fox"), draw("a <style> fox"))
    assert np.abs(draw("a (<style>:1.6) fox") - draw("a <style> fox")).max() > 1
    long = "fox " * 80
    assert np.abs(draw(f"{long} <style>") - draw(long)).max() > 1


def test_a_model_that_an_inversion_was_not_made_for(text2image: Text2Image) -> None:
    with pytest.raises(InvalidValueError, match=r"prompt: the embedding '<style>' is not available with SD2: made for"):
        text2image.generate(GenerationParams(**request("SD2") | {"prompt": "a <style>"}))


BAD: dict[str, tuple[dict[str, torch.Tensor] | bytes, str]] = {
    "another width": ({"x": torch.zeros(2, 48)}, "vectors of 48 numbers"),
    "a pair": ({"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(1, 32)}, "has 2 tensors"),
    "three dimensions": ({"x": torch.zeros(1, 2, 32)}, r"shape \[1, 2, 32\]"),
    "not a number": ({"x": torch.full((1, 32), float("nan"))}, "not finite"),
    "empty": (b"", "it is empty"),
    "cut": (b"\x10\0\0\0\0\0\0\0{", "truncated or damaged"),
    "a pickle": (b"\x80\x02}q\x00.", "pickle under another name"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_none_is_refused_by_name(inversion_catalog: Catalog, tmp_path: Path, case: str) -> None:
    content, said = BAD[case]
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    data = inversion_catalog.model_dump()
    weights = {"bases": ["unet-sd15"], "source": {"folder": tmp_path}, "file": path.name}
    data["embeddings"] = [{"name": "x", "weights": [weights]}]
    text2image = Text2Image(Catalog.model_validate(data))
    with pytest.raises((InvalidValueError, WeightsError), match=said) as refused:
        text2image.generate(GenerationParams(**request("SD1.5") | {"prompt": "a <x>"}))
    assert "x" in str(refused.value)
    text2image.generate(GenerationParams(**request("SD1.5", steps=1)))
