"""The ControlNet deployment: it makes control maps from photos once a request, and residuals for rows once a tick."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from config.catalog import Catalog
from deployments.replicas.base import Replica, Runtime
from deployments.telemetry.metrics import metrics
from deployments.telemetry.stages import Timed, stopwatch
from pipelines.acceleration import Acceleration
from pipelines.cache import LruCache
from pipelines.plan import StagePlan

if TYPE_CHECKING:
    from pipelines.control.residuals import PackedResiduals, PendingArray
    from pipelines.control.types import ControlBatch, ControlHint

REMEMBERED_HINT_BYTES = 256 * 2**20
"""Bytes of control maps that a replica keeps; one has 12 MB at 1024x1024 in float32. Dropped maps are sent again."""


class ControlNetDeployment(Replica):
    """Hosts the ControlNets that steer one UNet, or all of them when components are grouped by role."""

    def __init__(
        self,
        *,
        components: Sequence[str],
        catalog: Catalog,
        runtime: Runtime,
        acceleration: Acceleration | None = None,
    ) -> None:
        super().__init__(runtime)
        from pipelines.assembly import load_controlnets
        from pipelines.recordings import capturer_for

        acceleration = acceleration or Acceleration()
        capturer = capturer_for(self._device, acceleration.graphs)
        self._nets = load_controlnets(catalog, components, self._device, capturer, self._precision)
        self._component = components[0]
        self._annotating = self._worker.beside("annotate")  # seconds on a CPU, which ticks must not wait for
        self._hints: LruCache[str, ControlHint] = LruCache(REMEMBERED_HINT_BYTES, lambda hint: hint.image.nbytes)

    async def check_health(self) -> None:
        """Check the base, and set the gauge: Ray's agent forgets gauges that are not set again."""
        await super().check_health()
        metrics().accelerated(self._component, captured=self._nets.captured, failed=self._nets.failed_captures)

    async def prepare(
        self, *, stage: StagePlan, photos: Sequence[bytes], image: bytes | None, mask: bytes | None
    ) -> Timed[tuple[ControlHint, ...]]:
        """Make the control maps of a stage. They are kept here under their ids, so that ticks send only the ids."""
        with stopwatch("controlnet_prepare", stage.controls[0].component) as watch:
            make = self._nets.prepare
            hints = await self._annotating.run(make, photos, stage, image, mask, started=watch.start_work)
        for hint in hints:
            self._hints.put(hint.id, hint)
        return watch.timed(hints)

    async def annotate(self, *, name: str, photo: bytes) -> bytes:
        """Make the control map of a photo for a client: the bytes of a PNG of the photo's size."""
        with stopwatch("annotate", name) as watch:
            return await self._annotating.run(self._nets.annotated, name, photo, started=watch.start_work)

    async def residuals(self, *, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> PackedResiduals | None:
        """Compute the residuals of all rows of a tick.

        The result is None if this replica lacks a control map; the caller then calls again with all maps in `hints`.
        The model's thread only queues the copy to the host; another thread waits for it.
        """
        for sent in hints.values():
            self._hints.put(sent.id, sent)
        asked = batch.hint_ids
        known = {hint_id: hint for hint_id in asked if (hint := hints.get(hint_id) or self._hints.get(hint_id))}
        if len(known) < len(asked):
            return None
        component = batch.uses[0][0].hint.component
        with stopwatch("controlnet", component, logging.DEBUG) as watch:  # every tick
            pending = await self._worker.run(self._compute, batch, known, started=watch.start_work)
            residuals = await asyncio.to_thread(pending.wait)
        metrics().cache("control map", component, self._nets.cache)
        return residuals

    def _compute(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> PendingArray:
        """Compute residuals on the model's thread."""
        return self._nets.residuals(batch, hints).sent_to_host()
