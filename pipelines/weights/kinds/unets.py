"""UNets and ControlNets by their tensors, in the original layout (CompVis, Stability) and in diffusers'.

Which base a UNet is follows from the width of the text it attends to, from that of its first layer, and from how many
transformer blocks stand in each place: nothing that training changes. Figures: the published configurations, which
`config/architectures` holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pipelines.weights.headers import Tensor
from pipelines.weights.kinds.reports import Base

Tensors = Mapping[str, Tensor]

WIDTHS = {768: "SD1.5", 1024: "SD2", 2048: "SDXL", 1280: "the SDXL refiner"}
"""Width of the text states that the attention of a published model reads."""


@dataclass(frozen=True)
class UNetShape:
    """What the tensors of a UNet say of its architecture.

    Attributes:
        prefix: stands before each of its tensors' names.
        layout: `original` or `diffusers`.
        first: shape of the weights of its first layer.
        context: width of the text states its attention reads, None without attention to text.
        added: whether it takes more than timestep and text: SDXL's pooled text and sizes.
        down: transformer blocks in each attention of the way down, in order.
        mid: transformer blocks in the middle.
    """

    prefix: str
    layout: str
    first: tuple[int, ...]
    context: int | None
    added: bool
    down: tuple[int, ...]
    mid: int

    @property
    def channels(self) -> int:
        """What it takes: the latents', and of a UNet for inpainting the mask's and the masked picture's."""
        return self.first[1]

    @property
    def width(self) -> int:
        """Channels that its first layer makes."""
        return self.first[0]

    @property
    def base(self) -> Base | None:
        """Which published architecture this is, None for any other."""
        return _BASES.get((self.context, self.width, self.added, self.down, self.mid))

    @property
    def why(self) -> str:
        """The reason for `base`, in words."""
        if self.context is None:
            return "its UNet does not attend to text"
        told = f"its attention reads text states {self.context} wide"
        if self.base is not None:
            return f"{told}, and its {len(self.down)} attentions on the way down are {_sizes(self.down)} blocks deep"
        if self.context not in WIDTHS:
            return f"{told}; SD1.5 reads 768, SD2 1024, SDXL 2048, its refiner 1280"
        return (
            f"{told}, as {WIDTHS[self.context]}'s does, but it is built another way (attentions {_sizes(self.down)} "
            f"blocks deep on the way down, {self.mid} in the middle), so no known configuration fits it"
        )


_BASES: dict[tuple[int | None, int, bool, tuple[int, ...], int], Base] = {
    (768, 320, False, (1,) * 6, 1): "sd15",
    (1024, 320, False, (1,) * 6, 1): "sd2",
    (2048, 320, True, (2, 2, 10, 10), 10): "sdxl",
    (2048, 320, True, (2, 2, 4, 4), 0): "ssd",
    (1280, 384, True, (4, 4, 4, 4), 4): "sdxl-refiner",
}


class _Names(NamedTuple):
    """How a layout names what tells an architecture."""

    layout: str
    first: str
    timestep: str
    added: str
    down: re.Pattern[str]
    mid: re.Pattern[str]


_LAYOUTS = (
    _Names(
        "original",
        "input_blocks.0.0.weight",
        "time_embed.0.weight",
        "label_emb.0.0.weight",
        re.compile(r"input_blocks\.(\d+)\.1\.transformer_blocks\.(\d+)\."),
        re.compile(r"middle_block\.(1)\.transformer_blocks\.(\d+)\."),
    ),
    _Names(
        "diffusers",
        "conv_in.weight",
        "time_embedding.linear_1.weight",
        "add_embedding.linear_1.weight",
        re.compile(r"down_blocks\.(\d+\.attentions\.\d+)\.transformer_blocks\.(\d+)\."),
        re.compile(r"mid_block\.attentions\.(0)\.transformer_blocks\.(\d+)\."),
    ),
)


def read_unet(tensors: Tensors, prefixes: tuple[str, ...]) -> UNetShape | None:
    """The UNet, or the half of one that a ControlNet is, under the first of these prefixes that has one."""
    for prefix in prefixes:
        for names in _LAYOUTS:
            first = tensors.get(prefix + names.first)
            if first is not None and len(first.shape) == 4 and prefix + names.timestep in tensors:
                return _shape(tensors, prefix, names, first)
    return None


def _shape(tensors: Tensors, prefix: str, names: _Names, first: Tensor) -> UNetShape:
    own = [name[len(prefix) :] for name in tensors if name.startswith(prefix)]
    to_keys = next((name for name in own if name.endswith(".attn2.to_k.weight")), None)
    read = () if to_keys is None else tensors[prefix + to_keys].shape
    return UNetShape(
        prefix=prefix,
        layout=names.layout,
        first=first.shape,
        context=read[-1] if len(read) == 2 else None,
        added=prefix + names.added in tensors,
        down=tuple(_depths(own, names.down).values()),
        mid=sum(_depths(own, names.mid).values()),
    )


def _depths(names: list[str], place: re.Pattern[str]) -> dict[tuple[int, ...], int]:
    """Transformer blocks at each place that a pattern finds, in order of the places."""
    found: dict[tuple[int, ...], set[str]] = {}
    for name in names:
        if match := place.match(name):
            where = tuple(int(number) for number in re.findall(r"\d+", match[1]))
            found.setdefault(where, set()).add(match[2])
    return {where: len(found[where]) for where in sorted(found)}


def _sizes(depths: tuple[int, ...]) -> str:
    return ", ".join(map(str, depths)) or "no"
