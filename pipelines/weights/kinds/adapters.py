"""Adapters by their tensors: LoRA, DoRA, LoHa, LoKr, OFT, of every trainer, and the base they were trained on.

The surest sign of the base is how wide the text states are that an adapted attention reads; what follows from which
layers exist at all (SDXL's outermost level has no attention, its inner ones are ten blocks deep) comes second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.weights.headers import Header, Tensor
from pipelines.weights.kinds.reports import Base, FileReport, Kind, Part
from pipelines.weights.kinds.unets import WIDTHS, Tensors

_MARKS: tuple[tuple[str, Kind, re.Pattern[str]], ...] = (
    ("LoHa", "loha", re.compile(r"\.hada_(w1_[ab]|w2_[ab]|t[12])$")),
    ("LoKr", "lokr", re.compile(r"\.lokr_(w1|w2|w1_[ab]|w2_[ab]|t2)$")),
    ("OFT", "oft", re.compile(r"\.(oft_blocks|oft_diag|oft_R(\..+)?|boft_[RS](\..+)?)$")),
    ("DoRA", "dora", re.compile(r"\.(dora_scale|lora_magnitude_vector(\..+)?)$")),
    (
        "LoRA",
        "lora",
        re.compile(
            r"(\.lora_(down|up|mid|[AB])(\.[^.]+)?\.weight|[._]lora\.(down|up)\.weight|\.lora_linear_layer\.(down|up)\.weight)$"
        ),
    ),
)
"""Name, kind, and how the tensors of each are called; a file is of the first kind of which it has a tensor."""
_OTHERS: Mapping[str, re.Pattern[str]] = {
    "a LyCORIS IA3": re.compile(r"\.on_input$"),
    "a PEFT IA3": re.compile(r"\.ia3_l"),
    "a GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "a VeRA": re.compile(r"vera_lambda"),
    "a full-difference adapter": re.compile(r"\.(diff|diff_b)$"),
    "an adapter of norms": re.compile(r"\.[wb]_norm$"),
}
_BESIDE = re.compile(r"\.(alpha|diff|diff_b|w_norm|b_norm|scale|rescale)$|^bundle_emb|^lora_embedding_|_embedding_lora")
"""Belongs to layers of any kind, or travels beside them."""

_PARTS: tuple[tuple[re.Pattern[str], Part], ...] = (
    (re.compile(r"^(lora_te2_|lycoris_te2_|text_encoder_2\.|te2[._])"), "text_encoder_2"),
    (re.compile(r"^(lora_te1_|lora_te_|lycoris_te1?_|text_encoder\.|te1?[._]|text_model\.)"), "text_encoder"),
)
_UNET = re.compile(
    r"^(lora_unet_|lycoris_|oft_unet_|unet\.|diffusion_model\.|model\.diffusion_model\.)?"
    r"(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks|conv_in|conv_out|time_embed|add_embedding"
    r"|label_emb|out_[02]|mid\.)"
)
_WRAPPER = re.compile(r"^(base_model\.model\.|(?<=unet\.)base_model\.model\.)")

_ONLY_SDXL = re.compile(
    r"(down_blocks_1|up_blocks_1|down_blocks_2|up_blocks_0|input_blocks_[4578]|output_blocks_[0-5])"
    r"_(attentions_\d|1)_transformer_blocks_[1-9]|mid_block_attentions_0_transformer_blocks_[1-9]"
    r"|middle_block_1_transformer_blocks_[1-9]|add_embedding|label_emb"
)
_ONLY_SD = re.compile(r"down_blocks_0_attentions|up_blocks_3_attentions|(input_blocks_[12]|output_blocks_(9|10|11))_1_")
_NOT_IN_SSD = re.compile(
    r"mid_block_attentions|middle_block_1|(down_blocks_2_attentions_\d|input_blocks_[78]_1)_transformer_blocks_[4-9]"
    r"|(up_blocks_0_attentions_[01]|output_blocks_[01]_1)_transformer_blocks_[4-9]"
    r"|(up_blocks_1_attentions_[12]|output_blocks_[45]_1)_transformer_blocks_1"
)
_DEEPEST_OF_SSD = re.compile(r"(up_blocks_0_attentions_2|output_blocks_2_1)_transformer_blocks_9")


@dataclass
class _Layers:
    """The adapted modules of a file, with `_` for every `.` in their names, and what their factors tell."""

    modules: set[str] = field(default_factory=set)
    parts: set[Part] = field(default_factory=set)
    contexts: set[int] = field(default_factory=set)
    text_widths: dict[Part, int] = field(default_factory=dict)
    rank: int = 0


def read_adapter(file: Path, header: Header) -> FileReport | None:
    """What a header says of an adapter, None if it is none."""
    tensors = header.tensors
    found = {kind: name for name, kind, mark in _MARKS if any(mark.search(key) for key in tensors)}
    if not found:
        return _other(file, tensors)
    kind = next(iter(found))
    layers = _layers(tensors)
    if not layers.parts:
        first = next(key for key in tensors if any(mark.search(key) for _, _, mark in _MARKS))
        return FileReport(
            file, "unknown", reason=f"a {found[kind]} for another family of models: it has the layer {first[:100]}"
        )
    base, why = _base(layers)
    notes = [f"some layers are {name}" for name in list(found.values())[1:] if (kind, name) != ("dora", "LoRA")]
    if any(key.startswith("bundle_emb") for key in tensors):
        notes.append("brings an embedding (OneTrainer), which is left out")
    if any(re.search(r"\.(diff|diff_b|w_norm|b_norm)$", key) for key in tensors):
        notes.append("has whole differences of weights or norms beside its factors")
    if (told := _trained_on(header)) and base and told != base:
        notes.append(f"its metadata says {told}, which the shapes contradict")
    return FileReport(
        file,
        kind,
        base,
        f"{found[kind]} layers; {why}",
        layout=_layout(tensors),
        parts=tuple(part for part in ("unet", "text_encoder", "text_encoder_2") if part in layers.parts),
        context=next(iter(layers.contexts)) if len(layers.contexts) == 1 else None,
        rank=layers.rank or None,
        notes=tuple(notes),
    )


def _other(file: Path, tensors: Tensors) -> FileReport | None:
    for name, mark in _OTHERS.items():
        if key := next((key for key in tensors if mark.search(key)), None):
            reason = f"{name} (it has the tensor {key[:100]}), which is not served; train or convert it to a LoRA"
            return FileReport(file, "unknown", reason=reason)
    return None


def _layers(tensors: Tensors) -> _Layers:
    layers = _Layers()
    widths: dict[str, _Factors] = {}
    for key, tensor in tensors.items():
        match = next((match for _, _, mark in _MARKS if (match := mark.search(key))), None)
        if match is None:
            continue
        module = _WRAPPER.sub("", key[: match.start()]).replace(".processor.", ".").replace("base_model.model.", "")
        part = _part_of(module)
        if part is None:
            continue
        layers.parts.add(part)
        name = module.replace(".", "_")
        layers.modules.add(name)
        widths.setdefault(name, _Factors(part)).add(match[0], tensor)
    for name, factors in widths.items():
        layers.rank = max(layers.rank, factors.rank)
        width = factors.width
        if width is None:
            continue
        if factors.part == "unet" and re.search(r"attn2_to_[kv](_lora)?$", name):
            layers.contexts.add(width)
        elif factors.part != "unet" and re.search(r"(q_proj|k_proj|v_proj|to_[qkv]|fc1)(_lora)?$", name):
            layers.text_widths[factors.part] = width
    return layers


@dataclass
class _Factors:
    """What the factors of one layer tell: how wide its input is, and its rank."""

    part: Part
    widths: dict[str, int] = field(default_factory=dict)
    rank: int = 0

    def add(self, leaf: str, tensor: Tensor) -> None:
        shape = tensor.shape
        if len(shape) < 2:
            return
        if re.search(r"lora_down|lora_A|lora\.down|lora_linear_layer\.down", leaf):
            self.widths["lora"], self.rank = shape[1], max(self.rank, shape[0])
        elif "hada_w1_b" in leaf:
            self.widths["hada"], self.rank = shape[1], max(self.rank, shape[0])
        elif "oft_R" in leaf:  # blocks of n x n rotations, each as the numbers above its diagonal
            self.widths["oft"] = shape[0] * round((1 + math.sqrt(1 + 8 * shape[1])) / 2)
        elif match := re.search(r"lokr_(w[12])(_b)?$", leaf):
            self.widths[match[1]] = shape[1]
            self.rank = max(self.rank, shape[0]) if match[2] else self.rank

    @property
    def width(self) -> int | None:
        """Width of the layer's input: of a LoKr the product of its two sides'."""
        if "w1" in self.widths and "w2" in self.widths:
            return self.widths["w1"] * self.widths["w2"]
        return next((self.widths[kind] for kind in ("lora", "hada", "oft") if kind in self.widths), None)


def _part_of(module: str) -> Part | None:
    for pattern, part in _PARTS:
        if pattern.search(module):
            return part
    return "unet" if _UNET.search(module) and "motion_modules" not in module else None


def _base(layers: _Layers) -> tuple[Base | None, str]:
    """The base and what tells it."""
    if len(layers.contexts) > 1:
        return None, f"its attentions read text states of different widths: {sorted(layers.contexts)}"
    for context in layers.contexts:
        told = f"its attention reads text states {context} wide"
        if context == 2048:
            return _sdxl_or_ssd(layers.modules), told
        if context in WIDTHS:
            return {768: "sd15", 1024: "sd2", 1280: "sdxl-refiner"}[context], told  # type: ignore[return-value]
    deep = next((name for name in sorted(layers.modules) if _ONLY_SDXL.search(name)), None)
    if "text_encoder_2" in layers.parts or any("te1_" in name for name in layers.modules):
        return _sdxl_or_ssd(layers.modules), "it changes two text encoders"
    if deep is not None:
        return _sdxl_or_ssd(layers.modules), f"SDXL alone has the layer {deep}"
    width = layers.text_widths.get("text_encoder")
    shallow = next((name for name in sorted(layers.modules) if _ONLY_SD.search(name)), None)
    if width == 1024 or any(re.search(r"layers_(1[2-9]|2\d)_", name) and "te" in name for name in layers.modules):
        return "sd2", "its text encoder is SD2's"
    if width == 768 and ("unet" not in layers.parts or shallow is not None):
        return "sd15", "its text encoder is 768 wide"
    if layers.contexts:
        return None, f"its attention reads text states {next(iter(layers.contexts))} wide, as no published model's does"
    if shallow is not None:
        return None, f"SD1.5 and SD2 both have the layer {shallow}, and nothing in the file tells which it was"
    return None, "no layer in it differs between SD1.5, SD2 and SDXL"


def _sdxl_or_ssd(modules: Iterable[str]) -> Base:
    """SSD is SDXL with blocks taken out: a file that reaches its deepest block and has none of those is SSD's."""
    names = list(modules)
    if any(_NOT_IN_SSD.search(name) for name in names) or not any(_DEEPEST_OF_SSD.search(name) for name in names):
        return "sdxl"
    return "ssd"


def _layout(tensors: Tensors) -> str:
    for layout, mark in (
        ("kohya", re.compile(r"^(lora_(unet|te\d?)_|lycoris_|oft_unet_).*\.(lora_|alpha|hada_|lokr_|oft_|dora_)")),
        ("peft", re.compile(r"\.(lora_[AB]|lora_magnitude_vector|hada_|lokr_|b?oft_)")),
        ("attention processors", re.compile(r"\.processor\.")),
    ):
        if any(mark.search(key) for key in tensors):
            return layout
    return "diffusers"


def _trained_on(header: Header) -> Base | None:
    """The base that metadata names: kohya's `ss_base_model_version`, or the model specification's architecture."""
    said = " ".join(header.metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture")).lower()
    for pattern, base in (
        ("sdxl|xl-v1|xl_base", "sdxl"),
        (r"sd_v1|diffusion-v1", "sd15"),
        (r"sd_v2|diffusion-v2", "sd2"),
    ):
        if re.search(pattern, said):
            return base  # type: ignore[return-value]
    return None
