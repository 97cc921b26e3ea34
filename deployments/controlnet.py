"""The ControlNet deployment: photos -> control maps once a request, rows -> residuals once a tick."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from config.catalog import Catalog
from deployments.metrics import metrics
from deployments.observability import Traced, stopwatch
from deployments.replica import Runtime, Wakeable, Worker
from pipelines.plan import GenerationPlan

if TYPE_CHECKING:
    from pipelines.controlnet import ControlBatch, ControlHint, Residuals

REMEMBERED_HINTS = 64
"""Control maps a replica keeps: 12 MB each at 1024x1024 in float32."""


class ControlNetDeployment(Wakeable):
    """Hosts the ControlNets that steer one UNet, or all of them when components are grouped by role."""

    def __init__(self, components: Sequence[str], catalog: Catalog, runtime: Runtime) -> None:
        from pipelines.weights import load_controlnets  # torch is a replica's affair: building the graph goes without

        device = runtime.apply()
        self._nets = load_controlnets(catalog, components, device)
        self._worker = Worker()
        self._hints: OrderedDict[str, ControlHint] = OrderedDict()

    async def prepare(self, plan: GenerationPlan, photo: bytes) -> Traced[ControlHint]:
        """The control map of a request; remembered here under its id, so that ticks only name it."""
        stage = plan.stages[0]
        assert stage.control is not None
        with stopwatch("controlnet_prepare", stage.control.component) as watch:
            hint = await self._worker.stage(watch, self._nets.prepare, photo, stage.control, plan.width, plan.height)
        self._remember({hint.id: hint})
        return watch.trace(hint)

    async def residuals(self, batch: ControlBatch, hints: Mapping[str, ControlHint]) -> Residuals | None:
        """Residuals of every row of a tick in one call; None asks for the maps, which this replica has not got."""
        self._remember(hints)
        known = {**self._hints, **hints}
        if any(hint not in known for hint, _, _ in batch.hints):
            return None
        component = batch.hints[0][1]
        with stopwatch("controlnet", component, logging.DEBUG) as watch:  # every tick
            residuals = await self._worker.stage(watch, self._nets.residuals, batch, known)
        metrics().cache("control map", component, self._nets.cache)
        return residuals

    def _remember(self, hints: Mapping[str, ControlHint]) -> None:
        self._hints.update(hints)
        while len(self._hints) > REMEMBERED_HINTS:
            self._hints.popitem(last=False)
