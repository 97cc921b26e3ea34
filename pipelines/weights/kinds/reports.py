"""The report of a file of weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal[
    "checkpoint",
    "unet",
    "vae",
    "text_encoder",
    "lora",
    "dora",
    "loha",
    "lokr",
    "oft",
    "controlnet",
    "embedding",
    "upscaler",
    "unknown",
]
Base = Literal["sd15", "sd2", "sdxl", "sdxl-refiner", "ssd"]
Prediction = Literal["epsilon", "v_prediction", "edm"]
Part = Literal["unet", "vae", "text_encoder", "text_encoder_2"]


@dataclass(frozen=True)
class FileReport:
    """What a file is, from the names and shapes of its tensors.

    Attributes:
        file: as it was asked for. Of weights in several files their index; of a model in diffusers' layout its folder.
        kind: `unknown` is whatever cannot be used, for the reason given.
        base: the architecture it is, or was made for; None where its tensors do not tell.
        reason: what tells kind and base; of an unknown file why it is not used, and the way out where there is one.
        layout: whose names its tensors have: `original`, `diffusers`, `kohya`, `peft`, `attention processors`, ...
        parts: which models a checkpoint holds, or an adapter changes.
        channels: channels that a UNet's or ControlNet's latents have, a VAE's make: 4, or 9 of a UNet for inpainting.
        context: width of the hidden states of text that its attention reads, None without such attention.
        prediction: what a UNet was trained to predict, None where nothing tells (SD2 has both).
        zero_terminal_snr: marked as trained on a schedule that ends in noise alone.
        control_types: of a union ControlNet: how many.
        rank: of an adapter: its largest.
        tokens: of an embedding: how many vectors.
        dtype: number format of most of its bytes, as safetensors spells it.
        notes: what a reader should know besides, such as an average that is left aside.
    """

    file: Path
    kind: Kind
    base: Base | None = None
    reason: str = ""
    layout: str | None = None
    parts: tuple[Part, ...] = ()
    channels: int | None = None
    context: int | None = None
    prediction: Prediction | None = None
    zero_terminal_snr: bool = False
    control_types: int | None = None
    rank: int | None = None
    tokens: int | None = None
    dtype: str | None = None
    notes: tuple[str, ...] = ()
