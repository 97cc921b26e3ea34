"""Annotators: a photo -> the control map a ControlNet was trained on, the maps' conventions included."""

from __future__ import annotations

import functools
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from config.catalog import Catalog
from pipelines.errors import InvalidValueError
from pipelines.sources import fetch

CANNY_LOW, CANNY_HIGH = 100, 200
"""Thresholds of the ControlNet authors' own annotator (lllyasviel/ControlNet v1.1, `canny`)."""


class Annotators:
    """The annotators of a catalog on one device; weights are loaded when a photo first needs them."""

    def __init__(self, catalog: Catalog, device: str) -> None:
        self._specs = {spec.name: spec for spec in catalog.annotators}
        self._device = device
        self._depth_model = functools.cache(self._load_depth)

    def annotate(self, name: str, photo: Image.Image) -> Image.Image:
        """The control map of a photo, RGB, of the photo's size.

        Raises:
            InvalidValueError: there is no annotator of this name.
        """
        match name:
            case "canny":
                return self._canny(photo)
            case "depth" if name in self._specs:
                return self._depth(photo)
        raise InvalidValueError(f"controlnet_name '{name}': no annotator is configured for it", "controlnet_name")

    def _canny(self, photo: Image.Image) -> Image.Image:
        """White edges on black (Canny 1986), without weights."""
        edges = cv2.Canny(np.asarray(photo.convert("RGB")), CANNY_LOW, CANNY_HIGH)
        return Image.fromarray(edges).convert("RGB")

    @torch.inference_mode()
    def _depth(self, photo: Image.Image) -> Image.Image:
        """Relative depth, near is white, stretched to the whole range."""
        processor, model = self._depth_model()
        inputs = processor(images=photo.convert("RGB"), return_tensors="pt").to(self._device)
        sizes = [(photo.height, photo.width)]
        (result,) = processor.post_process_depth_estimation(model(**inputs), target_sizes=sizes)
        depth = result["predicted_depth"]
        stretched = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=1e-12)
        return Image.fromarray((stretched * 255).cpu().numpy().astype(np.uint8)).convert("RGB")

    def _load_depth(self) -> tuple[Any, Any]:
        folder = fetch("annotator depth", self._specs["depth"].source, ["*.json", "*.safetensors"])
        model = AutoModelForDepthEstimation.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True), model.to(self._device).eval()
