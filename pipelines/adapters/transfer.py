"""Many small tensors -> the device, in one copy that neither the host nor a running tick waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipelines.transfers import send

_ALIGNMENT = 128
"""Bytes; every tensor begins at a multiple of it, as matrix products like their operands."""


def moved(tensors: Sequence[tuple[torch.Tensor, torch.dtype]], device: torch.device) -> list[torch.Tensor]:
    """The tensors on `device`, each in its format, as parts of one buffer that travels from pinned memory."""
    cast = [tensor.to(dtype).contiguous() for tensor, dtype in tensors]
    if device.type == "cpu":
        return cast
    starts, end = [], 0
    for tensor in cast:
        starts.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for start, tensor in zip(starts, cast, strict=True):
        buffer[start : start + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
    there = send(buffer, device)
    return [there[s : s + t.nbytes].view(t.dtype).view(t.shape) for s, t in zip(starts, cast, strict=True)]
