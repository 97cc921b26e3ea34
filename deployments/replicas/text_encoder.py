"""The text-encoder deployment: it encodes the prompts of stage plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from config.catalog import Catalog
from deployments.replicas.base import Replica, Runtime
from deployments.replicas.reads import Reads
from deployments.telemetry.metrics import metrics
from deployments.telemetry.stages import Timed, stopwatch
from pipelines.plan import StagePlan

if TYPE_CHECKING:
    from pipelines.text.conditioning import Conditioning


class TextEncoderDeployment(Replica):
    """Hosts one text-encoder component, or all of them when components are grouped by role."""

    def __init__(self, *, components: Sequence[str], catalog: Catalog, runtime: Runtime) -> None:
        super().__init__(runtime)
        from pipelines.assembly import load_text_encoders

        self._stacks = {c: load_text_encoders(catalog, c, self._device) for c in components}
        self._reads = Reads(self._worker)

    async def encode(self, *, component: str, stage: StagePlan) -> Timed[Conditioning]:
        """Encode the prompts of one stage."""
        stack = self._stacks[component]
        with stopwatch("text_encoder", component) as watch:
            held = await self._reads.all(stack.needed(stage))  # not on the thread that encodes for all
            conditioning = await self._worker.run(stack.encode, stage, started=watch.start_work)
            del held
            watch.note = str(conditioning.size)
        metrics().cache("embedding", component, *(encoder.cache for encoder in stack.encoders))
        metrics().cache("lora", component, *(encoder.loras.cache for encoder in stack.encoders))
        return watch.timed(conditioning)
