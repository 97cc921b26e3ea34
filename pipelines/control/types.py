"""What a denoiser and a ControlNet exchange: hints, batches of rows, residuals, and the protocols between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from pipelines.tensors import TensorBundle


class HintRef(NamedTuple):
    """Names the control map of one row, so that a tick does not send the map itself."""

    id: str
    """Of the map."""
    component: str
    """The ControlNet that reads the map."""
    mode: int | None
    """Control type of a union ControlNet, None for a plain one."""


@dataclass(frozen=True)
class ControlHint(TensorBundle):
    """A control map, ready for its ControlNet.

    Attributes:
        id: names the map in the ticks that use it, so that it is not sent again.
        component: the ControlNet.
        mode: control type of a union ControlNet, None for a plain one.
        image: `[1, 3, height, width]` in pixels of the picture, 0..1.
    """

    id: str
    component: str
    mode: int | None
    image: torch.Tensor

    @property
    def ref(self) -> HintRef:
        """What names the map in a tick."""
        return HintRef(self.id, self.component, self.mode)


@dataclass(frozen=True)
class ControlBatch(TensorBundle):
    """The rows of one tick that need residuals, whichever ControlNet of the family they need.

    Attributes:
        hints: which map each row needs.
        sample: `[rows, channels, height, width]`, as the UNet sees them.
        timesteps: `[rows]`.
        prompt_embeds: `[rows, tokens, width]`.
        text_embeds: `[rows, projection]`, SDXL only.
        time_ids: `[rows, ids]`, SDXL only.
    """

    hints: tuple[HintRef, ...]
    sample: torch.Tensor
    timesteps: torch.Tensor
    prompt_embeds: torch.Tensor
    text_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class Residuals:
    """Residuals of all rows as one flat array: 27 MB took 12 ms across an edge so, 72 ms as torch tensors.

    Attributes:
        flat: the down residuals in order and the mid residual, each `[rows, channels, height, width]`, end to end.
        shapes: of each.
    """

    flat: np.ndarray
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def pack(cls, tensors: Sequence[torch.Tensor]) -> Residuals:
        """Flatten the tensors of a forward pass."""
        flat = torch.cat([t.detach().reshape(-1) for t in tensors]).cpu()
        flat = flat.float() if flat.dtype is torch.bfloat16 else flat
        return cls(flat.numpy(), tuple(tuple(t.shape) for t in tensors))

    def unpack(self, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        """The tensors again."""
        array = self.flat if self.flat.flags.writeable else self.flat.copy()
        flat = torch.from_numpy(array).to(device, dtype)
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]


class PendingResiduals(Protocol):
    """Residuals under way."""

    def result(self) -> Residuals:
        """Wait for them; raises what the computation raised."""
        ...


@dataclass(frozen=True)
class ReadyResiduals:
    """Residuals that are already there, where a pending result is expected."""

    residuals: Residuals

    def result(self) -> Residuals:
        """The residuals, at once."""
        return self.residuals


class ControlSource(Protocol):
    """Where a denoiser gets residuals from: a ControlNet in this process, or another deployment."""

    def start(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> PendingResiduals:
        """Begin; `hints` holds the maps of every row, for a source that has not seen them yet."""
        ...


@dataclass(frozen=True)
class ControlledRows:
    """The rows of a StepBatch that get residuals: row `rows[i]` of the batch is row i of `pending`."""

    rows: tuple[int, ...]
    pending: PendingResiduals


class MissingHintsError(LookupError):
    """A ControlNet was asked about maps it does not hold, because it restarted or evicted them. Send them along."""
