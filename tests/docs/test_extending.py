"""The sampler and the adapter kind of extending.md, added as the page says, draw what diffusers draws."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from config.catalog import Catalog
from config.choices import Choices
from pipelines import planning
from pipelines.adapters import building, keys
from pipelines.errors import InvalidValueError
from pipelines.plan import GenerationParams, ScheduleSlice
from pipelines.sampling.samplers import SAMPLERS, make_sampler
from pipelines.text2image import Text2Image
from tests.docs.pages import DOCS, blocks
from tests.parity import oracle

PAGE = DOCS / "extending.md"
ENDING = r'(r"\.(gain)", None)'
FIELDS: dict[str, Any] = {
    "model_name": "SD1.5",
    "prompt": "an apple",
    "width": 128,
    "height": 128,
    "steps": 4,
    "seed": 3,
}
GAINED = ("to_q", "to_v", "proj_in", "conv1")


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page's first two sections define."""
    text = PAGE.read_text()
    end = text.count("\n", 0, text.index("## A ControlNet"))
    found: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(PAGE, "python"):
        if block.line < end:
            exec(compile(block.padded, PAGE, "exec"), found)
    return found


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def assert_same(ours: Any, theirs: Any) -> None:
    pixels = np.asarray(theirs).astype(int)
    assert pixels.std() > 10, "a flat picture proves nothing"
    assert np.abs(np.asarray(ours) - pixels).max() <= 1


def test_the_sampler_draws_what_ddim_draws(
    catalog: Catalog, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of SD1.5's file, which leaves `clip_sample` to diffusers' default, and SD2's, which says false."""
    monkeypatch.setitem(sys.modules, "pipelines.sampling.plain_ddim", SimpleNamespace(PlainDDIM=names["PlainDDIM"]))
    monkeypatch.setitem(SAMPLERS, "Plain DDIM", names["spec"])
    longest = make_sampler("Plain DDIM", names["config"], ScheduleSlice(steps=names["spec"].max_steps), seed=0)
    assert longest.timesteps.max() <= 999, "the last trained timestep"
    monkeypatch.setattr(planning, "SAMPLER_CHOICES", Choices("sampler", SAMPLERS))
    noise = png(Image.effect_noise((128, 128), 90).convert("RGB"))
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    photo = {"image": noise, "strength": 0.6}
    cases = [{"model_name": "SD2"}, photo, photo | {"mask_image": png(mask)}]
    requests = [
        GenerationParams(**FIELDS | case, sampler=name) for case in ({}, *cases) for name in ("Plain DDIM", "DDIM")
    ]
    pictures = [picture.image for picture in Text2Image(catalog).generate_many(requests)]
    for ours, theirs in zip(pictures[::2], pictures[1::2], strict=True):
        assert_same(ours, theirs)
    assert_same(pictures[0], oracle.draw(**FIELDS, cfg_scale=5.0, sampler="DDIM"))


def test_the_adapter_kind_is_read_from_a_file_and_scales_outputs(
    catalog: Catalog, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert f"`{ENDING}`" in PAGE.read_text()
    monkeypatch.setattr(keys, "_ENDING", (*keys._ENDING, (re.compile(r"\.(gain)$"), None)))
    monkeypatch.setitem(building._BUILDERS, "gain", names["gain"])
    generator = torch.Generator().manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(oracle.TINY / "sd15")
    weights = {name: m.weight for name, m in pipe.unet.named_modules() if name.endswith(GAINED)}
    gains = {name: torch.randn(len(weight), generator=generator) / 2 for name, weight in weights.items()}
    save_file(
        {f"lora_unet_{n.replace('.', '_')}.gain": gain for n, gain in gains.items()}, tmp_path / "gains.safetensors"
    )
    save_file({"lora_unet_mid_block_attentions_0_proj_in.gain": torch.ones(3)}, tmp_path / "misfit.safetensors")
    data = catalog.model_dump()
    for name in ("gains", "misfit"):
        own = {"bases": ["unet-sd15"], "source": {"folder": tmp_path}, "file": f"{name}.safetensors"}
        data["loras"] += ({"name": name, "weights": [own]},)
    text2image = Text2Image(Catalog.model_validate(data))

    ours, plain = text2image.generate_many(
        [GenerationParams(**FIELDS, sampler="Euler", loras=loras) for loras in ({"gains": 0.7}, {})]
    )
    assert np.abs(np.asarray(ours.image).astype(int) - np.asarray(plain.image)).mean() > 1, "the adapter must show"
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(1 + 0.7 * gains[name].view(-1, *[1] * (weight.ndim - 1)))
    monkeypatch.setattr(oracle, "pipeline", lambda folder, pipeline_class: pipe)
    pipe.default_scheduler_config = pipe.scheduler.config
    assert_same(ours.image, oracle.draw(**FIELDS, cfg_scale=5.0, sampler="Euler"))
    with pytest.raises(InvalidValueError, match=r"misfit.*which takes \d+ gains"):
        text2image.generate(GenerationParams(**FIELDS, loras={"misfit": 1.0}))
