"""Files of weights that are all header: the tensors are holes, so that a checkpoint of 7 GB costs no room."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "F8_E4M3": 1, "U8": 1}


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...] | torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: str = "F16",
) -> Path:
    """Write a sound `.safetensors` file of tensors of these shapes, all zeros; a tensor brings its own format."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        own = dtype
        if isinstance(shape, torch.Tensor):
            own, shape = DTYPES[shape.dtype], tuple(shape.shape)
        size = BYTES[own]
        for length in shape:
            size *= length
        entries[name] = {"dtype": own, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + end)
    return path
