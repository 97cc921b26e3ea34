"""The configuration of a single checkpoint, which brings none: that of the published model it is built like."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config.components import ARCHITECTURES, Family
from pipelines.errors import WeightsError
from pipelines.weights.checkpoints import latent_statistics, sd2_prediction
from pipelines.weights.inspection import inspect_file
from pipelines.weights.kinds.reports import Base

_BASES: Mapping[Family, Base] = {"sd": "sd15", "sdxl": "sdxl"}
"""Whose VAE a file with a VAE alone is, whose tensors do not tell: the family's that it is to serve."""
_LIKE: Mapping[Base, Base] = {"ssd": "sdxl", "sdxl-refiner": "sdxl"}
"""Which of two published models the other takes from what it has none of its own."""
_COSXL = {
    "_class_name": "EDMEulerScheduler",
    "sigma_min": 0.002,
    "sigma_max": 120.0,
    "sigma_data": 1.0,
    "prediction_type": "v_prediction",
    "sigma_schedule": "exponential",
}
"""diffusers' documentation of CosXL."""
_PLAYGROUND = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "prediction_type": "epsilon",
}
"""As playgroundai/playground-v2.5-1024px-aesthetic, whose checkpoint holds the statistics of its latents."""


@functools.cache
def published(base: Base) -> Mapping[str, Mapping[str, Any]]:
    """Settings of each part of a published model: `unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler`, ..."""
    own = {path.parent.name: json.loads(path.read_text()) for path in (ARCHITECTURES / base).glob("*/*config.json")}
    return {**published(_LIKE[base]), **own} if base in _LIKE else own


def settings(what: str, checkpoint: Path, part: str, family: Family) -> dict[str, Any]:
    """What `config.json` of one part of a checkpoint would say; of `scheduler`, its `scheduler_config.json`.

    Args:
        what: the component, for messages.
        checkpoint: a single file, of one model or of several.
        part: `unet`, `vae`, `text_encoder`, `text_encoder_2`, `tokenizer`, `tokenizer_2`, `scheduler` or `controlnet`.
        family: that the component is to serve.

    Raises:
        WeightsError: the file cannot be used, does not hold the part, or is built like no published model.
    """
    report = inspect_file(checkpoint)
    where = f"{what}, file {checkpoint.name}"
    if report.kind == "unknown":
        raise WeightsError(f"{where}: {report.reason}")
    model = "unet" if part == "scheduler" else part.replace("tokenizer", "text_encoder")
    if model not in (report.kind, *report.parts):
        raise WeightsError(f"{where}: this is a {report.kind}, in which there is no {model}")
    base = _BASES[family] if report.kind == "vae" else report.base
    union = report.control_types is not None
    name = "controlnet_union" if union else part
    if base is None or name not in published(base):
        raise WeightsError(
            f"{where}: {report.reason}; give its configuration beside the checkpoint: "
            "a diffusers folder, whose weights are not read"
        )
    config = dict(published(base)[name])
    if part == "unet":
        config["in_channels"] = report.channels
        if base == "sd2":
            config["upcast_attention"] = True  # 2.1 overflows without it; diffusers reads every SD2 file as 2.1
    if part == "vae":
        config |= latent_statistics(checkpoint)
    if part == "scheduler":
        if report.prediction == "edm":
            return dict(_COSXL if any("CosXL" in note for note in report.notes) else _PLAYGROUND)
        config["prediction_type"] = report.prediction or sd2_prediction(checkpoint)
    if union:
        config["num_control_type"] = report.control_types
    return config
