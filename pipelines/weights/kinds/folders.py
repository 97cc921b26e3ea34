"""A whole model in diffusers' layout: a folder with `model_index.json` and a folder for each part."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.weights.kinds.reports import Base, FileReport, Part, Prediction

PIPELINE = "model_index.json"
_PARTS: tuple[Part, ...] = ("unet", "text_encoder", "text_encoder_2", "vae")


def read_pipeline(folder: Path, read_part: Callable[[Path], FileReport]) -> FileReport:
    """What the model in a folder is.

    Args:
        folder: has a `model_index.json`.
        read_part: what the weights in one of its folders are.
    """
    unet = read_part(folder / "unet")
    if unet.kind != "unet":
        return FileReport(folder, "unknown", reason=f"a diffusers folder whose UNet cannot be used: {unet.reason}")
    parts = {part: read_part(folder / part) for part in _PARTS if (folder / part / "config.json").is_file()}
    for part, report in parts.items():
        if report.kind == "unknown":
            return FileReport(
                folder, "unknown", reason=f"a diffusers folder whose {part} cannot be used: {report.reason}"
            )
    schedule = _settings(folder / "scheduler" / "scheduler_config.json")
    prediction = schedule.get("prediction_type", "epsilon")
    return replace(
        unet,
        file=folder,
        kind="checkpoint",
        base=unet.base or _base_of_any_size(parts),
        layout="diffusers folder",
        parts=tuple(parts),
        prediction=_PREDICTIONS.get(str(schedule.get("_class_name")), prediction),
        zero_terminal_snr=schedule.get("rescale_betas_zero_snr") is True,
        # Where its own VAE makes latents of as many channels it needs nothing but text.
        notes=() if "vae" in parts and parts["vae"].channels == unet.channels else unet.notes,
    )


_PREDICTIONS: dict[str, Prediction] = {"EDMEulerScheduler": "edm", "EDMDPMSolverMultistepScheduler": "edm"}


def _base_of_any_size(parts: Collection[Part]) -> Base:
    """The base of a model that has no published size, by its parts: what it is built like."""
    if "text_encoder_2" in parts:
        return "sdxl" if "text_encoder" in parts else "sdxl-refiner"
    return "sd15"


def _settings(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
        return read if isinstance(read, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}
