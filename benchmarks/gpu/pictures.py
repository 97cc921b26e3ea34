"""Whole pictures of the tests' tiny models against the CPU's, and what a VAE of the published size takes."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from benchmarks.gpu.facts import Facts
from config.catalog import ARCHITECTURES, ROOT, Catalog
from models.make_tiny import make_tiny
from pipelines.pictures.vae import VAE
from pipelines.plan import GenerationParams
from pipelines.sampling.latents import Latents, LatentSpace
from pipelines.sampling.samplers import SAMPLERS
from pipelines.text2image import Text2Image


def parity(facts: Facts) -> None:
    """All samplers alone and together on the device, in both number formats, against float32 on the CPU."""
    make_tiny(ROOT / "models" / "tiny")
    names = [name for name, spec in SAMPLERS.items() if not spec.edm][:: 8 if facts.dry else 1]
    size: dict[str, Any] = {"width": 256, "height": 256, "steps": 8, "model_name": "SDXL1.0-base", "prompt": "a fox"}
    requests = [GenerationParams(sampler=name, seed=seed, **size) for seed, name in enumerate(names)]
    truth = [np.asarray(p.image).astype(int) for p in Text2Image(_catalog("float32")).generate_many(requests)]
    for dtype, tf32 in (("float32", False), ("float32", True), ("float16", True)):
        torch.backends.cudnn.allow_tf32 = tf32
        text2image = Text2Image(_catalog(dtype), "cpu" if facts.dry else "cuda")
        every = [text2image.generate(request) for request in requests[::5]]
        for drawn, pictures, expected in (
            ("alone", every, truth[::5]),
            ("together", text2image.generate_many(requests), truth),
        ):
            apart = [np.abs(np.asarray(p.image) - t) for p, t in zip(pictures, expected, strict=True)]
            own = names[::5] if drawn == "alone" else names
            facts.tell(
                "steps of 255 from the CPU's float32",
                dtype=dtype,
                convolutions_in_tf32=tf32,
                drawn=drawn,
                worst=max(int(a.max()) for a in apart),
                mean=round(float(np.mean([a.mean() for a in apart])), 3),
                above_1={name: int(a.max()) for name, a in zip(own, apart, strict=True) if a.max() > 1},
            )


def vae(facts: Facts) -> None:
    """Decoding a picture, whole and until its bytes are on the host, and writing the file."""
    folder = ROOT / "models" / "tiny" if facts.dry else ARCHITECTURES
    config = json.loads((folder / "sdxl" / "vae" / "config.json").read_text())
    space = LatentSpace.from_vae_config(config, statistics=True)
    for dtype in (torch.float32, facts.dtype):
        with facts.device:
            model = AutoencoderKL.from_config(config).to(dtype).eval().requires_grad_(False)
        ours = VAE(model, space)
        for pixels in (128, 256) if facts.dry else (512, 1024):
            latents = Latents(torch.randn(space.shape(pixels, pixels)))
            if not facts.dry:
                torch.cuda.reset_peak_memory_stats()
            values = latents.values.to(facts.device, dtype)
            with torch.inference_mode():
                decode = facts.ms(lambda values=values, model=model: model.decode(values, return_dict=False), 3, 1)  # type: ignore[misc]
            peak = 0 if facts.dry else round(torch.cuda.max_memory_allocated() / 2**20)
            whole = facts.ms(lambda ours=ours, latents=latents: ours.decode(latents), 3, 1)  # type: ignore[misc]
            facts.tell("VAE", pixels=pixels, dtype=dtype, decode_ms=decode, picture_on_host_ms=whole, peak_mib=peak)
    begin = time.perf_counter()
    ours.decode(latents).save("/dev/null", "jpeg", quality=95)
    facts.tell("VAE and a JPEG", pixels=pixels, ms=round(1000 * (time.perf_counter() - begin), 1))


def _catalog(dtype: str) -> Catalog:
    data = Catalog.load("tiny").model_dump()
    for component in data["components"]:
        component["dtype"] = dtype
    return Catalog.model_validate(data)
