"""Residuals of a ControlNet: where they were computed, in flight, or packed for another process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from pipelines.transfers import Mark, fetch, send

_FORMATS = {"float32": torch.float32, "float16": torch.float16}


class AnyResiduals(Protocol):
    """The down residuals of a tick's steered rows in order, and the mid residual."""

    def on(self, device: torch.device, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """The tensors, each `[rows, channels, height, width]`."""
        ...


@dataclass(frozen=True)
class Residuals:
    """Residuals where they were computed; valid until the ControlNet computes the next ones."""

    tensors: tuple[torch.Tensor, ...]

    def on(self, device: torch.device, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """The tensors; inside a process they are where the UNet is, and nothing is copied."""
        return [tensor.to(device, dtype) for tensor in self.tensors]

    def sent_to_host(self) -> PendingArray:
        """Begin to copy them to the host in one piece; on the thread that queued what made them."""
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])
        flat = flat.float() if flat.dtype is torch.bfloat16 else flat  # numpy has none
        return PendingArray(fetch(flat), Mark(flat.device), tuple(tuple(tensor.shape) for tensor in self.tensors))


@dataclass(frozen=True)
class PackedResiduals:
    """Residuals between processes as one flat array: 27 MB took 12 ms across an edge so, 72 ms as torch tensors."""

    flat: np.ndarray
    """All tensors end to end."""
    shapes: tuple[tuple[int, ...], ...]
    """Shape of each, in the same order."""

    def on(self, device: torch.device, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """The tensors again; the copy to a GPU is queued."""
        given = torch.empty(self.flat.shape, dtype=_FORMATS[self.flat.dtype.name], pin_memory=device.type == "cuda")
        np.copyto(given.numpy(), self.flat)  # the array may be read-only, which torch would only take with a warning
        flat = send(given, device).to(dtype)
        sizes = [math.prod(shape) for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]


@dataclass(frozen=True)
class PendingArray:
    """Residuals on their way to the host."""

    _flat: torch.Tensor
    _mark: Mark
    _shapes: tuple[tuple[int, ...], ...]

    def wait(self) -> PackedResiduals:
        """The residuals as they cross an edge; on any thread."""
        self._mark.wait()
        return PackedResiduals(self._flat.numpy(), self._shapes)


class PendingResiduals(Protocol):
    """Residuals that are being computed."""

    def result(self) -> AnyResiduals:
        """Wait for them; raises what the computation raised."""
        ...


@dataclass(frozen=True)
class ReadyResiduals:
    """Finished residuals behind the interface of `PendingResiduals`."""

    residuals: Residuals

    def result(self) -> Residuals:
        """The residuals, at once."""
        return self.residuals
