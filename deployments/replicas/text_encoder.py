"""The text-encoder deployment: stage plans -> conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from config.catalog import Catalog
from deployments.replicas.base import Runtime, Wakeable, Worker
from deployments.telemetry.metrics import metrics
from deployments.telemetry.stages import Traced, stopwatch
from pipelines.plan import StagePlan

if TYPE_CHECKING:
    from pipelines.text.conditioning import Conditioning


class TextEncoderDeployment(Wakeable):
    """Hosts one text-encoder component, or all of them when components are grouped by role."""

    def __init__(self, components: Sequence[str], catalog: Catalog, runtime: Runtime) -> None:
        from pipelines.assembly import (
            load_text_encoders,  # torch is a replica's affair: building the graph goes without
        )

        device = runtime.apply()
        self._stacks = {c: load_text_encoders(catalog, c, device) for c in components}
        self._worker = Worker()

    async def encode(self, component: str, stage: StagePlan) -> Traced[Conditioning]:
        """Conditioning of one stage."""
        encoders = self._stacks[component].encoders
        with stopwatch("text_encoder", component) as watch:
            conditioning = await self._worker.stage(watch, self._stacks[component].encode, stage)
        metrics().cache("embedding", component, *(encoder.cache for encoder in encoders))
        metrics().cache("lora", component, *(encoder.loras.cache for encoder in encoders))
        return watch.trace(conditioning)
