"""A VAE that runs out of memory: once more in tiles, and no more than once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from pipelines.pictures.vae import VAE
from pipelines.sampling.latents import Latents, LatentSpace


def no_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture
def model(tiny_models: Path) -> AutoencoderKL:
    """A VAE whose tiles are 64 pixels wide."""
    loaded = AutoencoderKL.from_pretrained(tiny_models / "sd15" / "vae")
    loaded.tile_sample_min_size, loaded.tile_latent_min_size = 64, 8
    return loaded


@pytest.fixture
def vae(model: AutoencoderKL) -> VAE:
    return VAE(model, LatentSpace.from_vae_config(model.config, statistics=False))


@pytest.fixture
def latents(vae: VAE) -> Latents:
    return Latents(torch.randn(vae.space.shape(128, 128), generator=torch.Generator().manual_seed(2)))


def failing(method: Callable[..., Any], errors: list[Exception]) -> Callable[..., Any]:
    """The method, raising these first; what it computed until then must be gone when it is called again."""
    held: list[weakref.ref[torch.Tensor]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        assert all(activations() is None for activations in held)
        if errors:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            raise errors.pop(0)
        return method(*args, **kwargs)

    return call


def test_a_decode_that_runs_out_of_memory_is_repeated_in_tiles(
    vae: VAE, model: AutoencoderKL, latents: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.asarray(vae.decode(latents)).astype(int)
    model.enable_tiling()
    with torch.no_grad():
        pixels = model.decode(vae.space.denormalise(latents.values), return_dict=False)[0]
    expected = np.asarray(vae._processor.postprocess(pixels, output_type="pil")[0])
    monkeypatch.setattr(model, "decode", failing(model.decode, [no_memory()]))
    tiled = np.asarray(vae.decode(latents)).astype(int)
    assert np.abs(tiled - expected).max() == 0
    assert np.abs(tiled - whole).max() > 1, "it was not tiled"
    assert np.array_equal(vae.decode(latents), whole), "the next picture is decoded whole again"


def test_an_encode_too_with_the_same_noise(vae: VAE, model: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.effect_noise((128, 128), 60).convert("RGB")
    whole = vae.encode(picture, seed=4)
    monkeypatch.setattr(
        model, "encode", failing(model.encode, [RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")])
    )
    tiled = vae.encode(picture, seed=4)
    assert tiled.values.shape == whole.values.shape
    assert not torch.equal(tiled.values, whole.values), "it was not tiled"
    assert torch.equal(tiled.generator_state, whole.generator_state)


def test_bytes_are_rounded_as_diffusers_rounds_them(vae: VAE, model: AutoencoderKL, latents: Latents) -> None:
    with torch.no_grad():
        pixels = model.decode(vae.space.denormalise(latents.values), return_dict=False)[0]
    (expected,) = vae._processor.postprocess(pixels, output_type="pil")
    assert np.asarray(expected).std() > 1
    assert np.array_equal(vae.decode(latents), expected)


def test_a_second_out_of_memory_error_and_any_other_error_are_raised(
    vae: VAE, model: AutoencoderKL, latents: Latents, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = model.decode
    monkeypatch.setattr(model, "decode", failing(decode, [no_memory(), no_memory()]))
    with pytest.raises(torch.OutOfMemoryError):
        vae.decode(latents)
    errors: list[Exception] = [ValueError("latents of another VAE"), no_memory()]
    monkeypatch.setattr(model, "decode", failing(decode, errors))
    with pytest.raises(ValueError, match="another VAE"):
        vae.decode(latents)
    assert len(errors) == 1, "it was not tried again"
