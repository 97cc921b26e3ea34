"""The types of calls to a ControlNet: hints, batches of rows, and the source of residuals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import torch

from pipelines.control.residuals import PendingResiduals
from pipelines.tensors import TensorBundle
from pipelines.transfers import Mark, fetch


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
    """A control map, ready for its ControlNet."""

    id: str
    """Names the map in the ticks that use it, so that it is not sent again."""
    component: str
    """The ControlNet."""
    mode: int | None
    """Control type of a union ControlNet, None for a plain one."""
    image: torch.Tensor
    """`[1, 3, height, width]` in pixels of the picture, 0..1."""

    @property
    def ref(self) -> HintRef:
        """What names the map in a tick."""
        return HintRef(self.id, self.component, self.mode)


class HintUse(NamedTuple):
    """One control map that steers a row, and how much."""

    hint: HintRef
    weight: float = 1.0
    """diffusers' `controlnet_conditioning_scale`: what its residuals are multiplied by, or, where a union ControlNet
    reads several maps at once, what the map is."""
    guess: bool = False
    """Whether shallow residuals count less than deep ones (diffusers' `guess_mode`)."""

    @property
    def joint(self) -> tuple[str, bool] | None:
        """What uses of a row share that are read in one pass: a union ControlNet's. None for a plain one's."""
        return (self.hint.component, self.guess) if self.hint.mode is not None else None


@dataclass(frozen=True)
class ControlBatch(TensorBundle):
    """The rows of one tick that need residuals, whichever ControlNets of the family they need."""

    uses: tuple[tuple[HintUse, ...], ...]
    """The maps of each row, at least one. Residuals add up, weighted; a union ControlNet reads all its maps of a row in
    one pass."""
    sample: torch.Tensor
    """`[rows, channels, height, width]`, as the UNet sees them."""
    timesteps: torch.Tensor
    """`[rows]`, in training timesteps."""
    prompt_embeds: torch.Tensor
    """`[rows, tokens, width]`."""
    text_embeds: torch.Tensor | None = None
    """`[rows, projection]`, SDXL only."""
    time_ids: torch.Tensor | None = None
    """`[rows, ids]`, SDXL only."""

    @property
    def hint_ids(self) -> frozenset[str]:
        """Every map that some row needs."""
        return frozenset(use.hint.id for uses in self.uses for use in uses)

    def sent_to_host(self) -> PendingBatch:
        """Begin to copy it to the host; on the thread that queued what made it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        copies: dict[str, Any] = {n: fetch(v) for n, v in values.items() if isinstance(v, torch.Tensor)}
        return PendingBatch(replace(self, **copies), Mark(self.sample.device))


@dataclass(frozen=True)
class PendingBatch:
    """A batch on its way to the host."""

    _batch: ControlBatch
    _mark: Mark

    def wait(self) -> ControlBatch:
        """The batch on the host; on any thread."""
        self._mark.wait()
        return self._batch


class ControlSource(Protocol):
    """Where a denoiser gets residuals from: a ControlNet in this process, or another deployment."""

    def start(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> PendingResiduals:
        """Start the computation; `hints` holds the maps of every row, for a source that lacks them."""
        ...


@dataclass(frozen=True)
class ControlledRows:
    """The rows of a StepBatch that get residuals: row `rows[i]` of the batch is row i of those in `pending`."""

    rows: tuple[int, ...]
    pending: PendingResiduals


class MissingHintsError(LookupError):
    """A ControlNet does not hold the maps of a call, which it lost or evicted; the caller must send them."""
