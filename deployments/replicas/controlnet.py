"""The ControlNet deployment: photos -> control maps once a request, rows -> residuals once a tick."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from config.catalog import Catalog
from deployments.replicas.base import Runtime, Wakeable, Worker
from deployments.telemetry.metrics import metrics
from deployments.telemetry.stages import Traced, stopwatch
from pipelines.cache import LruCache
from pipelines.plan import GenerationPlan

if TYPE_CHECKING:
    from pipelines.control.types import ControlBatch, ControlHint, Residuals

REMEMBERED_HINTS = 64
"""Control maps a replica keeps: 12 MB each at 1024x1024 in float32."""


class ControlNetDeployment(Wakeable):
    """Hosts the ControlNets that steer one UNet, or all of them when components are grouped by role."""

    def __init__(self, components: Sequence[str], catalog: Catalog, runtime: Runtime) -> None:
        from pipelines.assembly import (
            load_controlnets,  # torch is a replica's affair: building the graph goes without
        )

        device = runtime.apply()
        self._nets = load_controlnets(catalog, components, device)
        self._worker = Worker()
        self._hints: LruCache[str, ControlHint] = LruCache(REMEMBERED_HINTS)

    async def prepare(self, plan: GenerationPlan, photo: bytes) -> Traced[ControlHint]:
        """The control map of a request; remembered here under its id, so that ticks only name it."""
        stage = plan.stages[0]
        assert stage.control is not None
        with stopwatch("controlnet_prepare", stage.control.component) as watch:
            hint = await self._worker.stage(watch, self._nets.prepare, photo, stage.control, plan.width, plan.height)
        self._hints.put(hint.id, hint)
        return watch.trace(hint)

    async def residuals(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> Residuals | None:
        """Residuals of every row of a tick in one call; None asks for the maps, which this replica has not got."""
        for sent in hints.values():
            self._hints.put(sent.id, sent)
        asked = {hint_id for hint_id, _, _ in batch.hints}
        known = {hint_id: hint for hint_id in asked if (hint := hints.get(hint_id) or self._hints.get(hint_id))}
        if len(known) < len(asked):
            return None
        component = batch.hints[0][1]
        with stopwatch("controlnet", component, logging.DEBUG) as watch:  # every tick
            residuals = await self._worker.stage(watch, self._nets.residuals, batch, known)
        metrics().cache("control map", component, self._nets.cache)
        return residuals
