"""Embeddings, upscalers, and common kinds of files that are not served."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipelines.weights.headers import Header, Tensor
from pipelines.weights.kinds.reports import Base, FileReport
from pipelines.weights.kinds.unets import Tensors

MAX_TOKENS = 75
"""Most vectors of an embedding: the room of a prompt of one chunk."""
_WIDTHS: Mapping[int, Base] = {768: "sd15", 1024: "sd2", 1280: "sdxl"}
_PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
"""The names that trainers give the vectors of SDXL's two text encoders."""

_UPSCALERS: Mapping[str, re.Pattern[str]] = {
    "ESRGAN, old keys": re.compile(r"^model\.1\.sub\.\d+\.RDB1\.conv1\."),
    "ESRGAN": re.compile(r"^(params(_ema)?\.)?body\.\d+\.rdb1\.conv1\."),
    "ESRGAN, trunk keys": re.compile(r"^(params(_ema)?\.)?RRDB_trunk\.\d+\.RDB1\.conv1\."),
    "compact ESRGAN": re.compile(r"^(params(_ema)?\.)?body\.1\.weight$"),  # slopes of a PReLU
    "a transformer": re.compile(r"^(params(_ema)?\.)?layers\.\d+\.(residual_group\.)?blocks\.\d+\."),
}
_FIRST = re.compile(r"^(params(_ema)?\.)?(conv_first|model\.0|body\.0)\.weight$")

UNSERVED_KINDS: Mapping[str, re.Pattern[str]] = {
    "weights quantised by bitsandbytes; use the plain ones": re.compile(r"\.(absmax|quant_map)$|quant_state\."),
    "weights in scaled float8; use the plain ones": re.compile(r"(^|\.)scaled_fp8$|\.scale_weight$"),
    "a Control-LoRA, a ControlNet as differences; use a whole ControlNet": re.compile(r"^lora_controlnet$"),
    "a ControlNet-LLLite; use a whole ControlNet": re.compile(r"^lllite_"),
    "an IP-Adapter": re.compile(r"^(image_proj|ip_adapter)\."),
    "a T2I-Adapter; use a ControlNet": re.compile(r"^(adapter\.)?body\.\d+\.(resnets|block1)\.|^adapter\."),
    "GLIGEN": re.compile(r"^position_net\."),
    "a motion module of AnimateDiff": re.compile(r"motion_modules\."),
    "a model of videos": re.compile(r"time_stack\.|temporal_transformer|\.time_mixer\."),
    "Flux": re.compile(r"(^|\.)(double_blocks|single_transformer_blocks)\."),
    "Stable Diffusion 3": re.compile(r"(^|\.)joint_blocks\."),
    "Stable Cascade": re.compile(r"(^|\.)(clip_txt_mapper|clip_txt_pooled_mapper|effnet_mapper)\."),
    "a diffusion transformer": re.compile(
        r"(^|\.)(x_embedder|adaln_single|t_embedder)\.|^(model\.diffusion_model\.)?patch_embedding\."
    ),
}
"""Kinds of files that are not served, each with the names of tensors that identify it whatever else a file contains."""
FALLBACK_UNSERVED_KINDS: Mapping[str, re.Pattern[str]] = {
    "a T5 or BERT text encoder": re.compile(r"SelfAttention\.q\.weight$|(^|\.)attention\.self\.query\."),
    "a CLIP model of pictures": re.compile(r"^(vision_model|visual)\."),
    "a tiny autoencoder (TAESD)": re.compile(r"^(taesd_)?(decoder|encoder)\.layers\.\d+\.|^\d+\.conv\.\d\.weight$"),
}
"""The same, tried only for files that match no kind that is served."""


def read_embedding(file: Path, header: Header) -> FileReport | None:
    """What a header says of a textual inversion, None if it is none."""
    tensors = {name: tensor for name, tensor in header.tensors.items() if _tokens(tensor)}
    if not tensors or len(header.tensors) > 4:
        return None
    for pair in _PAIRS:
        if set(pair) <= set(tensors):
            first, second = (tensors[name] for name in pair)
            told = "vectors for two text encoders, "
            if _tokens(first) != _tokens(second):
                told += f"{_tokens(first)} for the first and {_tokens(second)} for the second, which must be as many"
                return FileReport(file, "unknown", reason=told)
            fits = (first.shape[-1], second.shape[-1]) == (768, 1280)
            why = f"{told}{first.shape[-1]} and {second.shape[-1]} wide"
            return FileReport(file, "embedding", "sdxl" if fits else None, why, "pair", tokens=_tokens(first))
    if len(header.tensors) != 1:
        return None
    ((name, tensor),) = header.tensors.items()
    width, tokens = tensor.shape[-1], _tokens(tensor)
    if width not in _WIDTHS and name != "emb_params":
        return None
    base, why = _WIDTHS.get(width), f"{tokens} vectors for a text encoder {width} wide"
    if width == 1280:
        why += ": only the second of SDXL's two; the first has none in this file"
    return FileReport(file, "embedding", base, why, "A1111" if name == "emb_params" else "diffusers", tokens=tokens)


def _tokens(tensor: Tensor) -> int:
    """How many vectors a tensor is, 0 if it is no list of vectors for a prompt."""
    if len(tensor.shape) not in (1, 2) or not tensor.dtype.startswith(("F", "BF")) or tensor.shape[-1] < 8:
        return 0
    count = 1 if len(tensor.shape) == 1 else tensor.shape[0]
    return count if count <= MAX_TOKENS else 0


def read_upscaler(file: Path, header: Header) -> FileReport | None:
    """What a header says of a model that enlarges pictures, None if it is none."""
    names = header.tensors
    first = next((names[name] for name in names if _FIRST.search(name)), None)
    if first is None or len(first.shape) != 4 or first.shape[1] not in (1, 3, 4, 12, 48):
        return None
    if any(name.endswith(("running_mean", "num_batches_tracked")) for name in names):
        return None  # a classifier
    for layout, mark in _UPSCALERS.items():
        if any(mark.search(name) for name in names):
            return FileReport(
                file, "upscaler", None, f"layers of {layout} for pictures", layout, channels=first.shape[1]
            )
    return None


def name_unserved_kind(file: Path, tensors: Tensors, kinds: Mapping[str, re.Pattern[str]]) -> FileReport | None:
    """A report of a file of one of these kinds, which are not served; None if it is of none of them."""
    for name, mark in kinds.items():
        if key := next((key for key in tensors if mark.search(key)), None):
            return FileReport(file, "unknown", reason=f"{name}: it has the tensor {key[:100]}; it is not served")
    return None
