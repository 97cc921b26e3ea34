"""Whole models by their tensors: checkpoints, UNets, VAEs, text encoders, ControlNets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.weights.headers import Header
from pipelines.weights.kinds.reports import Base, FileReport, Part, Prediction
from pipelines.weights.kinds.unets import Tensors, UNetShape, read_unet

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
CONTROLNET_PREFIXES = ("control_model.", "controlnet.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
TEXT_ENCODERS: Mapping[str, tuple[Part, Base | None]] = {
    "cond_stage_model.transformer.": ("text_encoder", "sd15"),
    "cond_stage_model.model.": ("text_encoder", "sd2"),
    "conditioner.embedders.0.transformer.": ("text_encoder", "sdxl"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "sdxl"),
    "conditioner.embedders.0.model.": ("text_encoder_2", "sdxl-refiner"),
}
"""How checkpoints name the token embedding's encoder, and whose checkpoints do."""
_CLIP = "text_model.embeddings.token_embedding.weight"
_OPEN_CLIP = "token_embedding.weight"
_ENCODER_WIDTHS: Mapping[int, tuple[Base, str]] = {
    768: ("sd15", "CLIP ViT-L/14: SD1.5's, and the first of SDXL's two"),
    1024: ("sd2", "OpenCLIP ViT-H/14: SD2's"),
    1280: ("sdxl", "OpenCLIP ViT-bigG/14: the second of SDXL's two, and its refiner's"),
}
LATENT_CHANNELS = 4
INPAINTING_CHANNELS = 9
"""Channels of the noisy latents, of the mask and of the masked picture's latents together."""


def read_model(file: Path, header: Header) -> FileReport | None:
    """What a header says of a whole model, None if it is of no such kind."""
    if report := _controlnet(file, header) or _unet_or_checkpoint(file, header):
        return report
    return _vae(file, header) or _text_encoder(file, header)


def _unet_or_checkpoint(file: Path, header: Header) -> FileReport | None:
    tensors = header.tensors
    unet = read_unet(tensors, UNET_PREFIXES)
    if unet is None:
        return None
    encoders = text_encoders_of(tensors)
    vae = _vae_prefix(tensors, VAE_PREFIXES[:2])
    base, why, notes = unet.base, unet.why, list(_unet_notes(unet, header))
    told: dict[str, Any] = {
        "layout": unet.layout,
        "channels": unet.channels,
        "context": unet.context,
        "prediction": _prediction(header, unet),
        "zero_terminal_snr": "ztsnr" in tensors,
    }
    if not encoders and vae is None:
        return FileReport(file, "unet", base, why, parts=("unet",), notes=tuple(notes), **told)
    parts: list[Part] = ["unet", *(part for part, _ in encoders)]
    if vae is None:
        notes.append("it has no VAE of its own")
    else:
        parts.append("vae")
    if not encoders:
        notes.append("it has no text encoder of its own")
    elif base is None and unet.context not in (768, 1024, 1280, 2048):
        # No published size, as of a small model: then the names of its text encoders are all there is.
        base = encoders[-1][1]
        why = f"{why}, but its text encoders are named as {base}'s"
    return FileReport(file, "checkpoint", base, why, parts=tuple(parts), notes=tuple(notes), **told)


def text_encoders_of(tensors: Tensors) -> list[tuple[Part, Base | None]]:
    """The text encoders of a checkpoint in the original layout, in order, each with the base that names it so."""
    found = []
    for prefix, encoder in TEXT_ENCODERS.items():
        bare = _CLIP.removeprefix("text_model.")  # some merging tools drop a level of the names
        if any(prefix + name in tensors for name in (_CLIP, bare, _OPEN_CLIP)):
            found.append(encoder)
    return found


def _prediction(header: Header, unet: UNetShape) -> Prediction | None:
    """What marks and metadata say; where neither does, epsilon, but for SD2, which comes in both kinds."""
    if "edm_mean" in header.tensors or "edm_vpred.sigma_max" in header.tensors:
        return "edm"
    said = header.metadata.get("modelspec.prediction_type", "").lower()
    sized = header.metadata.get("modelspec.architecture", "").lower()
    if "v_pred" in header.tensors or said.startswith("v") or sized.endswith("-768-v"):
        return "v_prediction"
    open_question = unet.base == "sd2" and unet.channels == LATENT_CHANNELS and said != "epsilon"
    return None if open_question else "epsilon"


def _unet_notes(unet: UNetShape, header: Header) -> Iterable[str]:
    if unet.channels == INPAINTING_CHANNELS:
        yield "an inpainting UNet of 9 channels: it reads a mask; without one, all of the picture is masked"
    elif unet.channels == 2 * LATENT_CHANNELS:
        yield "a UNet of 8 channels, as InstructPix2Pix has: it needs a picture to edit"
    elif unet.channels != LATENT_CHANNELS:
        yield f"a UNet of {unet.channels} channels: it needs more than text"
    if any(name.startswith("model_ema.diffusion_model") for name in header.tensors):
        yield "a trainer's average (EMA) lies beside the weights and is left aside"
    if any(name.endswith("time_embedding.cond_proj.weight") for name in header.tensors):
        yield "distilled to take the guidance scale as an input (LCM)"
    if "edm_vpred.sigma_max" in header.tensors:
        yield "predicts v on a continuous EDM schedule (CosXL)"


def _controlnet(file: Path, header: Header) -> FileReport | None:
    tensors = header.tensors
    for prefix in CONTROLNET_PREFIXES:
        hint = f"{prefix}input_hint_block.0.weight" in tensors or f"{prefix}zero_convs.0.0.weight" in tensors
        if not hint and f"{prefix}controlnet_down_blocks.0.weight" not in tensors:
            continue
        net = read_unet(tensors, (prefix,))
        if net is None:
            continue
        types = tensors.get(f"{prefix}task_embedding")
        types = types if types is not None and types.shape else None
        base = net.base
        if base is None and net.added and net.context in (None, 2048) and net.width == 320:
            base = "sdxl"  # the small and middle-sized ones have fewer blocks than the UNet they steer
        notes = [] if net.channels == LATENT_CHANNELS else [f"it takes latents of {net.channels} channels"]
        if types is not None:
            notes.append(f"one set of weights for {types.shape[0]} kinds of control map")
        if any(name.startswith("model.diffusion_model.") for name in tensors):
            notes.append("the UNet it was trained with lies beside it and is left aside")
        why = "SDXL's added sizes and no attention" if net.context is None and base else net.why.replace("UNet", "copy")
        return FileReport(
            file,
            "controlnet",
            base,
            f"a ControlNet's layers for its map; {why}",
            layout=net.layout,
            channels=net.channels,
            context=net.context,
            control_types=None if types is None else types.shape[0],
            notes=tuple(notes),
        )
    return None


def _vae_prefix(tensors: Tensors, prefixes: tuple[str, ...]) -> str | None:
    """Before the names of an AutoencoderKL's tensors."""
    for prefix in prefixes:
        if all(f"{prefix}{side}.conv_in.weight" in tensors for side in ("encoder", "decoder")):
            return prefix
    return None


def _vae(file: Path, header: Header) -> FileReport | None:
    tensors = header.tensors
    prefix = _vae_prefix(tensors, VAE_PREFIXES)
    if prefix is None or f"{prefix}decoder.conv_out.weight" not in tensors:
        return None
    into = tensors[f"{prefix}decoder.conv_in.weight"].shape
    if len(into) != 4:
        return FileReport(file, "unknown", reason="an autoencoder of videos, which no model served here decodes with")
    foreign = into[1] != LATENT_CHANNELS
    return FileReport(
        file,
        "vae",
        None,
        f"an autoencoder for latents of {into[1]} channels; SD's and SDXL's have the same shapes, "
        "so its tensors do not tell which of the two it is",
        layout="diffusers" if any(".up_blocks." in name for name in tensors) else "original",
        parts=("vae",),
        channels=into[1],
        notes=(f"latents of {into[1]} channels: no published SD or SDXL has such",) if foreign else (),
    )


def _text_encoder(file: Path, header: Header) -> FileReport | None:
    tensors = header.tensors
    for prefix in ("", "text_encoder.", "transformer.", "model.", *TEXT_ENCODERS):
        # transformers 5 saves CLIPTextModel without the level `text_model`.
        for name, layout in ((_CLIP, "diffusers"), ("embeddings.token_embedding.weight", "diffusers")):
            if prefix + name in tensors:
                return _encoder(file, header, prefix + name, layout)
        if prefix + _OPEN_CLIP in tensors and f"{prefix}positional_embedding" in tensors:
            return _encoder(file, header, prefix + _OPEN_CLIP, "original")
    return None


def _encoder(file: Path, header: Header, embedding: str, layout: str) -> FileReport:
    width = (0, *header.tensors[embedding].shape)[-1]
    base, why = _ENCODER_WIDTHS.get(width, (None, f"a CLIP text encoder {width} wide; published ones are 768 to 1280"))
    whole = any(name.startswith(("vision_model.", "visual.")) for name in header.tensors)
    part: Part = "text_encoder_2" if width == 1280 else "text_encoder"
    return FileReport(
        file,
        "text_encoder",
        base,
        why,
        layout=layout,
        parts=(part,),
        context=width,
        notes=("a whole CLIP: its half for pictures is left aside",) if whole else (),
    )
