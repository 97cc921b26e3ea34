"""Annotators: a photo -> the control map a ControlNet was trained on, the maps' conventions included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from scipy.special import expit
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from config.catalog import AnnotatorSpec, Catalog
from pipelines.control.poses import PoseAnnotator
from pipelines.errors import InvalidValueError, WeightsError
from pipelines.weights.files import annotator_files

CANNY_LOW, CANNY_HIGH = 100, 200
"""Thresholds of the ControlNet authors' own annotator (lllyasviel/ControlNet v1.1, `canny`)."""
LINEART_SIGMA, LINEART_FLOOR = 6.0, 8.0
"""Blur radius in pixels and noise floor in grey levels of their weightless line annotator (`lineart_standard`)."""
DEXINED_MEAN = (103.5, 116.2, 123.6)
"""Mean of the blue, green and red levels DexiNed was trained with (opencv_zoo, `edge_detection_dexined`)."""
DEXINED_SIZE = 512
"""Side in pixels of the square DexiNed's ONNX file works on."""


class Annotators:
    """The annotators of a catalog on one device; weights are loaded when a photo first needs them."""

    def __init__(self, catalog: Catalog, device: str) -> None:
        specs = {spec.name: spec for spec in catalog.annotators}
        self._device = device
        self._known: dict[str, Callable[[Image.Image], Image.Image]] = {"canny": canny, "lineart": lineart}
        weighted = {"depth": self._depth, "softedge": self._softedge, "openpose": self._openpose}
        self._known |= {name: annotator for name, annotator in weighted.items() if name in specs}
        self._depth_model = functools.cache(lambda: self._load_depth(specs["depth"]))
        self._edge_model = functools.cache(lambda: self._load_edges(specs["softedge"]))
        self._poses = functools.cache(lambda: PoseAnnotator(specs["openpose"], device))

    def annotate(self, name: str, photo: Image.Image) -> Image.Image:
        """The control map of a photo, RGB, of the photo's size.

        Raises:
            InvalidValueError: there is no annotator of this name.
        """
        if name not in self._known:
            raise InvalidValueError(f"control '{name}': no annotator is configured for it", "controlnets")
        return self._known[name](photo.convert("RGB"))

    @torch.inference_mode()
    def _depth(self, photo: Image.Image) -> Image.Image:
        """Relative depth, near is white, stretched to the whole range."""
        processor, model = self._depth_model()
        inputs = processor(images=photo, return_tensors="pt").to(self._device)
        sizes = [(photo.height, photo.width)]
        (result,) = processor.post_process_depth_estimation(model(**inputs), target_sizes=sizes)
        depth = result["predicted_depth"]
        stretched = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=1e-12)
        return _white_on_black((stretched * 255).cpu().numpy())

    def _load_depth(self, spec: AnnotatorSpec) -> tuple[Any, Any]:
        (files,) = annotator_files(spec)
        folder = files.folder()
        model = AutoModelForDepthEstimation.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True), model.to(self._device).eval()

    def _softedge(self, photo: Image.Image) -> Image.Image:
        """Soft outlines, white on black: DexiNed (Soria et al. 2020) through OpenCV, the mean of its scales."""
        model = self._edge_model()
        size = (DEXINED_SIZE, DEXINED_SIZE)
        model.setInput(cv2.dnn.blobFromImage(_bgr(photo), 1.0, size, DEXINED_MEAN, swapRB=False))
        logits = [scale[0, 0] for scale in model.forward(model.getUnconnectedOutLayersNames())]
        edges = np.mean([_stretch(expit(scale)) for scale in logits], axis=0)
        return _white_on_black(cv2.resize(edges, photo.size))

    def _load_edges(self, spec: AnnotatorSpec) -> cv2.dnn.Net:
        assert spec.file is not None  # the catalog checked it
        (files,) = annotator_files(spec)
        found = next(files.folder().rglob(spec.file), None)
        if found is None:
            raise WeightsError(f"annotator softedge: {spec.source} has no {spec.file}; see annotators.yaml")
        return cv2.dnn.readNetFromONNX(str(found))

    def _openpose(self, photo: Image.Image) -> Image.Image:
        return self._poses().draw(photo)


def canny(photo: Image.Image) -> Image.Image:
    """White edges on black (Canny 1986), without weights."""
    return _white_on_black(cv2.Canny(np.asarray(photo), CANNY_LOW, CANNY_HIGH))


def lineart(photo: Image.Image) -> Image.Image:
    """Drawn lines, white on black, without weights: what is darker than its blurred surroundings."""
    levels = np.asarray(photo, np.float32)
    darker = (cv2.GaussianBlur(levels, (0, 0), LINEART_SIGMA) - levels).min(axis=2).clip(0, 255)
    lines = darker[darker > LINEART_FLOOR]
    typical = max(2 * LINEART_FLOOR, float(np.median(lines))) if lines.size else 2 * LINEART_FLOOR
    return _white_on_black((darker / typical * 127).clip(0, 255))


def _bgr(photo: Image.Image) -> np.ndarray:
    return cv2.cvtColor(np.asarray(photo), cv2.COLOR_RGB2BGR)


def _stretch(levels: np.ndarray) -> np.ndarray:
    """To the whole range 0..255."""
    return np.asarray((levels - levels.min()) / max(float(np.ptp(levels)), 1e-12) * 255)


def _white_on_black(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
