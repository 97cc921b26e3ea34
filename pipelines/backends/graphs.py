"""Recorded passes of a UNet: what selects one, what it reads, and how a batch gets through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipelines.adapters.rows import SlotKey
from pipelines.backends.base import StepBatch
from pipelines.backends.halves import Lower, UNetHalves
from pipelines.control.buffers import ResidualBuffers
from pipelines.recordings import Capturer, Recorder, StaticRows, padded_rows


class PassKind(NamedTuple):
    """What selects a recorded pass of a UNet, besides the adapters' slots that it reads."""

    rows: int
    """Padded. A job alone has one row or two, which are never padded: strict mode stays exact."""
    latent_shape: tuple[int, ...]
    context_shape: tuple[int, ...]
    controlled: bool


class UNetGraphs:
    """The recorded passes of one UNet."""

    def __init__(self, halves: UNetHalves, capturer: Capturer) -> None:
        """Record passes of `halves` by `capturer`."""
        self._halves = halves
        self._capturer = capturer
        self.recorder: Recorder[RecordedPass] = Recorder()

    def due(self, batch: StepBatch, at_once: bool = False) -> PassKind | None:
        """The kind of pass of a batch if it is to be recorded, else None; called once for each batch."""
        rows = padded_rows(len(batch.sample))
        if rows is None:
            return None
        kind = PassKind(
            rows, tuple(batch.sample.shape[1:]), tuple(batch.prompt_embeds.shape[1:]), batch.controlled is not None
        )
        return kind if self.recorder.due(kind, at_once) else None

    def find(self, kind: PassKind, slots: SlotKey, batch: StepBatch) -> RecordedPass | None:
        """The recorded pass, made now if need be; None where that failed and the batch must be evaluated as usual."""
        return self.recorder.find(kind, slots, lambda: RecordedPass(self._halves, self._capturer, batch, kind.rows))


class RecordedPass:
    """One UNet pass over so many rows, recorded."""

    def __init__(self, halves: UNetHalves, capturer: Capturer, batch: StepBatch, rows: int) -> None:
        """Record it; `batch` is an example that is valid."""
        self._halves = halves
        self._added = tuple(batch.added_conditions)
        self._inputs = StaticRows(self._given(batch), rows)
        self._inputs.fill(self._given(batch))
        sample = self._inputs.tensors[0]
        self._output = sample.new_empty(rows, halves.out_channels, *sample.shape[2:])
        self._lower: Lower | None = None
        self._buffers: ResidualBuffers | None = None
        parts, reads = [self._whole], list(self._inputs.tensors)
        if batch.controlled is not None:
            self._go_down()
            assert self._lower is not None
            self._buffers = ResidualBuffers([*self._lower.skips, self._lower.hidden])
            parts, reads = [self._go_down, self._go_up], [*reads, *self._buffers.tensors]
        self._replays = capturer.capture(parts, reads, [self._output])
        self._lower = None  # the way up finds it where it was recorded

    def run(self, batch: StepBatch) -> torch.Tensor:
        """The model output of a batch of this kind; valid until the next run of any recorded pass of this UNet."""
        self._inputs.fill(self._given(batch))
        first, *rest = self._replays
        first()
        if self._buffers is not None and batch.controlled is not None:
            residuals = batch.controlled.pending.result().on(self._output.device, self._output.dtype)
            self._buffers.write(residuals, batch.controlled.rows)
        for replay in rest:
            replay()
        return self._output[: len(batch.sample)]

    def _given(self, batch: StepBatch) -> Sequence[torch.Tensor]:
        added = [batch.added_conditions[name] for name in self._added]
        return [batch.sample, batch.timesteps, batch.prompt_embeds, *added]

    def _whole(self) -> None:
        self._go_down()
        self._go_up()

    def _go_down(self) -> None:
        sample, timesteps, embeds, *added = self._inputs.tensors
        self._lower = self._halves.lower(sample, timesteps, embeds, dict(zip(self._added, added, strict=True)))

    def _go_up(self) -> None:
        assert self._lower is not None
        residuals = None if self._buffers is None else self._buffers.tensors
        self._output.copy_(self._halves.upper(self._lower, self._inputs.tensors[2], residuals))
