"""A layer's name in a file -> the module of a loaded model, however the file counts blocks and joins names (ADP-7)."""

from __future__ import annotations

import re
from collections.abc import Iterable

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Modules of a residual block in diffusers and in the original layout."""
_SINGLE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.(.+))?$")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)$")


class ModuleNames:
    """The modules of one model, by every name that files have for them."""

    def __init__(self, names: Iterable[str]) -> None:
        """Index the modules that take adapters, by their names in diffusers or transformers."""
        own = list(names)
        self._found: dict[str, str] = {}
        for name in own:
            for spelt in (name, *_of_text(name)):
                self._index(spelt, name)
        for name, original in original_names(own).items():
            self._index(original, name)

    def find(self, layer: str) -> str | None:
        """The module that a file calls `layer`, None if there is none."""
        return self._found.get(layer) or self._found.get(f"{layer}.0")  # `to_out` is a list of one layer

    def _index(self, spelt: str, name: str) -> None:
        self._found.setdefault(spelt, name)
        self._found.setdefault(spelt.replace(".", "_"), name)


def _of_text(name: str) -> tuple[str, ...]:
    """CLIPTextModel lost its `text_model.` level in transformers 5, CLIPTextModelWithProjection kept it."""
    return (f"text_model.{name}", name.removeprefix("text_model."))


def original_names(names: Iterable[str]) -> dict[str, str]:
    """Diffusers' names of a UNet's modules -> those of the original layout, which kohya's SDXL files and ComfyUI keep.

    There the blocks of each way are counted through: `input_blocks.4.1` is the attention of the fourth residual block
    or downsampler after `conv_in`.
    """
    own = list(names)
    blocks = [match for name in own if (match := _BLOCK.match(name))]
    counts: dict[tuple[str, int, str], int] = {}
    for match in blocks:
        way, block, kind, index, _ = match.groups()
        key = (way, int(block), kind)
        counts[key] = max(counts.get(key, 0), int(index) + 1)

    def resnets_before(way: str, block: int) -> int:
        return sum(counts.get((way, b, "resnets"), 0) for b in range(block))

    found = {name: _SINGLE[name] for name in own if name in _SINGLE}
    for match in blocks:
        way, block_text, kind, index_text, rest = match.groups()
        block, index = int(block_text), int(index_text)
        if way == "down_blocks":
            start = 1 + resnets_before(way, block) + sum(counts.get((way, b, "downsamplers"), 0) for b in range(block))
            place = (
                f"input_blocks.{start + (counts.get((way, block, 'resnets'), 0) if kind == 'downsamplers' else index)}"
            )
        else:
            last = counts.get((way, block, "resnets"), 0) - 1
            place = f"output_blocks.{resnets_before(way, block) + (last if kind == 'upsamplers' else index)}"
        if kind == "resnets":
            found[match.string] = f"{place}.0.{_RESNET.get(rest or '', rest)}"
        elif kind == "attentions":
            found[match.string] = f"{place}.1.{rest}"
        elif kind == "downsamplers":
            found[match.string] = f"{place}.0.op"
        else:
            found[match.string] = f"{place}.{2 if counts.get((way, block, 'attentions')) else 1}.{rest}"
    for name in own:
        if match := _MIDDLE.match(name):
            kind, index_text, rest = match.groups()
            if kind == "attentions":
                found[name] = f"middle_block.{2 * int(index_text) + 1}.{rest}"
            else:
                found[name] = f"middle_block.{2 * int(index_text)}.{_RESNET.get(rest, rest)}"
    return found
