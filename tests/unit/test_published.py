"""The hub's configurations as they are published: older than some keys, and read with diffusers' defaults."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from config.catalog import Catalog
from pipelines.plan import GenerationParams, ScheduleSlice
from pipelines.sampling.latents import LatentSpace
from pipelines.sampling.samplers import SAMPLERS, make_sampler
from pipelines.text2image import Text2Image
from tests.support import published

OLD_KEYS = set(published.VAES["SD1.5, Flax"][0])


@pytest.mark.parametrize("name", published.VAES)
def test_a_published_vae_has_a_latent_space(name: str) -> None:
    config, scale = published.VAES[name]
    space = LatentSpace.from_vae_config(config, statistics=name.startswith("SDXL"))
    assert (space.channels, space.downscale, space.scale, space.mean) == (4, 8, scale, None)


@pytest.mark.parametrize("name", published.SCHEDULERS)
def test_every_sampler_starts_from_a_published_scheduler(name: str) -> None:
    for sampler_name, spec in SAMPLERS.items():
        if not spec.edm:
            sampler = make_sampler(sampler_name, published.SCHEDULERS[name], ScheduleSlice(steps=4), seed=1)
            assert len(sampler.timesteps) >= 4, sampler_name
            assert math.isfinite(sampler.init_noise_sigma), sampler_name


def test_a_model_with_the_oldest_configs_draws_as_with_the_newest(
    catalog: Catalog, tiny_models: Path, tmp_path: Path
) -> None:
    """Tiny weights, configs with the keys and class names that SD1.5's have, and no others."""
    folder = tmp_path / "sd15"
    shutil.copytree(tiny_models / "sd15", folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    old = {key: value for key, value in config.items() if key in OLD_KEYS} | {"_class_name": "FlaxAutoencoderKL"}
    assert "scaling_factor" in config.keys() - old.keys()
    (folder / "vae" / "config.json").write_text(json.dumps(old))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(published.SCHEDULERS["SD1.5"]))
    data = catalog.model_dump()
    for component in data["components"]:
        if component["id"] in ("unet-sd15", "vae-sd15"):
            component["source"] = {"folder": folder}
    params = GenerationParams(
        model_name="SD1.5", prompt="a fox", width=128, height=128, steps=4, seed=3, sampler="DPM++ 2M Karras"
    )
    drawn, expected = (
        np.asarray(Text2Image(c).generate(params).image) for c in (Catalog.model_validate(data), catalog)
    )
    assert expected.std() > 10
    assert np.array_equal(drawn, expected)
