"""A VAE that overflows in half precision is found when it is loaded, and computed in float32."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from config.catalog import Catalog
from pipelines.assembly import load_vae
from pipelines.pictures import precision
from pipelines.pictures.precision import overflows
from pipelines.sampling.latents import Latents, LatentSpace
from pipelines.weights import loading
from tests.unit.test_weights import with_source

LOUDER = 1e5
"""Weights of about 0.1 become about 10,000, which float16 holds, and sums of them do not: it ends at 65504."""


def loud(folder: Path) -> None:
    """Let one layer make numbers beyond float16 that the norm behind it brings back: in float32 nothing is wrong."""
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    for side in ("decoder", "encoder"):
        state[f"{side}.mid_block.resnets.0.conv1.weight"] *= LOUDER
    save_file(state, weights, {"format": "pt"})


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float16 are slow on a CPU."""
    monkeypatch.setattr(precision, "LATENTS", 8)


@pytest.fixture
def in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load as on a GPU; this CPU computes in float16 too, slowly."""
    monkeypatch.setattr(loading, "_dtype", lambda spec, device: torch.float16)


@pytest.mark.parametrize("overflowing", [False, True])
@pytest.mark.usefixtures("in_half_precision")
def test_a_vae_that_overflows_is_computed_in_float32(
    catalog: Catalog, tiny_models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, overflowing: bool
) -> None:
    shutil.copytree(tiny_models / "sd15", tmp_path / "model")
    if overflowing:
        loud(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        vae = load_vae(with_source(catalog, "vae-sd15", folder=tmp_path / "model"), "vae-sd15", "cpu")
    assert vae._model.dtype == (torch.float32 if overflowing else torch.float16)
    assert ("vae-sd15 overflows in half precision" in caplog.text) == overflowing
    latents = Latents(torch.randn(vae.space.shape(64, 64), generator=torch.Generator().manual_seed(2)))
    assert np.asarray(vae.decode(latents)).std() > 10


@pytest.mark.usefixtures("in_half_precision")
def test_a_vae_marked_force_upcast_is_not_probed(
    catalog: Catalog, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL's `force_upcast`, as diffusers heeds it."""

    def never(model: Any, space: Any) -> bool:
        raise AssertionError("probed")

    monkeypatch.setattr("pipelines.assembly.overflows", never)
    assert load_vae(catalog, "vae-sdxl", "cpu")._model.dtype == torch.float32
    shutil.copytree(tiny_models / "sdxl" / "vae", tmp_path / "fixed" / "vae")
    config = tmp_path / "fixed" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
    monkeypatch.setattr("pipelines.assembly.overflows", overflows)
    fixed = with_source(catalog, "vae-sdxl", folder=tmp_path / "fixed")
    assert load_vae(fixed, "vae-sdxl", "cpu")._model.dtype == torch.float16


def test_what_overflows_in_half_precision_need_not_in_bfloat16(tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models / "sd15", tmp_path / "model")
    loud(tmp_path / "model")
    model = AutoencoderKL.from_pretrained(tmp_path / "model" / "vae")
    space = LatentSpace.from_vae_config(model.config, statistics=False)
    found = {dtype: overflows(model.to(dtype), space) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert found == {torch.float32: False, torch.bfloat16: False, torch.float16: True}
