"""The upscaler deployment: it enlarges pictures with a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from config.catalog import Catalog
from deployments.replicas.base import Replica, Runtime
from deployments.telemetry.stages import Timed, stopwatch
from pipelines.pictures.images import EncodedImage, read_whole_image, write_image
from pipelines.plan import StagePlan
from pipelines.upscale import UpscalePlan

if TYPE_CHECKING:
    from pipelines.pictures.upscaling import Pixels

FILE_THREADS = 2
"""Number of threads that read and write picture files."""


class UpscalerDeployment(Replica):
    """Hosts one model that enlarges pictures, or all of them when components are grouped by role."""

    def __init__(self, *, components: Sequence[str], catalog: Catalog, runtime: Runtime) -> None:
        super().__init__(runtime)
        from pipelines.assembly import load_upscaler

        self._upscalers = {c: load_upscaler(catalog, c, self._device) for c in components}
        self._files = self._worker.beside("files", FILE_THREADS)

    async def upscale(self, *, component: str, stage: StagePlan, pixels: Timed[Pixels]) -> Timed[Pixels]:
        """Enlarge the picture of the first pass to the size of the second pass's `stage`."""
        from pipelines.pictures.upscaling import Pixels

        enlarge = self._upscalers[component].enlarge
        with stopwatch("upscale", component) as watch:
            image = pixels.value.image()
            larger = await self._worker.run(enlarge, image, stage.width, stage.height, started=watch.start_work)
        return watch.timed(Pixels.of(larger), pixels)

    async def upscale_file(self, *, component: str, plan: UpscalePlan, image: bytes) -> Timed[EncodedImage]:
        """Enlarge a sent picture, and return the file, marked as made by a machine and with the plan in it."""
        enlarge = self._upscalers[component].enlarge
        with stopwatch("upscale", component) as watch:
            opened = await self._files.run(read_whole_image, image, "image")
            larger = await self._worker.run(enlarge, opened, plan.width, plan.height, started=watch.start_work)
            written = await self._files.run(write_image, larger, plan.output_format, plan, plan.output_quality)
        return watch.timed(written)
