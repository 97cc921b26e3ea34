"""Single checkpoints: what of a file belongs to one component, under the names that diffusers' converters know.

A checkpoint holds several models (WTS-7), and often a trainer's average of the UNet (`model_ema.`), which is left
aside as diffusers does. Only what a component needs is read, so that its replica never holds the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import safe_open

from pipelines.weights.headers import Header, read_header
from pipelines.weights.kinds.models import CONTROLNET_PREFIXES, TEXT_ENCODERS, UNET_PREFIXES, VAE_PREFIXES
from pipelines.weights.kinds.unets import read_unet

if TYPE_CHECKING:
    import torch

Rename = Callable[[str], str | None]
"""The name a tensor gets, None for one that is left aside."""

_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""How diffusers before 0.18 called the layers of a VAE's attention."""
_V_NORM = (
    "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
)
_V_SPREAD = 0.09
"""A tensor of SD2 whose values spread wider in models that predict v, in either layout's name."""


def read_state(path: Path, kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of one component, all of floating point in `dtype`.

    Args:
        path: a checkpoint, or a file of one model alone, in the original layout or diffusers'.
        kind: `unet`, `vae`, `controlnet` or `text_encoder` (all of them).
        dtype: number format.
    """
    rename = renaming(read_header(path), kind)
    state = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118, a file is no mapping
            if (name := rename(key)) is not None:
                tensor = file.get_tensor(key)
                state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return state


def renaming(header: Header, kind: str) -> Rename:
    """Which tensors of a file belong to a component of this kind, and under which names the converters know them."""
    if kind == "vae":
        return _vae_names(header)
    if kind == "text_encoder":
        return _text_names(header)
    prefixes = UNET_PREFIXES if kind == "unet" else CONTROLNET_PREFIXES
    net = read_unet(header.tensors, prefixes)
    if net is None:
        return _behind(prefixes[0], prefixes[0])  # nothing, or half of one, for the loader to name what is missing
    return _behind(net.prefix, prefixes[0] if net.layout == "original" else "")


def _behind(prefix: str, instead: str) -> Rename:
    return lambda key: instead + key.removeprefix(prefix) if key.startswith(prefix) else None


def _vae_names(header: Header) -> Rename:
    prefix = next((p for p in VAE_PREFIXES if any(key.startswith(f"{p}decoder.") for key in header.tensors)), "")
    if not any(key.startswith(f"{prefix}decoder.mid_block.") for key in header.tensors):
        return _behind(prefix, VAE_PREFIXES[0])

    def rename(key: str) -> str | None:
        if not key.startswith(prefix):
            return None
        for old, new in _OLD_ATTENTION.items():
            key = key.replace(old, new)
        return key.removeprefix(prefix)

    return rename


def _text_names(header: Header) -> Rename:
    prefixes = [prefix for prefix in TEXT_ENCODERS if any(key.startswith(prefix) for key in header.tensors)]

    def rename(key: str) -> str | None:
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None if prefixes else "")
        if prefix is None or key.endswith("position_ids"):  # counted, not trained; half precision has spoilt some
            return None
        bare = key.removeprefix(prefix)
        # Some merging tools drop a level of the names that the converters look for.
        if prefix.endswith(".transformer.") and bare.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
            bare = f"text_model.{bare}"
        return prefix + bare

    return rename


def channels_taken(path: Path) -> dict[str, Any]:
    """How many channels the UNet of a checkpoint takes, as its settings: a UNet for inpainting has more."""
    net = read_unet(read_header(path).tensors, UNET_PREFIXES)
    return {} if net is None else {"in_channels": net.channels}


def schedule_marks(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its schedule by tensors whose names alone mean something, as scheduler settings.

    `v_pred` and `ztsnr` (zero terminal signal-to-noise ratio), as trainers write them for A1111 and ComfyUI.
    """
    tensors = read_header(path).tensors
    marked: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in tensors else {}
    return marked | ({"rescale_betas_zero_snr": True} if "ztsnr" in tensors else {})


def sd2_prediction(path: Path) -> Literal["epsilon", "v_prediction"]:
    """What an SD2 checkpoint without a mark predicts, by ComfyUI's rule (`supported_models.py`)."""
    key = next((name for name in read_header(path).tensors if name.endswith(_V_NORM)), None)
    if key is None:
        return "epsilon"
    with safe_open(path, "pt") as file:
        return "v_prediction" if file.get_tensor(key).float().std(unbiased=False) > _V_SPREAD else "epsilon"


def latent_statistics(path: Path) -> dict[str, Any]:
    """Mean and spread of the latents where a checkpoint holds them, as Playground 2.5's does, as a VAE's settings."""
    if "edm_mean" not in read_header(path).tensors:
        return {}
    with safe_open(path, "pt") as file:
        mean, spread = (file.get_tensor(name).float().flatten().tolist() for name in ("edm_mean", "edm_std"))
    return {"latents_mean": mean, "latents_std": spread, "scaling_factor": 0.5}
