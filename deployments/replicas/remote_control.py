"""A denoiser's calls to the ControlNet deployment (ENG-5)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from deployments.graph import ControlNetEdge
from deployments.ray_compat import replica_died
from deployments.telemetry.metrics import metrics

if TYPE_CHECKING:
    from pipelines.control.residuals import PackedResiduals, PendingResiduals
    from pipelines.control.types import ControlBatch, ControlHint, PendingBatch

logger = logging.getLogger(__name__)


class RemoteControl:
    """ControlNets in their own deployment. The call runs on the replica's event loop during the UNet's down blocks."""

    def __init__(self, edge: ControlNetEdge) -> None:
        self._edge = edge
        self._loop = asyncio.get_event_loop()

    def start(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> PendingResiduals:
        """Begin the call. The control maps are sent only if the replica lacks them.

        This runs on the model's thread, before the UNet is queued. The copy of the batch to the host is queued here, so
        that it waits for the previous tick at most; the event loop sends the batch when the copy has arrived.
        """
        return asyncio.run_coroutine_threadsafe(self._call(batch.sent_to_host(), hints), self._loop)

    async def _call(self, pending: PendingBatch, hints: Mapping[str, ControlHint]) -> PackedResiduals:
        batch = await asyncio.to_thread(pending.wait)
        residuals = await self._ask(batch, {})
        if residuals is None:
            residuals = await self._ask(batch, hints)
        assert residuals is not None, "the maps were sent along"
        return residuals

    async def _ask(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> PackedResiduals | None:
        """Call the deployment, and once more if the replica died: another replica or its successor answers."""
        try:
            return await self._edge.residuals(batch=batch, hints=hints)
        except Exception as error:
            if not replica_died(error):
                raise
            logger.warning("a ControlNet replica died, asking again: %s", type(error).__name__)
            metrics().retries.inc(1, {"reason": "controlnet died"})
            return await self._edge.residuals(batch=batch, hints=hints)
