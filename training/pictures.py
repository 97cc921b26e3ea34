"""Tensors to pictures that a person can look at."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def grid(pictures: Tensor, path: Path, across: int = 8) -> None:
    """Write pictures [n, 3, h, w] in -1..1 side by side, `across` in a row, the last row filled with black."""
    rest = -len(pictures) % across
    filled = torch.cat([pictures, pictures.new_full((rest, *pictures.shape[1:]), -1)])
    rows = [torch.cat(list(filled[i : i + across]), 2) for i in range(0, len(filled), across)]
    path.parent.mkdir(parents=True, exist_ok=True)
    to_image(torch.cat(rows, 1)).save(path)


def to_image(picture: Tensor) -> Image.Image:
    """A picture [3, h, w] in -1..1."""
    return Image.fromarray(((picture.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
