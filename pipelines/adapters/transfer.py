"""Many small tensors -> the device, in one copy that neither the host nor a running tick waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ALIGNMENT = 64
"""Values; every tensor begins at a multiple of it, as matrix products like their operands."""


def moved(tensors: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors on `device`, as parts of one buffer that travels from pinned memory."""
    if device.type == "cpu":
        return [tensor.to(dtype).contiguous() for tensor in tensors]
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(end, dtype=dtype, pin_memory=device.type == "cuda")
    for start, tensor in zip(starts, tensors, strict=True):
        buffer[start : start + tensor.numel()].copy_(tensor.reshape(-1))
    there = buffer.to(device, non_blocking=True)
    return [there[s : s + t.numel()].view(t.shape) for s, t in zip(starts, tensors, strict=True)]
