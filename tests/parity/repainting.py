"""Repainting a part of a picture as diffusers' inpainting pipelines do it, and what every such picture must be."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image, ImageDraw, ImageFilter

from tests.parity import oracle
from tests.support.pictures import png

FIELDS: dict[str, Any] = {"prompt": "a fox", "seed": 5, "steps": 6, "cfg_scale": 5.0, "strength": 0.7}


def picture(photo: bytes, side: int) -> Image.Image:
    return Image.open(io.BytesIO(photo)).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def disc(side: int) -> Image.Image:
    """A mask: white in the middle, black around it."""
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).ellipse((side // 4, side // 3, side * 3 // 4, side * 5 // 6), fill=255)
    return mask


def fields(model: str, photo: bytes, side: int, **changes: Any) -> dict[str, Any]:
    """A request that repaints a disc of a square picture."""
    base = {"sampler": "Euler a", "image": png(picture(photo, side)), "mask_image": png(disc(side))}
    return {"model_name": model, "width": side, "height": side} | FIELDS | base | changes


def inpainting_pipeline(folder: str | Path, request: dict[str, Any]) -> Any:
    """diffusers' for the model in a folder, with the request's sampler."""
    large = (oracle.TINY / folder / "text_encoder_2").is_dir()
    pipeline_class = StableDiffusionXLInpaintPipeline if large else StableDiffusionInpaintPipeline
    return oracle._scheduled(oracle.pipeline(folder, pipeline_class), request["sampler"], request["seed"])


def repainted(folder: str | Path, request: dict[str, Any], pipe: Any = None, **more: Any) -> np.ndarray:
    """diffusers' picture, laid into the one that was sent as its own `padding_mask_crop` does.

    Args:
        folder: of the model; relative ones are tiny models.
        request: what our server is asked.
        pipe: another pipeline than that of the folder.
        more: what diffusers' pipeline is told besides.
    """
    pipe = pipe or inpainting_pipeline(folder, request)
    image, mask = (Image.open(io.BytesIO(request[name])) for name in ("image", "mask_image"))
    if blur := request.get("mask_blur"):
        mask = mask.filter(ImageFilter.GaussianBlur(blur))
    crop = 32 if request.get("inpaint_area") == "masked" else None
    result = pipe(
        prompt=request["prompt"],
        image=image,
        mask_image=mask,
        width=request["width"],
        height=request["height"],
        strength=request["strength"],
        num_inference_steps=request["steps"],
        guidance_scale=request["cfg_scale"],
        generator=torch.Generator().manual_seed(request["seed"]),
        padding_mask_crop=crop,
        **more,
    ).images[0]
    return np.asarray(result if crop else pipe.image_processor.apply_overlay(mask, image, result))


def check(ours: Image.Image, folder: str | Path, request: dict[str, Any], expected: np.ndarray | None = None) -> None:
    """As diffusers' (or `expected`), changed where the mask is white, and untouched where it is black."""
    expected = repainted(folder, request) if expected is None else expected
    pixels, expected = np.asarray(ours).astype(int), expected.astype(int)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 1
    sent = np.asarray(Image.open(io.BytesIO(request["image"]))).astype(int)
    mask = Image.open(io.BytesIO(request["mask_image"]))
    black = np.asarray(mask.filter(ImageFilter.GaussianBlur(request.get("mask_blur", 0)))) == 0
    assert np.array_equal(pixels[black], sent[black])
    assert np.abs(pixels - sent)[np.asarray(mask) == 255].mean() > 5


def refined(folder: str | Path, request: dict[str, Any], masked: bool) -> np.ndarray:
    """The same with SDXL's refiner behind it: diffusers' inpainting pipeline once more if `masked`, else img2img."""
    generator = torch.Generator().manual_seed(request["seed"])
    image, mask = (Image.open(io.BytesIO(request[name])) for name in ("image", "mask_image"))
    common = {"prompt": request["prompt"], "num_inference_steps": request["steps"], "generator": generator}
    common["guidance_scale"] = request["cfg_scale"]
    size, under = {"width": request["width"], "height": request["height"]}, {"mask_image": mask}
    base = inpainting_pipeline(folder, request)
    latents = base(
        image=image, strength=request["strength"], denoising_end=0.8, output_type="latent", **common, **size, **under
    ).images
    if masked:
        refiner = inpainting_pipeline("sdxl-refiner", request)
        result = refiner(image=latents, denoising_start=0.8, **common, **size, **under).images[0]
    else:
        plain = oracle.pipeline("sdxl-refiner", StableDiffusionXLImg2ImgPipeline)
        refiner = oracle._scheduled(plain, request["sampler"], request["seed"])
        result = refiner(image=latents, denoising_start=0.8, **common).images[0]
    return np.asarray(base.image_processor.apply_overlay(mask, image, result))
