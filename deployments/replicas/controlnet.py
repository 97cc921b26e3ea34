"""The ControlNet deployment: photos -> control maps once a request, rows -> residuals once a tick."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from config.catalog import Catalog
from deployments.replicas.base import Replica, Runtime
from deployments.telemetry.metrics import metrics
from deployments.telemetry.stages import Timed, stopwatch
from pipelines.cache import LruCache
from pipelines.plan import GenerationPlan

if TYPE_CHECKING:
    from pipelines.control.types import ControlBatch, ControlHint, Residuals

REMEMBERED_HINTS = 64
"""Control maps a replica keeps: 12 MB each at 1024x1024 in float32."""


class ControlNetDeployment(Replica):
    """Hosts the ControlNets that steer one UNet, or all of them when components are grouped by role."""

    def __init__(self, *, components: Sequence[str], catalog: Catalog, runtime: Runtime) -> None:
        super().__init__(runtime)
        from pipelines.assembly import load_controlnets

        self._nets = load_controlnets(catalog, components, self._device)
        self._hints: LruCache[str, ControlHint] = LruCache(REMEMBERED_HINTS)

    async def prepare(self, *, plan: GenerationPlan, photo: bytes) -> Timed[ControlHint]:
        """The control map of a request; remembered here under its id, so that ticks only name it."""
        control = plan.stages[0].control
        assert control is not None
        with stopwatch("controlnet_prepare", control.component) as watch:
            hint = await self._worker.run(
                self._nets.prepare, photo, control, plan.width, plan.height, started=watch.start_work
            )
        self._hints.put(hint.id, hint)
        return watch.timed(hint)

    async def residuals(self, *, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> Residuals | None:
        """Residuals of every row of a tick in one call; None asks for the maps, which this replica has not got."""
        for sent in hints.values():
            self._hints.put(sent.id, sent)
        asked = {hint.id for hint in batch.hints}
        known = {hint_id: hint for hint_id in asked if (hint := hints.get(hint_id) or self._hints.get(hint_id))}
        if len(known) < len(asked):
            return None
        component = batch.hints[0].component
        with stopwatch("controlnet", component, logging.DEBUG) as watch:  # every tick
            residuals = await self._worker.run(self._nets.residuals, batch, known, started=watch.start_work)
        metrics().cache("control map", component, self._nets.cache)
        return residuals
