"""The torch backend: diffusers' UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from pipelines.acceleration import Acceleration
from pipelines.adapters.rows import RowAdapters
from pipelines.adapters.slots import BUCKETS
from pipelines.backends.base import StepBatch
from pipelines.backends.blocks import compile_blocks
from pipelines.backends.graphs import UNetGraphs
from pipelines.backends.halves import UNetHalves
from pipelines.control.buffers import spread
from pipelines.recordings import Capturer
from pipelines.torch_compat import ran_out_of_memory

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class TorchDenoiser:
    """A Denoiser over a loaded UNet."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        strict: bool = False,
        capturer: Capturer | None = None,
        acceleration: Acceleration | None = None,
    ) -> None:
        """Wrap `unet`, on its own device and in its own dtype.

        On a CPU rows are float32 whatever the UNet computes in: noise, latents and text are those of float32 then, and
        only what the UNet makes of them is rounded.

        Args:
            unet: loaded, and neither compiled nor captured yet.
            strict: the last bits of a row depend on nothing but the row.
            capturer: records passes that come often; None evaluates all of them as they come.
            acceleration: what else is done to the UNet; nothing if None.

        Raises:
            WeightsError: the UNet needs an input this graph does not produce.
        """
        self._halves = UNetHalves(unet.eval())
        self.config: Mapping[str, Any] = unet.config
        self.device: torch.device = unet.device
        self.unet_dtype: torch.dtype = unet.dtype
        """What its weights are, and what it computes in."""
        self.dtype: torch.dtype = torch.float32 if unet.device.type == "cpu" else unet.dtype
        self.adapters = RowAdapters(unet, buckets=() if strict else BUCKETS)  # before anything is compiled
        self.compiled_blocks = 0
        """Blocks that torch.compile was given."""
        if acceleration is not None and acceleration.channels_last:
            unet.to(memory_format=torch.channels_last)
        if acceleration is not None and acceleration.compiled_blocks:
            self.compiled_blocks = compile_blocks(unet)
        self._graphs = UNetGraphs(self._halves, capturer) if capturer is not None else None
        self._padding = 0

    @property
    def captured(self) -> int:
        """Recorded passes there are."""
        return 0 if self._graphs is None else len(self._graphs.recorder)

    @property
    def failed_captures(self) -> int:
        """Kinds of passes that could not be recorded."""
        return 0 if self._graphs is None else self._graphs.recorder.failures.total()

    @torch.inference_mode()
    def predict(self, batch: StepBatch) -> torch.Tensor:
        """Evaluate the UNet once for all rows; residuals are waited for when it is half done."""
        self._padding = 0
        try:
            output = self._replay(batch)
            return self._evaluate(batch) if output is None else output
        except Exception as error:
            if self._graphs is not None and ran_out_of_memory(error):
                self._graphs.recorder.forget()  # whoever tries again has their memory
            raise

    @torch.inference_mode()
    def record(self, batch: StepBatch) -> None:
        """Record the pass that this batch and others like it need, where passes are recorded at all."""
        self._replay(batch, at_once=True)

    def padding(self, batch: StepBatch) -> int:
        """Rows that only filled the recorded pass of the last batch, which this is."""
        return self._padding

    def _replay(self, batch: StepBatch, at_once: bool = False) -> torch.Tensor | None:
        """The output of a recorded pass; None where the batch is to be evaluated as it is."""
        if self._graphs is None or (kind := self._graphs.due(batch, at_once)) is None:
            return None
        with self.adapters.active(batch.loras, padded=kind.rows) as slots:
            recorded = None if slots is None else self._graphs.find(kind, slots, batch)
            if recorded is None:
                return None
            self._padding = kind.rows - len(batch.sample)
            return recorded.run(batch)

    def _evaluate(self, batch: StepBatch) -> torch.Tensor:
        with self.adapters.active(batch.loras) as slots, self._uncompiled(slots is None):
            text = batch.prompt_embeds.to(self.unet_dtype)
            lower = self._halves.lower(batch.sample.to(self.unet_dtype), batch.timesteps, text, batch.added_conditions)
            residuals = None
            if batch.controlled is not None:
                given = batch.controlled.pending.result().on(self.device, self.unet_dtype)
                residuals = spread(given, batch.controlled.rows, len(batch.sample))
            return self._halves.upper(lower, text, residuals).to(self.dtype)

    def _uncompiled(self, hooked: bool) -> AbstractContextManager[Any]:
        """Hooks of adapters that come and go would have a block compiled again and again: such passes go without."""
        return torch.compiler.set_stance("force_eager") if hooked and self.compiled_blocks else nullcontext()
